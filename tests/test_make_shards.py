"""Packing: what gets into shards, what is refused, and what an interruption leaves behind."""

import hashlib
import os
import re
import shutil
import signal
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

from common.errors import InputError
from configs.skeleton import MPII
from pipelines import packing
from pipelines.jpeg import check_jpeg
from pipelines.shard_format import read_manifest
from pipelines.shards import ShardSet
from tools import make_shards
from tools.make_shards import main


@pytest.fixture
def own_set(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that a test may change."""
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


def files(folder: Path) -> dict[str, bytes]:
    """Tars and indices of a packed set by name, with their bytes."""
    paths = [*folder.glob("*/*.tar"), *folder.glob("*/*.idx")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def error_of(arguments: list[str]) -> InputError:
    with pytest.raises(InputError) as caught:
        main(arguments)
    for folder in re.findall(r"\S+\.partial", str(caught.value)):
        assert Path(folder).exists()  # an error names no folder that was removed
    return caught.value


def unfinished(output: Path) -> Path:
    """The only folder of unfinished work of the training split."""
    (folder,) = output.with_name(output.name + ".partial").glob("train-*")
    return folder


# What is packed


def test_everybody_is_packed_once_with_the_file_and_joints_of_the_annotation(
    tiny_set: Path, tiny_shards: Path
) -> None:
    data = ShardSet(tiny_shards / "train")
    rows = data.records()[:, 0].astype(int)
    assert sorted(rows) == list(range(12))
    with h5py.File(tiny_set / "annot" / "train.h5") as file:
        for sample, row in enumerate(rows):
            name = file["imgname"][row].decode()
            assert data.image_name(sample) == name
            assert data.picture(sample) == (tiny_set / "images" / name).read_bytes()
            image = cv2.imdecode(np.frombuffer(data.picture(sample), np.uint8), cv2.IMREAD_COLOR)
            assert tuple(data.record(sample)[5:7]) == (image.shape[1], image.shape[0])
            joints = data.record(sample)[13:].reshape(16, 4)
            np.testing.assert_array_equal(joints[:, :2], file["part"][row])


def test_people_are_shuffled_by_the_seed(tiny_set: Path, tiny_shards: Path, tmp_path: Path) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out", "--seed", 1, "--splits", "train"))
    orders = [
        ShardSet(x / "train").records()[:, 0].tolist() for x in (tiny_shards, tmp_path / "out")
    ]
    assert orders[0] == np.random.default_rng([0, 0]).permutation(12).tolist()
    assert orders[1] == np.random.default_rng([1, 0]).permutation(12).tolist()


def test_bytes_do_not_depend_on_the_number_of_workers(tiny_set, tiny_shards, tmp_path) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out", "--workers", 2))
    assert len(files(tmp_path / "out")) == 8
    assert files(tmp_path / "out") == files(tiny_shards)


def test_manifest_says_how_it_was_made(tiny_set: Path, tiny_shards: Path) -> None:
    manifest, annotations = read_manifest(tiny_shards / "valid"), tiny_set / "annot" / "valid.h5"
    assert (manifest.split, manifest.people, manifest.packing) == ("valid", 5, "original")
    assert manifest.source["annotations"] == str(annotations)
    assert manifest.source["sha256"] == hashlib.sha256(annotations.read_bytes()).hexdigest()
    assert manifest.command.endswith("--people-per-shard 5 --workers 1")


def test_a_single_h5_file_is_the_split_of_its_name(tiny_set: Path, tmp_path: Path) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out", "--annotations")
    main([*arguments, str(tiny_set / "annot" / "valid.h5")])
    assert names(tmp_path / "out") == ["valid"]
    shutil.copy(tiny_set / "annot" / "train.h5", tmp_path / "mine.h5")
    arguments.append(str(tmp_path / "mine.h5"))
    assert "--splits" in error_of(arguments).next_step
    main([*arguments, "--splits", "train"])
    assert read_manifest(tmp_path / "out" / "train").people == 12


def test_one_file_is_split_by_picture_and_the_seed(own_set: Path, tmp_path: Path, capsys) -> None:
    """The nine pictures of twelve people: a quarter, two, become valid."""
    words = ["--annotations", own_set / "annot" / "train.h5", "--valid-fraction", 0.25]
    for name, seed in (("a", 0), ("b", 1)):
        main(pack_arguments(own_set, tmp_path / name, *words, "--seed", seed))
    splits = {
        name: [set(ShardSet(tmp_path / name / s).people()[0].images) for s in ("train", "valid")]
        for name in ("a", "b")
    }
    for train, valid in splits.values():
        assert (len(train), len(valid), len(train | valid)) == (7, 2, 9)
    assert splits["a"] != splits["b"]
    people = [read_manifest(tmp_path / "a" / split).people for split in ("train", "valid")]
    assert sum(people) == 12 and "are in train and in valid" not in capsys.readouterr().err
    with pytest.raises(InputError, match="its own splits"):
        main(pack_arguments(own_set, tmp_path / "c", "--valid-fraction", 0.5))


def test_a_picture_in_both_splits_is_noticed_despite_another_name(own_set, tmp_path, capsys):
    images = own_set / "images"
    shutil.copy(images / "000000002.jpg", images / "000000103.jpg")
    main(pack_arguments(own_set, tmp_path / "out"))
    error = capsys.readouterr().err
    assert "warning: 1 picture(s) are in train and in valid (the first: 000000103.jpg)" in error


def test_other_kinds_of_pictures_are_packed_as_rgb_jpegs(own_set, tmp_path, capsys) -> None:
    """PNG and grey JPEG in place of the JPEGs of 2 and 4, which three people are in."""
    images = own_set / "images"
    pictures = {
        name: cv2.imread(str(images / f"{name}.jpg")) for name in ("000000002", "000000004")
    }
    (images / "000000002.jpg").unlink()
    cv2.imwrite(str(images / "000000002.PNG"), pictures["000000002"])
    write_jpeg(images / "000000004.jpg", cv2.cvtColor(pictures["000000004"], cv2.COLOR_BGR2GRAY))
    main(pack_arguments(own_set, tmp_path / "out"))
    assert "RGB JPEGs of quality 95: 1 x PNG, 1 x grey JPEG" in capsys.readouterr().out
    data, found = ShardSet(tmp_path / "out" / "train"), {}
    for sample in range(len(data)):
        found[data.image_name(sample)] = data.picture(sample)
        assert check_jpeg(data.picture(sample)) == tuple(data.record(sample)[5:7])
    png, grey = (
        cv2.imdecode(np.frombuffer(found[f"{name}.jpg"], np.uint8), cv2.IMREAD_COLOR).astype(float)
        for name in pictures
    )
    assert np.abs(png - pictures["000000002"]).mean() < 3
    assert np.ptp(grey, axis=2).max() <= 1


# The summary


def test_the_summary_counts_people_pictures_and_joints_of_the_annotation(tiny_set, tiny_shards):
    text = make_shards.summary(tiny_shards / "train")
    with h5py.File(tiny_set / "annot" / "train.h5") as file:
        marked = file["part"][..., 0] != 0
        seen = (file["visible"][:] > 0) & marked
    assert "12 people in 3 shard(s)" in text and "pictures   9" in text
    assert "left out" not in text
    visible = seen.sum() / marked.sum()
    assert f"joints     {marked.mean():.1%} marked, {visible:.1%} of these visible" in text
    assert "never marked" not in text


def test_the_summary_names_joints_that_are_never_marked(tiny_set, tmp_path, capsys):
    annotations = Path(shutil.copytree(tiny_set / "annot", tmp_path / "annot"))
    with h5py.File(annotations / "valid.h5", "r+") as file:
        for joint in (0, 15):
            file["part"][:, joint] = 0
    words = ["--splits", "valid", "--annotations", annotations]
    main(pack_arguments(tiny_set, tmp_path / "out", *words))
    assert f"never marked: {MPII.names[0]}, {MPII.names[15]}\n" in capsys.readouterr().out


# Bad pictures


def spoil(folder: Path) -> dict[str, str]:
    """Make the pictures of eight people bad; returns the reason for each name."""
    good = (folder / "000000007.jpg").read_bytes()
    outside = folder.parent.parent / "outside.jpg"
    outside.write_bytes(good)
    reasons = {
        "000000000.jpg": "missing",
        "000000001.jpg": "empty",
        "000000003.jpg": "truncated (no end marker)",
        "000000005.jpg": "truncated (no end marker)",
        "000000100.jpg": "a link that leads out of the folder of pictures",
    }
    for name in reasons:
        (folder / name).unlink()
    (folder / "000000001.jpg").touch()
    for name in ("000000003.jpg", "000000005.jpg"):
        (folder / name).write_bytes(good[:-900])
    (folder / "000000100.jpg").symlink_to(outside)
    return reasons


def test_every_bad_picture_of_both_splits_is_listed(own_set, tmp_path, capfd) -> None:
    reasons = spoil(own_set / "images")
    error = error_of(pack_arguments(own_set, tmp_path / "out"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(reasons) == 5
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"bad picture: {name}: {reason}")
    assert "5 bad of 14 pictures" in error.found and "--skip-bad" in error.next_step
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tar"))


def test_skip_bad_packs_the_rest_and_names_what_it_left_out(own_set, tmp_path, capsys) -> None:
    reasons = spoil(own_set / "images")
    main(pack_arguments(own_set, tmp_path / "out", "--skip-bad"))
    data = ShardSet(tmp_path / "out" / "train")
    rows = [0, 1, 2, 4, 5, 6, 8]  # their pictures are 0, 0, 1, 3, 3, 3 and 5
    assert sorted(data.records()[:, 0].astype(int)) == sorted(set(range(12)) - set(rows))
    left_out = data.manifest.left_out
    assert [int(line.split()[1][:-1]) for line in left_out] == rows
    assert left_out[0] == f"row 0: 000000000.jpg: {reasons['000000000.jpg']}"
    text = capsys.readouterr().out
    assert "left out   7 people" in text and "             4 x truncated" in text


def test_nobody_left_is_an_error(own_set: Path, tmp_path: Path) -> None:
    for number in range(100, 105):
        (own_set / "images" / f"{number:09d}.jpg").write_bytes(b"")
    error = error_of(pack_arguments(own_set, tmp_path / "out", "--skip-bad"))
    assert "only bad pictures in valid" in error.found
    assert not (tmp_path / "out").exists()


def test_folder_without_any_of_the_pictures_is_named_once(tiny_set, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    error = error_of(pack_arguments(tiny_set, tmp_path / "out", "--images", tmp_path / "empty"))
    assert error.where == str(tmp_path / "empty") and "none of the 14 pictures" in error.found
    assert "bad picture" not in capsys.readouterr().err
    assert names(tmp_path) == ["empty"]


# Interruptions


def interrupt(arguments: list[str], sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack until the picture of that sample is read, and stop there as Ctrl-C does."""
    original = packing.load_picture

    def load(each: packing.Sample, crop: Any) -> bytes:
        if int(each.key) == sample:
            raise KeyboardInterrupt
        return original(each, crop)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "load_picture", load)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)


@pytest.fixture
def interrupted(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was stopped in the second of the three training shards."""
    interrupt(pack_arguments(tiny_set, tmp_path / "out"), 7, monkeypatch)
    return tmp_path / "out"


def test_second_run_keeps_finished_shards_and_ends_with_the_same_bytes(
    interrupted: Path, tiny_set: Path, tiny_shards: Path
) -> None:
    assert not interrupted.exists()
    kept = (unfinished(interrupted) / "00000.tar").stat()
    assert main(pack_arguments(tiny_set, interrupted)) == 0
    now = (interrupted / "train" / "00000.tar").stat()
    assert (now.st_mtime_ns, now.st_ino) == (kept.st_mtime_ns, kept.st_ino)
    assert files(interrupted) == files(tiny_shards)
    assert len(names(interrupted / "train")) == 8 and names(interrupted.parent) == ["out"]


def test_unfinished_work_of_other_options_is_not_mixed_in(interrupted, tiny_set, tmp_path) -> None:
    assert main(pack_arguments(tiny_set, interrupted, "--seed", 1)) == 0
    assert main(pack_arguments(tiny_set, tmp_path / "whole", "--seed", 1)) == 0
    assert files(interrupted) == files(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


def test_picture_that_changed_between_the_runs_is_packed_as_it_is_now(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(pack_arguments(own_set, tmp_path / "out"), 11, monkeypatch)
    rng = np.random.default_rng(9)
    write_jpeg(own_set / "images" / "000000003.jpg", noise_picture(rng, 256, 256))
    main(pack_arguments(own_set, tmp_path / "out"))
    main(pack_arguments(own_set, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_picture_that_changes_while_packing_is_an_error(own_set, tmp_path, monkeypatch) -> None:
    original = packing.pack_split

    def change_then_pack(*arguments: Any) -> Any:
        (own_set / "images" / "000000003.jpg").write_bytes(b"other")
        return original(*arguments)

    monkeypatch.setattr(packing, "pack_split", change_then_pack)
    error = error_of(pack_arguments(own_set, tmp_path / "out"))
    assert error.where.endswith("000000003.jpg") and "changed" in error.found


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def many_people(root: Path, tiny_set: Path, count: int) -> Path:
    """A set with one large picture and that many people in it, so that packing takes a while."""
    picture = noise_picture(np.random.default_rng(1), 1400, 900)
    write_jpeg(root / "images" / "000000000.jpg", picture)
    (root / "annot").mkdir()
    with (
        h5py.File(tiny_set / "annot" / "train.h5") as source,
        h5py.File(root / "annot" / "train.h5", "w") as target,
    ):
        for name in source:
            target[name] = np.repeat(source[name][:1], count, axis=0)
    return root


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("moment", ["workers start", "shards are written", "it is killed"])
def test_an_ended_run_leaves_no_process_and_can_be_continued(tiny_set, tmp_path, moment) -> None:
    root = many_people(tmp_path / "set", tiny_set, 200)
    more = ["--splits", "train", "--people-per-shard", 1]
    arguments = pack_arguments(root, tmp_path / "out", *more)
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *arguments, "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        if moment == "workers start":
            wait_until(lambda: len(children(run.pid)) == 3, 30)  # and multiprocessing's own helper
            time.sleep(0.2)
        else:
            wait_until(lambda: bool(list(tmp_path.glob("out.partial/train-*/00003.tar"))), 60)
        workers = children(run.pid)
        if moment == "it is killed":
            run.kill()
        else:
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, errors = run.communicate(timeout=120)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists() and "Traceback" not in errors
    if moment != "it is killed":
        assert run.returncode == 130 and "run the same command again" in errors
    assert main(arguments) == 0
    main(pack_arguments(root, tmp_path / "whole", *more))
    assert len(files(tmp_path / "out")) == 400
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# Output folders


def test_two_packings_are_not_mixed(tiny_set: Path, tiny_shards: Path) -> None:
    before = files(tiny_shards)
    for option, value in (("--seed", 3), ("--people-per-shard", 4)):
        error = error_of(pack_arguments(tiny_set, tiny_shards, option, value))
        assert error.where == str(tiny_shards / "train") and "another packing" in error.found
        assert "--overwrite" in error.next_step and "--output" in error.next_step
    assert files(tiny_shards) == before


def test_packing_again_does_nothing(tiny_set: Path, tiny_shards: Path, capsys) -> None:
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


def test_overwrite_replaces_only_by_a_complete_packing(tiny_set, tmp_path, monkeypatch) -> None:
    main(pack_arguments(tiny_set, tmp_path / "out"))
    before = files(tmp_path / "out")
    other = pack_arguments(tiny_set, tmp_path / "out", "--seed", 1, "--overwrite")
    interrupt(other, 7, monkeypatch)
    assert files(tmp_path / "out") == before
    assert main(other) == 0
    main(pack_arguments(tiny_set, tmp_path / "new", "--seed", 1))
    assert files(tmp_path / "out") == files(tmp_path / "new") != before
    assert names(tmp_path) == ["new", "out"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_is_no_packing_is_never_replaced(tiny_set, tmp_path, more) -> None:
    own = tmp_path / "out" / "train" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert error_of(pack_arguments(tiny_set, tmp_path / "out", *more)).where == str(own.parent)
    assert own.read_text() == "mine"


def test_two_runs_do_not_share_an_output(tiny_set: Path, tmp_path: Path) -> None:
    arguments = pack_arguments(tiny_set, tmp_path / "out")
    with packing.locked(make_shards.parse_options(arguments)):
        assert "another run" in error_of(arguments).found
    assert main(arguments) == 0


# The disk


def test_full_disk_is_an_error_before_any_shard_is_written(tiny_set, tmp_path, monkeypatch) -> None:
    need = sum(path.stat().st_size for path in (tiny_set / "images").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    error = error_of(pack_arguments(tiny_set, tmp_path / "out"))
    assert error.found == "0.2 MB free" and error.expected.endswith("MB for the shards")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("more", [[], ["crop"], ["raw"]])
def test_estimate_of_the_disk_is_above_the_need_but_not_far(
    tiny_set, tmp_path, monkeypatch, more
) -> None:
    usage = shutil.disk_usage(tmp_path)
    packing = ["--packing", *more, "--person-px", 48] if more else []
    arguments = pack_arguments(tiny_set, tmp_path / "out", "--splits", "train", *packing)
    main(pack_arguments(tiny_set, tmp_path / "whole", "--splits", "train", *packing))
    used = sum(len(data) for data in files(tmp_path / "whole").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=used))
    assert "MB for the shards" in error_of(arguments).expected
    # At most a crop's quality a person and a tar's end a shard above it.
    most = used + 12 * (6000 if more == ["crop"] else 2048) + 3 * 20_480
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=most))
    assert main(arguments) == 0


def test_packing_continues_after_a_full_disk(tiny_set, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x.tar"))

    arguments = pack_arguments(tiny_set, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "load_picture", fail)
        with pytest.raises(OSError, match="No space left"):
            main(arguments)
    assert main(arguments) == 0


# The command line


def test_without_data_it_says_where_to_get_some(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    advice = error_of([]).next_step
    assert "README.md" in advice and "tools/make_synthetic.py" in advice
    assert not names(tmp_path)
