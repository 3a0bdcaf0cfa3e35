"""tools/check_shards.py finds what is damaged, names shard and key, and exits with 1."""

import shutil
from pathlib import Path

import pytest
from conftest import pack_arguments
from helpers import overwrite

from tools import make_shards
from tools.check_shards import main


@pytest.fixture
def packed(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the tiny training split that a test may damage: 12 people in 3 shards."""
    return Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))


def check(folder: Path, capsys, *more: object) -> tuple[int, list[str]]:
    code = main([str(folder), "--workers", "1", *map(str, more)])
    return code, capsys.readouterr().out.splitlines()


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


DAMAGES = {
    "00001.tar: missing": lambda folder: (folder / "00001.tar").unlink(),
    "00002.idx: missing": lambda folder: (folder / "00002.idx").unlink(),
    "manifest.json: a damaged": lambda folder: (folder / "manifest.json").write_text("{"),
    "00001.idx: not the index": lambda folder: shutil.copy(
        folder / "00000.idx", folder / "00001.idx"
    ),
    "people.json: damaged": lambda folder: (folder / "people.json").write_text("{}"),
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damaged_files_are_named_and_exit_with_1(packed, expected, capsys):
    DAMAGES[expected](packed)
    code, lines = check(packed, capsys)
    assert code == 1 and any(expected in line for line in lines), lines


def test_a_damaged_picture_is_named_by_shard_and_key(packed, capsys):
    overwrite(packed, 6, "jpg", b"\x13" * 50)
    code, lines = check(packed, capsys, "--decode")
    where = f"{packed / '00001.tar'}: "
    assert code == 1 and f"{where}its SHA-256 is not the one in the manifest" in lines
    assert f"{where}sample 6 (key 000000006): picture: not a JPEG" in lines


@pytest.mark.slow
def test_workers_find_the_same_as_one_process(packed, capsys):
    overwrite(packed, 6, "jpg", b"\x13" * 50)
    overwrite(packed, 2, "jpg", b"\x13" * 50)
    found = check(packed, capsys, "--decode")
    assert len(found[1]) >= 4 and found == check(packed, capsys, "--decode", "--workers", 2)
