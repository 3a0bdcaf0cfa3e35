"""Shards: the record, the index and the manifest, against DALI's and webdataset's own tools."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from helpers import change_manifest

from common.errors import InputError
from configs.skeleton import MPII
from pipelines.annotations import People, read_annotations
from pipelines.shard_format import (
    PEOPLE,
    read_manifest,
    record_length,
    record_of,
    unpack_records,
)
from pipelines.shards import ShardSet


@pytest.fixture
def packed(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the tiny training split that a test may damage: 12 people in 3 shards."""
    return Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))


def train_people(tiny_set: Path) -> People:
    return read_annotations(tiny_set / "annot", "train")[0]


# The record


def test_record_is_little_endian_float32_in_the_documented_order(tiny_set: Path) -> None:
    people = train_people(tiny_set)
    data = record_of(people, 4, 256, 255).astype("<f4").tobytes()
    assert len(data) == 4 * (13 + 4 * 16) == 4 * record_length(16)
    values = struct.unpack("<77f", data)
    x, y = people.center[4]
    head = (4, x, y, people.scale[4], people.normalize[4], 256, 255)
    assert values[:7] == tuple(np.float32(head))
    assert values[7:13] == (1, 0, 0, 0, 1, 0)
    joint = 9
    expected = (*people.joints[4, joint], people.marked[4, joint], people.visible[4, joint])
    assert values[13 + 4 * joint : 17 + 4 * joint] == expected


def test_torch_records_unpack_as_numpy_ones_do(tiny_shards: Path) -> None:
    records = ShardSet(tiny_shards / "train").records()
    fields = unpack_records(torch.from_numpy(records.copy()))
    for ours, theirs in zip(unpack_records(records), fields, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())


# The files


def test_index_is_the_one_that_wds2idx_writes(tiny_shards: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="nvidia-dali is not installed")
    tars = sorted(tiny_shards.glob("*/*.tar"))
    assert len(tars) == 4
    for tar in tars:
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "own.idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "own.idx").read_bytes()


def test_webdataset_reads_what_shardset_reads(tiny_shards: Path) -> None:
    ours = ShardSet(tiny_shards / "train")
    urls = [str(tar) for tar in ours.tars]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(ours) == 12
    for number, sample in enumerate(samples):
        assert sample["__key__"] == f"{number:09d}"
        assert sample["jpg"] == ours.picture(number)
        assert sample["f32"] == ours.record(number).tobytes()
        assert json.loads(sample["json"])["image"] == ours.image_name(number)


def test_random_access_equals_reading_in_order(tiny_shards: Path) -> None:
    data, again = (ShardSet(tiny_shards / "train") for _ in range(2))
    in_order = [data.picture(i) for i in range(len(data))]
    assert [again.picture(i) for i in [11, 0, 7, 7, 5]] == [in_order[i] for i in [11, 0, 7, 7, 5]]


def test_shardset_can_be_sent_to_a_process_after_use(tiny_shards: Path) -> None:
    data = ShardSet(tiny_shards / "train")
    first = data.picture(0)
    assert pickle.loads(pickle.dumps(data)).picture(0) == first


def test_people_come_back_in_the_annotations_order(tiny_set: Path, tiny_shards: Path) -> None:
    wanted = train_people(tiny_set)
    data = ShardSet(tiny_shards / "train")
    people, samples = data.people()
    assert people.images == wanted.images
    np.testing.assert_array_equal(people.joints, wanted.joints)
    np.testing.assert_array_equal(people.marked, wanted.marked)
    np.testing.assert_array_equal(people.visible, wanted.visible)
    np.testing.assert_array_equal(people.index, wanted.index)
    np.testing.assert_array_equal(people.person, wanted.person)
    np.testing.assert_allclose(people.center, wanted.center, rtol=1e-7)  # float32 in the record
    assert sorted(samples) == list(range(12))
    assert data.records()[samples, 0].tolist() == list(range(12))


def test_manifest_has_the_largest_sizes_and_the_joints(tiny_shards: Path) -> None:
    manifest = read_manifest(tiny_shards / "train")
    assert [shard.people for shard in manifest.shards] == [5, 5, 2]
    assert (manifest.max_width, manifest.max_height) == (400, 310)
    assert manifest.skeleton == MPII


# Bad input


def error_of(folder: Path) -> InputError:
    """The error of opening and reading everything."""
    with pytest.raises(InputError) as caught:
        data = ShardSet(folder)
        for sample in range(len(data)):
            data.record(sample), data.picture(sample)
    assert "pack the data" in caught.value.next_step
    return caught.value


def test_folder_of_no_shards_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "nothing" / "near"  # the folder above has other tests' shards in it
    empty.mkdir(parents=True)
    assert error_of(empty).found == "no manifest.json"
    assert error_of(empty / "nothing").found == "no such folder"
    (empty / "file").touch()
    assert str(empty / "file") in error_of(empty / "file").where


@pytest.mark.parametrize("name", ["00001.idx", "00002.tar"])
def test_missing_file_is_named(packed: Path, name: str) -> None:
    (packed / name).unlink()
    error = error_of(packed)
    assert str(packed / name) in error.found and "No such file" in error.found


def test_tar_cut_off_is_named(packed: Path) -> None:
    os.truncate(packed / "00001.tar", (packed / "00001.tar").stat().st_size - 1)
    assert "the tar has" in error_of(packed).found


def test_tar_cut_off_while_it_is_read_is_named(packed: Path) -> None:
    data = ShardSet(packed)
    os.truncate(packed / "00001.tar", 2000)
    with pytest.raises(InputError, match="the tar was cut off") as caught:
        data.picture(9)
    assert str(packed / "00001.tar") in caught.value.where


# The index and the records


def test_index_with_another_checksum_is_named(packed: Path) -> None:
    (packed / "00001.idx").write_text("v1.2 5\n")
    error = error_of(packed)
    assert error.where == str(packed / "00001.idx") and "SHA-256" in error.found


def test_a_changed_byte_of_the_people_file_is_found(packed: Path) -> None:
    text = (packed / PEOPLE).read_text()
    (packed / PEOPLE).write_text(text.replace("A", "B", 1))
    assert "its SHA-256 is not" in error_of(packed).found


# The manifest


def test_manifest_of_another_version_is_named(packed: Path) -> None:
    change_manifest(packed, lambda raw: raw.update(format_version=1))
    error = error_of(packed)
    assert "format version 1" in error.found and error.expected.endswith(" 2")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(people=13),
        lambda raw: raw.update(people=0, shards=[]),
        lambda raw: raw.update(shards=None),
        lambda raw: raw["shards"][0].pop("people"),
        lambda raw: raw["shards"][0].update(surprise=1),
        lambda raw: raw["shards"].append({**raw["shards"].pop(), "tar": raw["shards"][0]["tar"]}),
        lambda raw: raw.update(max_width="400"),
        lambda raw: raw["shards"][0].update(tar="../train/00000.tar"),
        lambda raw: raw["shards"][0].update(index="/etc/passwd"),
        lambda raw: raw.pop("skeleton"),
        lambda raw: raw.update(format="another"),
        lambda raw: raw.clear(),
    ],
)
def test_impossible_manifest_is_refused(packed: Path, change: Callable[[dict], Any]) -> None:
    change_manifest(packed, change)
    assert str(packed) in error_of(packed).where


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (65 << 20)])
def test_manifest_that_is_no_manifest_is_refused(packed: Path, data: bytes) -> None:
    (packed / "manifest.json").write_bytes(data)
    assert error_of(packed).where == str(packed / "manifest.json")
