"""tools/check_shards.py finds what was damaged, names shard and key, and leaves with 1."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest
from conftest import ROOT, noise_picture, write_jpeg
from helpers import change_manifest, update_sha256

from common.errors import InputError
from pipelines.packing import index_text
from pipelines.shard_format import file_sha256
from pipelines.shards import ShardSet
from tools.check_shards import main


@pytest.fixture
def packed(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the tiny training split that a test may damage: 12 people in 3 shards."""
    return Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))


def check(folder: Path, capsys, *more: object) -> tuple[int, list[str]]:
    code = main([str(folder), "--workers", "1", *map(str, more)])
    return code, capsys.readouterr().out.splitlines()


def overwrite(folder: Path, sample: int, component: str, data: bytes) -> None:
    """Write over a component; the manifest gets the new checksum."""
    helpers.overwrite(folder, sample, component, data)
    update_sha256(folder)


def rebuild(folder: Path, change: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> None:
    """Write the middle tar anew, its index too, and let the manifest vouch for both.

    change: may change a member, and return other content for it.
    """
    tar, index = folder / "00001.tar", folder / "00001.idx"
    with tarfile.open(tar) as old:
        members = [(m, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in members:
            data = change(member, data) or data
            member.size = len(data) if member.isreg() else 0
            new.addfile(member, io.BytesIO(data) if member.isreg() else None)
    with tarfile.open(tar) as new:
        index.write_text(index_text(new.getmembers()))
    facts = {"bytes": tar.stat().st_size, "sha256": file_sha256(tar),
             "index_sha256": file_sha256(index)}  # fmt: skip
    change_manifest(folder, lambda raw: raw["shards"][1].update(facts))


def four_and_six(manifest: dict) -> None:
    """Another count for two shards; the sum stays."""
    for shard, people in zip(manifest["shards"], (4, 6), strict=False):
        shard["people"] = people


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_whole_shards_leave_with_0(tiny_shards, capsys, decode):
    code, lines = check(tiny_shards, capsys, *decode)
    assert code == 0 and "17 people of train and valid, all is well" in lines[-1]


def test_a_split_without_a_manifest_is_a_fault_and_the_splits_are_named(
    tiny_shards, tmp_path, capsys
):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    (tmp_path / "shards" / "train" / "manifest.json").unlink()
    code, lines = check(tmp_path / "shards", capsys)
    assert code == 1
    assert f"{tmp_path / 'shards' / 'train'}: no manifest.json beside its tars" in lines
    shutil.rmtree(tmp_path / "shards" / "train")
    code, lines = check(tmp_path / "shards", capsys)
    assert code == 0 and "5 people of valid, all is well" in lines[-1]


def test_a_progress_bar_counts_the_people(packed, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main([str(packed), "--workers", "1"])
    assert re.search(r"checking train: 100%.* 12/12 ", capsys.readouterr().err)


def test_shards_of_crops_leave_with_0(tiny_set, tmp_path, capsys):
    from conftest import pack_arguments

    from tools.make_shards import main as pack

    assert pack(pack_arguments(tiny_set, tmp_path / "crops", "--packing", "crop",
                               "--person-px", 32)) == 0  # fmt: skip
    capsys.readouterr()
    assert check(tmp_path / "crops", capsys, "--decode")[0] == 0


@pytest.mark.parametrize("name", ["00001.tar", "00001.idx"])
def test_one_flipped_bit_is_found_and_the_file_is_named(packed, name, capsys):
    data = bytearray((packed / name).read_bytes())
    data[200] ^= 1
    (packed / name).write_bytes(data)
    code, lines = check(packed, capsys)
    assert code == 1
    assert f"{packed / name}: its SHA-256 is not the one in the manifest" in lines


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(lambda p: (p / "00001.tar").unlink(), "00001.tar: missing"),
     (lambda p: (p / "00002.idx").unlink(), "00002.idx: missing"),
     (lambda p: os.truncate(p / "00001.tar", 30_000), "00001.tar: its SHA-256 is not"),
     (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: a damaged manifest"),
     (lambda p: shutil.copy(p / "00000.idx", p / "00001.idx"), "00001.idx: not the index of its"),
     (lambda p: (p / "00001.idx").write_bytes(b"\xff"), "00001.idx: not the index of its tar"),
     (lambda p: (p / "00001.tar").write_bytes(b"x" * 9000), "00001.tar: no tar"),
     (lambda p: change_manifest(p, lambda raw: raw.update(max_width=399)), "size that the manif"),
     (lambda p: change_manifest(p, four_and_six), "00000.tar: 5 people, the manifest says 4")],
)  # fmt: skip
def test_damaged_files_are_named_and_leave_with_1(packed, damage, expected, capsys):
    damage(packed)
    code, lines = check(packed, capsys)
    assert code == 1 and any(expected in line for line in lines), lines


@pytest.mark.parametrize(
    ("component", "data", "expected"),
    [("f32", np.float32([2, 90, 90, np.nan]).tobytes(), "a record with values that are not finite"),
     ("f32", np.float32([2, 90, 90, -1]).tobytes(), "a record with a scale out of range"),
     ("json", b"[", "damaged JSON"),
     ("jpg", b"\x13" * 50, "picture: not a JPEG")],
)  # fmt: skip
def test_damaged_people_are_named_by_shard_and_key(packed, component, data, expected, capsys):
    overwrite(packed, 6, component, data)
    code, lines = check(packed, capsys, "--decode")
    assert code == 1
    assert any(x.startswith(f"{packed / '00001.tar'}: key 000000006: {expected}") for x in lines)


def test_json_that_tells_another_story_is_found(packed, capsys):
    text = ShardSet(packed).component(6, "json")
    told = json.loads(text)["joints"]["l_knee"]["x"]
    overwrite(packed, 6, "json", text.replace(f'"x": {told}'.encode(), b'"x": 7.0'.ljust(
        len(f'"x": {told}')), 1))  # fmt: skip
    code, lines = check(packed, capsys)
    assert code == 1
    expected = f"{packed / '00001.tar'}: key 000000006: JSON and record differ"
    assert expected in lines


def test_links_and_names_that_leave_the_folder_are_found_in_a_tar(packed, capsys):
    def change(member: tarfile.TarInfo, data: bytes) -> None:
        if member.name == "000000007.json":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        if member.name.startswith("000000008."):
            member.name = "../" + member.name

    rebuild(packed, change)
    code, lines = check(packed, capsys)
    assert code == 1
    assert any("key 000000007: '000000007.json' is no plain file" in line for line in lines)
    assert any("no plain file of a plain name" in line and "/000000008" in line for line in lines)


def test_long_names_without_end_are_no_tar(packed, capsys):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    one = header.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")
    (packed / "00001.tar").write_bytes(one * 1500)
    code, lines = check(packed, capsys)
    assert code == 1 and any(x.startswith(f"{packed / '00001.tar'}: no tar (") for x in lines)


@pytest.mark.parametrize("more", [(1, 0), (0, 1)])
def test_a_picture_of_another_size_than_the_records_is_found(more, packed, tmp_path, capsys):
    width, height = (int(x) + y for x, y in zip(ShardSet(packed).record(7)[5:7], more, strict=True))
    picture = noise_picture(np.random.default_rng(0), width, height)
    write_jpeg(tmp_path / "a.jpg", picture)
    other = (tmp_path / "a.jpg").read_bytes()
    rebuild(packed, lambda m, data: other if m.name == "000000007.jpg" else data)
    assert check(packed, capsys)[0] == 0, "pictures are looked at with --decode alone"
    code, lines = check(packed, capsys, "--decode")
    expected = f"key 000000007: a picture of {width} x {height} px, not as in the record"
    assert code == 1 and [x for x in lines if "key " in x] == [
        f"{packed / '00001.tar'}: {expected}"
    ]


@pytest.mark.parametrize(
    ("member", "size", "found"),
    [("json", 4 << 20, None), ("json", (4 << 20) + 1, "4,194,305 bytes of 'json'"),
     ("f32", (1 << 20) + 1, "1,048,577 bytes of 'f32'")],
)  # fmt: skip
def test_members_beyond_their_largest_size_are_not_read(member, size, found, packed, capsys):
    name = f"000000007.{member}"
    rebuild(packed, lambda m, data: data.ljust(size) if m.name == name else data)
    code, lines = check(packed, capsys)
    expected = [f"{packed / '00001.tar'}: key 000000007: {found}"] if found else []
    assert [x for x in lines if "key 000000007" in x] == expected and code == bool(found)


def test_members_of_other_kinds_are_not_read(packed, capsys):
    def change(member: tarfile.TarInfo, data: bytes) -> None:
        member.name = member.name.replace("000000007.json", "000000007.txt")

    rebuild(packed, change)
    code, lines = check(packed, capsys)
    assert code == 1 and any("bytes of 'txt'" in line for line in lines)


def test_faults_are_bounded_and_counted(packed, capsys):
    for sample in range(12):
        overwrite(packed, sample, "json", b"[")
    code, lines = check(packed, capsys, "--show", 3)
    assert code == 1 and len(lines) == 6
    assert lines[3] == "... and 9 more" and "12 fault(s)" in lines[4]


def test_people_who_are_there_twice_are_found(packed, capsys):
    record = ShardSet(packed).component(0, "f32")
    overwrite(packed, 11, "f32", record[:4])
    lines = check(packed, capsys)[1]
    row = np.frombuffer(record[:4], "<f4")[0]
    assert f"{packed}: row {row} more than once" in lines


def test_a_wrong_command_line_leaves_with_2(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(InputError, match=r"no manifest\.json"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match="did you mean --decode"):
        main(["--decade"])


@pytest.mark.slow
def test_workers_find_the_same_as_one_process(packed):
    overwrite(packed, 6, "json", b"[")
    done = [
        subprocess.run(
            [sys.executable, ROOT / "tools" / "check_shards.py", packed, "--workers", str(workers)],
            capture_output=True, text=True, timeout=120, check=False,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert [d.returncode for d in done] == [1, 1] and done[0].stdout == done[1].stdout
