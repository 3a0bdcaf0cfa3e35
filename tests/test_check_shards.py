"""tools/check_shards.py finds what is damaged, names shard and key, and exits with 1."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest
from conftest import noise_picture, pack_arguments, write_jpeg
from helpers import change_manifest, update_sha256

from pipelines.packing import index_text
from pipelines.shard_format import file_sha256
from pipelines.shards import ShardSet
from tools import make_shards
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
    """Write the middle tar and its index anew; the manifest gets the new checksums.

    change: may change a member, and return other content for it.
    """
    tar, index = folder / "00001.tar", folder / "00001.idx"
    with tarfile.open(tar) as old:
        members = [(m, old.extractfile(m).read()) for m in old]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in members:
            data = change(member, data) or data
            member.size = len(data) if member.isreg() else 0
            new.addfile(member, io.BytesIO(data) if member.isreg() else None)
    with tarfile.open(tar) as new:
        index.write_text(index_text(new.getmembers()))
    facts = {"bytes": tar.stat().st_size, "index_sha256": file_sha256(index)}
    change_manifest(folder, lambda raw: raw["shards"][1].update(facts))
    update_sha256(folder)


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_whole_shards_exit_with_0(tiny_shards, capsys, decode):
    code, lines = check(tiny_shards, capsys, *decode)
    assert code == 0 and "17 people of train and valid, no damage found" in lines[-1]


def test_shards_of_crops_exit_with_0(tiny_set, tmp_path, capsys):
    crops = ["--packing", "crop", "--person-px", 32]
    assert make_shards.main(pack_arguments(tiny_set, tmp_path / "crops", *crops)) == 0
    capsys.readouterr()
    assert check(tmp_path / "crops", capsys, "--decode")[0] == 0


def test_a_split_without_a_manifest_is_a_fault(tiny_shards, tmp_path, capsys):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    (tmp_path / "shards" / "train" / "manifest.json").unlink()
    code, lines = check(tmp_path / "shards", capsys)
    assert code == 1
    assert f"{tmp_path / 'shards' / 'train'}: no manifest.json beside its tars" in lines


@pytest.mark.parametrize("name", ["00001.tar", "00001.idx"])
def test_one_flipped_bit_is_found_and_the_file_is_named(packed, name, capsys):
    data = bytearray((packed / name).read_bytes())
    data[200] ^= 1
    (packed / name).write_bytes(data)
    code, lines = check(packed, capsys)
    assert code == 1
    assert f"{packed / name}: its SHA-256 is not the one in the manifest" in lines


def count_4_and_6(manifest: dict) -> None:
    """Another count for two shards of five people; the sum stays."""
    for shard, people in zip(manifest["shards"], (4, 6), strict=False):
        shard["people"] = people


DAMAGES = {
    "00001.tar: missing": lambda folder: (folder / "00001.tar").unlink(),
    "00002.idx: missing": lambda folder: (folder / "00002.idx").unlink(),
    "manifest.json: a damaged": lambda folder: (folder / "manifest.json").write_text("{"),
    "00001.idx: not the index": lambda folder: (folder / "00001.idx").write_bytes(b"\xff"),
    "00001.tar: no tar": lambda folder: (folder / "00001.tar").write_bytes(b"x" * 9000),
    "size that the manif": lambda folder: change_manifest(folder, lambda x: x.update(max_width=9)),
    "00000.tar: 5 people, the manifest says 4": lambda x: change_manifest(x, count_4_and_6),
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damaged_files_are_named_and_exit_with_1(packed, expected, capsys):
    DAMAGES[expected](packed)
    code, lines = check(packed, capsys)
    assert code == 1 and any(expected in line for line in lines), lines


@pytest.mark.parametrize(
    ("component", "data", "expected"),
    [
        ("f32", np.float32([2, 90, 90, np.nan]).tobytes(), "a record with values that are not"),
        ("f32", np.float32([2, 90, 90, -1]).tobytes(), "a record with a scale out of range"),
        ("json", b"[", "damaged JSON"),
        ("json", b"[]".ljust(2000), "JSON and record differ"),
        ("jpg", b"\x13" * 50, "picture: not a JPEG"),
    ],
)
def test_damaged_people_are_named_by_shard_and_key(packed, component, data, expected, capsys):
    size = ShardSet(packed).byte_range(6, component).size
    overwrite(packed, 6, component, data.ljust(size) if component == "json" else data)
    code, lines = check(packed, capsys, "--decode")
    assert code == 1
    assert any(x.startswith(f"{packed / '00001.tar'}: key 000000006: {expected}") for x in lines)


@pytest.mark.parametrize("change", [{"row": 1e9}, {"height": 1}, {"joints": {}}, {"image": "../a"}])
def test_every_difference_of_json_and_record_is_found(packed, change, capsys):
    def differ(member: tarfile.TarInfo, data: bytes) -> bytes | None:
        is_changed = member.name == "000000006.json"
        return json.dumps({**json.loads(data), **change}).encode() if is_changed else None

    rebuild(packed, differ)
    code, lines = check(packed, capsys)
    assert code == 1
    assert f"{packed / '00001.tar'}: key 000000006: JSON and record differ" in lines


def test_links_and_names_that_leave_the_folder_are_found_in_a_tar(packed, capsys):
    def change(member: tarfile.TarInfo, data: bytes) -> None:
        if member.name == "000000007.json":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        if member.name.startswith("000000008."):
            member.name = "../" + member.name

    rebuild(packed, change)
    code, lines = check(packed, capsys)
    assert code == 1
    assert any("key 000000007: '000000007.json' is not a regular file" in line for line in lines)
    assert any("regular file with a plain name" in line and "/000000008" in line for line in lines)


def test_a_picture_of_another_size_than_the_records_is_found(packed, tmp_path, capsys):
    width, height = ShardSet(packed).record(7)[5:7].astype(int) + np.array([1, 0])
    write_jpeg(tmp_path / "a.jpg", noise_picture(np.random.default_rng(0), width, height))
    other = (tmp_path / "a.jpg").read_bytes()
    rebuild(packed, lambda m, data: other if m.name == "000000007.jpg" else data)
    assert check(packed, capsys)[0] == 0, "pictures are decoded with --decode only"
    code, lines = check(packed, capsys, "--decode")
    expected = f"key 000000007: a picture of {width} x {height} px, not as in the record"
    assert code == 1 and f"{packed / '00001.tar'}: {expected}" in lines


@pytest.mark.parametrize(
    ("member", "size", "found"),
    [("json", (4 << 20) + 1, "4,194,305 bytes of 'json'"), ("txt", 9, "9 bytes of 'txt'")],
)
def test_files_beyond_their_largest_size_are_not_read(member, size, found, packed, capsys):
    def change(member_info: tarfile.TarInfo, data: bytes) -> bytes | None:
        if member_info.name != "000000007.json":
            return None
        member_info.name = f"000000007.{member}"
        return b" " * size

    rebuild(packed, change)
    code, lines = check(packed, capsys)
    assert code == 1 and f"{packed / '00001.tar'}: key 000000007: {found}" in lines


def test_a_person_in_two_shards_is_found(packed, capsys):
    row = ShardSet(packed).component(0, "f32")[:4]
    overwrite(packed, 11, "f32", row)
    expected = f"{packed}: row {np.frombuffer(row, '<f4')[0]} more than once"
    assert expected in check(packed, capsys)[1]


@pytest.mark.slow
def test_workers_find_the_same_as_one_process(packed, capsys):
    overwrite(packed, 6, "json", b"[")
    os.truncate(packed / "00002.tar", 2000)
    assert check(packed, capsys) == check(packed, capsys, "--workers", 2)
