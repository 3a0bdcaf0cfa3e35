"""Packing: what gets into shards, what is refused, and what an interruption leaves behind."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from conftest import ROOT, noise_picture, pack_arguments, write_jpeg

from common.errors import InputError, run_main
from pipelines import jpeg as pictures
from pipelines.jpeg import PictureError, check_jpeg
from pipelines.shard_format import read_manifest
from pipelines.shards import ShardSet
from tools import make_shards, pack_tasks
from tools.make_shards import main

TOOL = [sys.executable, str(ROOT / "tools" / "make_shards.py")]


@pytest.fixture
def own_set(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that a test may change."""
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


def files(folder: Path) -> dict[str, bytes]:
    """Tars and indices of a packed set by name, with their bytes."""
    paths = [*folder.glob("*/*.tar"), *folder.glob("*/*.idx")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def refused(arguments: list[str]) -> InputError:
    with pytest.raises(InputError) as caught:
        main(arguments)
    return caught.value


# What is packed


def test_packed_pictures_are_the_files_byte_for_byte(tiny_set: Path, tiny_shards: Path) -> None:
    for split, count in (("train", 12), ("valid", 5)):
        data = ShardSet(tiny_shards / split)
        assert len(data) == count
        for sample in range(count):
            name = data.facts(sample)["image"]
            assert data.jpeg(sample) == (tiny_set / "images" / name).read_bytes()


def test_everybody_is_packed_once_with_the_annotations_row(
    tiny_set: Path, tiny_shards: Path
) -> None:
    data = ShardSet(tiny_shards / "train")
    rows = data.records()[:, 0].astype(int)
    assert sorted(rows) == list(range(12))
    with h5py.File(tiny_set / "annot" / "train.h5") as file:
        for sample, row in enumerate(rows):
            assert data.facts(sample)["image"] == file["imgname"][row].decode()
            joints = data.record(sample)[13:].reshape(16, 4)
            np.testing.assert_array_equal(joints[:, :2], file["part"][row])


def test_size_in_the_record_is_that_of_the_decoded_picture(tiny_shards: Path) -> None:
    data = ShardSet(tiny_shards / "train")
    for sample in range(len(data)):
        image = cv2.imdecode(np.frombuffer(data.jpeg(sample), np.uint8), cv2.IMREAD_COLOR)
        assert tuple(data.record(sample)[5:7]) == (image.shape[1], image.shape[0])


def test_people_are_shuffled_by_the_seed(tiny_set: Path, tiny_shards: Path, tmp_path: Path) -> None:
    orders = [ShardSet(tiny_shards / "train").records()[:, 0].tolist()]
    for seed in (0, 1):
        main(pack_arguments(tiny_set, tmp_path / str(seed), "--seed", seed, "--splits", "train"))
        orders.append(ShardSet(tmp_path / str(seed) / "train").records()[:, 0].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] == np.random.default_rng([0, 0]).permutation(12).tolist()


def test_bytes_do_not_depend_on_the_number_of_workers(
    tiny_set: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out", "--workers", 2))
    assert len(files(tmp_path / "out")) == 8
    assert files(tmp_path / "out") == files(tiny_shards)


def test_manifest_says_how_it_was_made(tiny_set: Path, tiny_shards: Path) -> None:
    manifest = read_manifest(tiny_shards / "valid")
    assert (manifest.split, manifest.people, manifest.seed) == ("valid", 5, 0)
    assert manifest.packing == "original"
    assert manifest.left_out == []
    assert manifest.source["annotations"] == str(tiny_set / "annot" / "valid.h5")
    assert manifest.source["images"] == str(tiny_set / "images")
    digest = subprocess.run(
        ["sha256sum", tiny_set / "annot" / "valid.h5"], capture_output=True, text=True, check=True
    )
    assert manifest.source["sha256"] == digest.stdout.split()[0]
    assert manifest.command.startswith("python tools/make_shards.py --annotations ")
    assert manifest.command.endswith("--people-per-shard 5 --workers 1")


def test_nothing_but_the_output_is_left(tiny_shards: Path) -> None:
    assert [path.name for path in tiny_shards.parent.iterdir()] == ["tiny"]
    assert sorted(path.name for path in tiny_shards.iterdir()) == ["train", "valid"]
    names = sorted(path.name for path in (tiny_shards / "valid").iterdir())
    assert names == ["00000.idx", "00000.tar", "manifest.json"]


def test_single_h5_file_is_the_split_of_its_name(tiny_set: Path, tmp_path: Path) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out")
    main([*arguments, "--annotations", str(tiny_set / "annot" / "valid.h5")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["valid"]


def test_h5_file_of_another_name_needs_its_split(tiny_set: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_set / "annot" / "train.h5", tmp_path / "mine.h5")
    arguments = pack_arguments(tiny_set, tmp_path / "out", "--annotations", tmp_path / "mine.h5")
    assert "--splits" in refused(arguments).next_step
    main([*arguments, "--splits", "train"])
    assert read_manifest(tmp_path / "out" / "train").people == 12


def test_json_annotations_are_packed_split_by_split(tiny_set: Path, tmp_path: Path) -> None:
    joints = [[10.0 * j + 5, 7.0 * j + 3, 1.0] for j in range(16)]
    people = [
        {
            "img_paths": f"{number:09d}.jpg", "isValidation": float(number == 101),
            "objpos": [50.0, 40.0], "scale_provided": 0.5, "joint_self": joints,
        }
        for number in (0, 3, 101)
    ]  # fmt: skip
    (tmp_path / "mpii_annotations.json").write_text(json.dumps(people))
    arguments = pack_arguments(tiny_set, tmp_path / "out")
    main([*arguments, "--annotations", str(tmp_path / "mpii_annotations.json")])
    train, valid = (ShardSet(tmp_path / "out" / split) for split in ("train", "valid"))
    assert {train.facts(i)["image"] for i in range(len(train))} == {
        "000000000.jpg",
        "000000003.jpg",
    }
    assert [valid.facts(i)["image"] for i in range(len(valid))] == ["000000101.jpg"]
    np.testing.assert_allclose(valid.record(0)[1:4], [50, 47.5, 0.625])


def test_real_sample_packs(shared: Path, tmp_path: Path) -> None:
    sample = shared / "data" / "mpii_sample"
    main(pack_arguments(sample, tmp_path / "out", "--splits", "valid"))
    data = ShardSet(tmp_path / "out" / "valid")
    sizes = sorted(map(tuple, data.records()[:, 5:7].astype(int).tolist()))
    assert sizes == [(854, 480)] + [(1280, 720)] * 4
    assert (data.manifest.max_width, data.manifest.max_height) == (1280, 720)


def test_summary_names_the_next_command(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out"))
    text = capsys.readouterr().out
    assert "12 people in 3 shards" in text and "5 people in 1 shards" in text
    assert f"python train.py --config configs/2hg.yaml --data.shards {tmp_path / 'out'}" in text


# Pictures that are refused


def jpeg(*options: int, size: tuple[int, int] = (160, 120), seed: int = 5) -> bytes:
    image = noise_picture(np.random.default_rng(seed), *size)
    return cv2.imencode(".jpg", image, list(options))[1].tobytes()


BASELINE = ()
PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = (cv2.IMWRITE_JPEG_RST_INTERVAL, 3)


def exif(orientation: int, order: str = "<", more: bytes = b"") -> bytes:
    """An APP1 segment with two tags, laid out by hand from the TIFF 6.0 specification."""
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 2)
    tiff += struct.pack(order + "HHII", 0x010F, 2, 4, 0)  # Make, four letters
    tiff += struct.pack(order + "HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff + more
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]


def frame_at(data: bytes) -> int:
    """Where the body of the frame header begins: precision, height, width, components."""
    return data.index(b"\xff\xc0") + 4


def reason_of(data: bytes) -> str:
    with pytest.raises(PictureError) as caught:
        check_jpeg(data)
    return caught.value.reason


def cmyk() -> bytes:
    image = pytest.importorskip("PIL.Image", reason="Pillow writes the CMYK picture")
    stream = io.BytesIO()
    image.new("CMYK", (40, 30), (10, 90, 40, 3)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("options", [BASELINE, PROGRESSIVE, RESTARTS])
def test_whole_jpegs_of_every_usual_kind_pass(options: tuple[int, ...]) -> None:
    assert check_jpeg(jpeg(*options)) == (160, 120)


@pytest.mark.parametrize("tail", [b"\0", bytes(700), b"\r\n", b"trailing", b"\xff\xff", jpeg()])
def test_bytes_after_the_end_marker_are_let_be(tail: bytes) -> None:
    assert check_jpeg(jpeg() + tail) == (160, 120)


@pytest.mark.parametrize("options", [BASELINE, PROGRESSIVE, RESTARTS])
@pytest.mark.parametrize("tail", [b"", bytes(64)])
def test_jpeg_cut_anywhere_is_refused(options: tuple[int, ...], tail: bytes) -> None:
    data = jpeg(*options)
    cuts = [*range(3, 700, 23), *range(700, len(data) - 2, 211), len(data) - 2, len(data) - 1]
    assert len(cuts) > 40
    for cut in cuts:
        reason = reason_of(data[:cut] + tail)
        assert reason.startswith("truncated") or tail


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_cut_jpeg_is_not_saved_by_the_end_of_its_thumbnail(part: float) -> None:
    whole = with_segment(jpeg(), exif(1, more=jpeg(size=(40, 30))))
    assert check_jpeg(whole) == (160, 120)
    start = len(whole) - len(jpeg())
    cut = whole[: start + int(part * len(jpeg()))]
    assert b"\xff\xd9" in cut
    assert reason_of(cut).startswith("truncated")


@pytest.mark.parametrize("options", [BASELINE, PROGRESSIVE, RESTARTS])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_overwritten_middle_is_refused(options: tuple[int, ...], part: float) -> None:
    data = bytearray(jpeg(*options))
    place = int(len(data) * part)
    data[place : place + 400] = bytes(400)
    assert reason_of(bytes(data)).startswith("damaged")


def test_scan_that_ends_early_is_refused() -> None:
    data = jpeg()
    assert "premature end" in reason_of(data[: len(data) // 2] + b"\xff\xd9")


def test_random_damage_ends_in_a_verdict() -> None:
    data, rng, refusals = jpeg(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            check_jpeg(bytes(damaged))
        except PictureError:
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_exif_orientation_is_refused(order: str, orientation: int) -> None:
    data = with_segment(jpeg(), exif(orientation, order))
    # OpenCV sees the same tag: it turns the picture when it may.
    if orientation in (6, 8):
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (160, 120)
    assert reason_of(data) == f"EXIF orientation {orientation}"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_exif_that_turns_nothing_passes(order: str, orientation: int) -> None:
    assert check_jpeg(with_segment(jpeg(), exif(orientation, order))) == (160, 120)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"http://ns.adobe.com/xap/1.0/\0",
    ],
)
def test_broken_exif_passes(body: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    assert check_jpeg(with_segment(jpeg(), segment)) == (160, 120)


def test_huge_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(jpeg())
    place = frame_at(bytes(data))
    data[place + 1 : place + 5] = struct.pack(">HH", 65_000, 64_000)
    monkeypatch.setattr(pictures, "_decode", lambda _: pytest.fail("decoded"))
    assert reason_of(bytes(data)) == "header says 64000 x 65000, over 64,000,000 pixels"


def test_header_of_no_pixels_is_refused() -> None:
    data = bytearray(jpeg())
    place = frame_at(bytes(data))
    data[place + 1 : place + 3] = bytes(2)
    assert reason_of(bytes(data)).startswith("damaged")


def test_rare_kinds_of_jpeg_are_refused() -> None:
    data = jpeg()
    arithmetic = data.replace(b"\xff\xc0", b"\xff\xc9", 1)
    assert reason_of(arithmetic) == "a JPEG of a rare kind (SOF9)"
    deep = bytearray(data)
    deep[frame_at(data)] = 12
    assert reason_of(bytes(deep)) == "12 bits a channel"


def test_check_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = jpeg()
    reason_of(data[: len(data) // 2] + b"\xff\xd9")
    assert capfd.readouterr().err == ""


def test_real_photographs_pass(shared: Path) -> None:
    paths = sorted((shared / "data/lspet/images").iterdir())[:200]
    paths += sorted((shared / "data/mpii_sample/images").iterdir())
    assert len(paths) == 205
    for path in paths:
        check_jpeg(path.read_bytes())


def spoil(folder: Path) -> dict[str, str]:
    """Make one picture bad in each way; returns the reason for each name."""
    data = jpeg()
    outside = folder.parent.parent / "outside.jpg"
    outside.write_bytes(data)
    grey = cv2.imencode(".jpg", np.full((40, 50), 90, np.uint8))[1].tobytes()
    png = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    contents = {
        "000000000.jpg": (None, "missing"),
        "000000001.jpg": (b"", "empty"),
        "000000002.jpg": (png, "not a JPEG"),
        "000000003.jpg": (data[:-900], "truncated (no end marker)"),
        "000000004.jpg": (grey, "grey (1 component)"),
        "000000005.jpg": (cmyk(), "CMYK (4 components)"),
        "000000006.jpg": (with_segment(data, exif(6)), "EXIF orientation 6"),
        "000000100.jpg": (outside, "a link that leads out of the folder of pictures"),
        "000000101.jpg": (data[:4000] + b"\xff\xd9", "damaged (Corrupt JPEG data: premature end"),
    }
    for name, (content, _) in contents.items():
        (folder / name).unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            (folder / name).symlink_to(content)
    return {name: reason for name, (_, reason) in contents.items()}


def test_every_bad_picture_of_both_splits_is_listed(own_set: Path, tmp_path: Path) -> None:
    reasons = spoil(own_set / "images")
    run = subprocess.run(
        [*TOOL, *pack_arguments(own_set, tmp_path / "out")], capture_output=True, text=True
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("bad picture: ")]
    assert len(lines) == len(reasons) == 9
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"bad picture: {name}: {reason}")
    assert run.returncode == 2
    assert "9 bad of 14 pictures" in run.stderr and "--skip-bad" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tar"))


def test_of_very_many_bad_pictures_the_first_are_shown_and_a_file_has_all(
    own_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(make_shards, "SHOWN", 3)
    names = [f"{number:09d}.jpg" for number in (0, 1, 2, 3, 100)]
    for name in names[:4]:
        (own_set / "images" / name).unlink()
    (own_set / "images" / names[4]).write_bytes(b"")
    error = refused(pack_arguments(own_set, tmp_path / "out"))
    assert error.found == "5 bad of 14 pictures, of 8 people: 4 missing, 1 empty"
    partial = tmp_path / "out.partial"
    assert capsys.readouterr().err.splitlines() == [
        *(f"bad picture: {name}: missing" for name in names[:3]),
        f"... and 2 more, all of them in {partial}/bad_pictures.txt",
    ]
    lines = (partial / "bad_pictures.txt").read_text().splitlines()
    assert [line.split(": ")[1] for line in lines] == names
    assert f"{partial} keeps what was checked" in error.next_step
    main(pack_arguments(own_set, tmp_path / "out", "--skip-bad"))
    said = capsys.readouterr().err
    assert (
        said.count("bad picture: ") == 3 and "... and 2 more, all of them in manifest.json" in said
    )
    assert not partial.exists()


def test_a_refusal_before_any_work_leaves_nothing_behind(tiny_set: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(pack_arguments(tiny_set, tmp_path / "out", "--images", tmp_path / "empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_skip_bad_packs_the_rest_and_names_what_it_left_out(own_set: Path, tmp_path: Path) -> None:
    reasons = spoil(own_set / "images")
    main(pack_arguments(own_set, tmp_path / "out", "--skip-bad"))
    data = ShardSet(tmp_path / "out" / "train")
    good = {"000000007.jpg", "000000008.jpg"}
    assert {data.facts(i)["image"] for i in range(len(data))} == good
    assert sorted(data.records()[:, 0].astype(int)) == [10, 11]
    left_out = data.manifest.left_out
    assert len(left_out) == 10
    assert left_out[0] == f"row 0: 000000000.jpg: {reasons['000000000.jpg']}"
    assert left_out[9] == f"row 9: 000000006.jpg: {reasons['000000006.jpg']}"
    assert data.manifest.max_width == 277


def test_nobody_left_is_refused(own_set: Path, tmp_path: Path) -> None:
    for number in range(100, 105):
        (own_set / "images" / f"{number:09d}.jpg").write_bytes(b"")
    error = refused(pack_arguments(own_set, tmp_path / "out", "--skip-bad"))
    assert "only bad pictures in valid" in error.found
    assert not (tmp_path / "out").exists()


def test_folder_without_any_of_the_pictures_is_named_once(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out", "--images", tmp_path)
    error = refused(arguments)
    assert error.where == str(tmp_path) and "none of the 14 pictures" in error.found
    assert "bad picture" not in capsys.readouterr().err


def test_mended_picture_is_checked_again_and_the_others_are_not(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_set / "images" / "000000003.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    refused(pack_arguments(own_set, tmp_path / "out"))
    path.write_bytes(whole)
    checked: list[str] = []

    def spy(folder: Path, picture: pictures.Picture) -> pictures.Verdict:
        checked.append(Path(picture.path).name)
        return pictures.inspect_picture(folder, picture)

    monkeypatch.setattr(make_shards, "inspect_picture", spy)
    assert main(pack_arguments(own_set, tmp_path / "out")) == 0
    assert checked == ["000000003.jpg"]


# Interruptions


def interrupt_at(number: int) -> Callable[..., Any]:
    """A write_shard that stops like Ctrl-C in the middle of that shard."""
    whole = pack_tasks.write_shard

    def write(folder: Path, shard: int, samples: Any) -> Any:
        if shard == number:
            (folder / f"{shard:05d}.tar.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return whole(folder, shard, samples)

    return write


@pytest.fixture
def interrupted(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was stopped in the second of the three training shards."""
    with monkeypatch.context() as patch:
        patch.setattr(pack_tasks, "write_shard", interrupt_at(1))
        with pytest.raises(KeyboardInterrupt):
            main(pack_arguments(tiny_set, tmp_path / "out"))
    return tmp_path / "out"


def test_interrupted_run_leaves_no_output(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not interrupted.exists()
    assert (interrupted.with_name("out.partial") / "train" / "00000.tar").exists()


def test_second_run_keeps_finished_shards_and_ends_with_the_same_bytes(
    interrupted: Path, tiny_set: Path, tiny_shards: Path
) -> None:
    kept = (interrupted.with_name("out.partial") / "train" / "00000.tar").stat()
    assert main(pack_arguments(tiny_set, interrupted)) == 0
    now = (interrupted / "train" / "00000.tar").stat()
    assert (now.st_mtime_ns, now.st_ino) == (kept.st_mtime_ns, kept.st_ino)
    assert files(interrupted) == files(tiny_shards)
    assert len(files(interrupted)) == 8
    names = sorted(path.name for path in (interrupted / "train").iterdir())
    assert len(names) == 7 and not interrupted.with_name("out.partial").exists()


def test_finished_shard_that_was_damaged_since_is_written_again(
    interrupted: Path, tiny_set: Path, tiny_shards: Path
) -> None:
    tar = interrupted.with_name("out.partial") / "train" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    assert main(pack_arguments(tiny_set, interrupted)) == 0
    assert files(interrupted) == files(tiny_shards)


def test_unfinished_work_of_another_plan_is_not_mixed_in(interrupted: Path, tiny_set: Path) -> None:
    partial = interrupted.with_name("out.partial")
    other = pack_arguments(tiny_set, interrupted, "--seed", 1)
    error = refused(other)
    assert error.where == str(partial / "train") and "--overwrite" in error.next_step
    assert (partial / "train" / "00000.tar").exists()
    assert main([*other, "--overwrite"]) == 0
    assert read_manifest(interrupted / "train").seed == 1


def test_picture_that_changed_between_the_runs_is_packed_as_it_is_now(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pack_tasks, "write_shard", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            main(pack_arguments(own_set, tmp_path / "out"))
    rng = np.random.default_rng(9)
    write_jpeg(own_set / "images" / "000000003.jpg", noise_picture(rng, 256, 256))
    main(pack_arguments(own_set, tmp_path / "out"))
    main(pack_arguments(own_set, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_folder_of_somebody_else_beside_the_output_is_left_alone(
    tiny_set: Path, tmp_path: Path
) -> None:
    own = tmp_path / "out.partial" / "train" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert refused(pack_arguments(tiny_set, tmp_path / "out", "--overwrite"))
    assert own.read_text() == "mine"


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def many_people(root: Path, tiny_set: Path, count: int) -> Path:
    """A set with one large picture and that many people in it, so that packing takes a while."""
    write_jpeg(
        root / "images" / "000000000.jpg", noise_picture(np.random.default_rng(1), 1400, 900)
    )
    (root / "annot").mkdir()
    with (
        h5py.File(tiny_set / "annot" / "train.h5") as source,
        h5py.File(root / "annot" / "train.h5", "w") as target,
    ):
        for name in source:
            target[name] = np.repeat(source[name][:1], count, axis=0)
    return root


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*TOOL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def end_group(run: subprocess.Popen) -> None:
    """End whatever a run of start() has left behind, so that a failed test leaves nothing."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    for stream in (run.stdout, run.stderr):
        stream.close()  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_killed_run_leaves_no_process_and_can_be_continued(tiny_set: Path, tmp_path: Path) -> None:
    root = many_people(tmp_path / "set", tiny_set, 120)
    arguments = pack_arguments(root, tmp_path / "out", "--splits", "train")
    arguments += ["--people-per-shard", "1", "--workers", "2"]
    run, first = start(arguments), tmp_path / "out.partial" / "train" / "00003.tar"
    wait_until(first.exists, 30)
    workers = children(run.pid)
    run.kill()
    run.wait()
    assert len(workers) >= 2
    try:
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 15)
    finally:
        end_group(run)
    assert not (tmp_path / "out").exists()
    kept = first.stat().st_mtime_ns
    assert main([*arguments, "--workers", "1"]) == 0
    assert (tmp_path / "out" / "train" / "00003.tar").stat().st_mtime_ns == kept
    assert read_manifest(tmp_path / "out" / "train").people == 120
    main([*pack_arguments(root, tmp_path / "whole", *arguments[6:]), "--workers", "1"])
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("moment", ["workers start", "shards are written"])
def test_ctrl_c_ends_with_130_and_says_how_to_continue(
    tiny_set: Path, tmp_path: Path, moment: str
) -> None:
    root = many_people(tmp_path / "set", tiny_set, 400)
    arguments = pack_arguments(root, tmp_path / "out", "--splits", "train")
    run = start([*arguments, "--people-per-shard", "1", "--workers", "2"])
    if moment == "workers start":
        wait_until(lambda: len(children(run.pid)) == 3, 30)  # and multiprocessing's own helper
        time.sleep(0.2)
    else:
        wait_until((tmp_path / "out.partial" / "train" / "00001.tar").exists, 30)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    try:
        _, errors = run.communicate(timeout=120)
    finally:
        end_group(run)
    assert run.returncode == 130
    assert "run the same command again" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


# Refusals


def test_two_packings_are_not_mixed(tiny_set: Path, tiny_shards: Path) -> None:
    before = files(tiny_shards)
    for option, value in (("--seed", 3), ("--people-per-shard", 4)):
        error = refused(pack_arguments(tiny_set, tiny_shards, option, value))
        assert error.where == str(tiny_shards / "train") and "another packing" in error.found
        assert "--overwrite" in error.next_step and "--output" in error.next_step
    assert files(tiny_shards) == before


def test_packing_again_says_so_and_does_nothing(
    tiny_set: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [path.stat().st_mtime_ns for path in sorted(tiny_shards.rglob("*"))]
    assert main(pack_arguments(tiny_set, tiny_shards)) == 0
    assert capsys.readouterr().out.count("already packed") == 2
    assert [path.stat().st_mtime_ns for path in sorted(tiny_shards.rglob("*"))] == before


def test_missing_split_is_added_to_a_packed_one(tiny_set: Path, tmp_path: Path) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out", "--splits", "valid"))
    tar = tmp_path / "out" / "valid" / "00000.tar"
    before = tar.stat().st_mtime_ns
    main(pack_arguments(tiny_set, tmp_path / "out"))
    assert tar.stat().st_mtime_ns == before
    assert read_manifest(tmp_path / "out" / "train").people == 12


def test_overwrite_replaces_only_by_a_whole_packing(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out"))
    before = files(tmp_path / "out")
    other = pack_arguments(tiny_set, tmp_path / "out", "--seed", 1, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(pack_tasks, "write_shard", interrupt_at(1))
        with pytest.raises(KeyboardInterrupt):
            main(other)
    assert files(tmp_path / "out") == before
    assert main(other) == 0
    main(pack_arguments(tiny_set, tmp_path / "new", "--seed", 1))
    assert files(tmp_path / "out") == files(tmp_path / "new") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_overwrite_spares_a_folder_that_is_no_packing(tiny_set: Path, tmp_path: Path) -> None:
    own = tmp_path / "out" / "train" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for more in ([], ["--overwrite"]):
        error = refused(pack_arguments(tiny_set, tmp_path / "out", *more))
        assert error.where == str(own.parent)
    assert own.read_text() == "mine"


def test_full_disk_is_refused_before_anything_is_written(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(path.stat().st_size for path in (tiny_set / "images").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    error = refused(pack_arguments(tiny_set, tmp_path / "out"))
    assert error.found == "0.2 MB free" and error.expected.endswith("MB for the shards")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tar"))


def test_estimate_of_the_disk_is_above_the_need_but_not_far(
    tiny_set: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = sum(path.stat().st_size for path in tiny_shards.glob("*/*") if path.suffix != ".json")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=used))
    assert refused(pack_arguments(tiny_set, tmp_path / "out")).where == str(tmp_path / "out")
    # At most a JSON's rounding a person and a tar's end a shard above it.
    most = used + 17 * 2048 + 4 * 20_480
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=most))
    assert main(pack_arguments(tiny_set, tmp_path / "out")) == 0


@pytest.mark.parametrize("below", ["", "out"])
def test_output_that_cannot_be_written_is_one_clear_error(
    tiny_set: Path, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    arguments = pack_arguments(tiny_set, tmp_path / "file" / below)
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main(arguments))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / 'file'}") and message.count("error") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_permission_is_one_clear_error(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    error = refused(pack_arguments(tiny_set, tmp_path / "out"))
    assert error.found == "Permission denied" and str(tmp_path) in error.where


def test_disk_that_fills_up_meanwhile_is_one_clear_error(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x.tar"))

    with monkeypatch.context() as patch:
        patch.setattr(pack_tasks, "write_shard", fail)
        error = refused(pack_arguments(tiny_set, tmp_path / "out"))
    assert error.found == "No space left on device" and "continues" in error.next_step
    assert main(pack_arguments(tiny_set, tmp_path / "out")) == 0


def test_two_runs_do_not_share_an_output(tiny_set: Path, tmp_path: Path) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out")
    with make_shards.locked(make_shards.parse_options(arguments)):
        assert "another run" in refused(arguments).found


def test_without_data_it_says_where_to_get_some(tmp_path: Path) -> None:
    run = subprocess.run(TOOL, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    for words in (
        "mpii_human_pose_v1.tar.gz", "human-pose.mpi-inf.mpg.de", "data/mpii/annot",
        "princeton-vl", "tools/make_synthetic.py", "--output data/shards/synthetic",
    ):  # fmt: skip
        assert words in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--annotations", "--images"])
def test_missing_folder_is_named_with_its_option(
    tiny_set: Path, tmp_path: Path, option: str
) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out", option, tmp_path / "nothing")
    error = refused(arguments)
    assert error.where == str(tmp_path / "nothing") and option in error.next_step


@pytest.mark.parametrize(
    "words", [["--seed", "-1"], ["--people-per-shard", "0"], ["--workers", "-1"],
              ["--workers", "two"], ["--splits", "test"], ["--packing", "small"]],
)  # fmt: skip
def test_option_out_of_range_is_named(tiny_set: Path, tmp_path: Path, words: list[str]) -> None:
    assert refused(pack_arguments(tiny_set, tmp_path / "out", *words)).where == words[0]
