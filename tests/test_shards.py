"""Shards: the record, the index and the manifest, against DALI's and webdataset's own tools."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from common.errors import InputError
from configs.skeleton import MPII
from pipelines import shards
from pipelines.annotations import People, read_annotations
from pipelines.shard_format import (
    file_sha256,
    pack_record,
    read_manifest,
    record_length,
    unpack_records,
    write_manifest,
)
from pipelines.shards import ShardSet, write_shard


@pytest.fixture
def packed(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the tiny training split that a test may damage: 12 people in 3 shards."""
    return Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))


def train_people(tiny_set: Path) -> People:
    return read_annotations(tiny_set / "annot", "train")[0]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


# The record


def test_record_is_little_endian_float32_in_the_documented_order(tiny_set: Path) -> None:
    people = train_people(tiny_set)
    data = pack_record(people, 4, 256, 255).tobytes()
    assert len(data) == 4 * (13 + 4 * 16) == 4 * record_length(16)
    values = struct.unpack("<77f", data)
    x, y = people.center[4]
    head = (4, x, y, people.scale[4], people.normalize[4], 256, 255)
    assert values[:7] == tuple(np.float32(head))
    assert values[7:13] == (1, 0, 0, 0, 1, 0)
    joint = 9
    expected = (*people.joints[4, joint], people.marked[4, joint], people.visible[4, joint])
    assert values[13 + 4 * joint : 17 + 4 * joint] == expected


def test_unpacked_records_give_the_people_back(tiny_set: Path) -> None:
    people = train_people(tiny_set)
    records = np.stack([pack_record(people, row, 100 + row, 50) for row in range(people.count)])
    fields = unpack_records(records)
    np.testing.assert_array_equal(fields.row_N, np.arange(12))
    np.testing.assert_array_equal(fields.center_N2, people.center.astype(np.float32))
    np.testing.assert_array_equal(fields.scale_N, people.scale.astype(np.float32))
    np.testing.assert_array_equal(fields.normalize_N, people.normalize.astype(np.float32))
    np.testing.assert_array_equal(fields.size_N2, [(100 + row, 50) for row in range(12)])
    np.testing.assert_array_equal(fields.joints_NJ2, people.joints)  # whole numbers in the tiny set
    np.testing.assert_array_equal(fields.marked_NJ, people.marked)
    np.testing.assert_array_equal(fields.visible_NJ, people.visible)
    assert 0 < people.visible.sum() < people.marked.sum() < people.marked.size


def test_torch_records_unpack_as_numpy_ones_do(tiny_shards: Path) -> None:
    torch = pytest.importorskip("torch")
    records = ShardSet(tiny_shards / "train").records()
    for ours, theirs in zip(
        unpack_records(records), unpack_records(torch.from_numpy(records.copy())), strict=True
    ):
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
        assert sample["jpg"] == ours.jpeg(number)
        assert sample["f32"] == ours.record(number).tobytes()
        assert json.loads(sample["json"]) == ours.facts(number)


def test_json_says_what_the_record_holds(tiny_shards: Path) -> None:
    data = ShardSet(tiny_shards / "train")
    fields = unpack_records(data.records())
    for sample in range(12):
        facts = data.facts(sample)
        assert facts["row"] == fields.row_N[sample]
        assert np.float32(facts["scale"]) == fields.scale_N[sample]
        assert (facts["width"], facts["height"]) == tuple(fields.size_N2[sample])
        assert list(facts["joints"]) == list(MPII.names)
        joints = [
            [joint["x"], joint["y"], joint["marked"], joint["visible"]]
            for joint in facts["joints"].values()
        ]
        np.testing.assert_array_equal(data.record(sample)[13:].reshape(16, 4), joints)


def test_random_access_equals_reading_in_order(tiny_shards: Path) -> None:
    data = ShardSet(tiny_shards / "train")
    in_order = [(data.jpeg(i), data.record(i).tobytes()) for i in range(len(data))]
    again = ShardSet(tiny_shards / "train")
    for sample in [11, 0, 7, 7, 5, 10, 4]:
        assert (again.jpeg(sample), again.record(sample).tobytes()) == in_order[sample]


def test_shardset_can_be_sent_to_a_process_after_use(tiny_shards: Path) -> None:
    data = ShardSet(tiny_shards / "train")
    first = data.jpeg(0)
    assert pickle.loads(pickle.dumps(data)).jpeg(0) == first


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
    assert [data.facts(sample)["row"] for sample in samples] == list(range(12))


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    samples = [(f"{i:09d}", bytes(8), b"\xff\xd8" + bytes(i * 300), b"{}") for i in range(4)]
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard = write_shard(tmp_path / name, 3, iter(samples))
        written.append((shard, (tmp_path / name / "00003.tar").read_bytes()))
    assert written[0] == written[1]
    assert (shard.people, shard.bytes) == (4, len(written[0][1]))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00003.idx", "00003.tar"]


def test_manifest_digests_are_those_of_the_files(tiny_shards: Path) -> None:
    manifest = read_manifest(tiny_shards / "train")
    assert [shard.people for shard in manifest.shards] == [5, 5, 2]
    for shard in manifest.shards:
        assert file_sha256(tiny_shards / "train" / shard.tar) == shard.sha256
        assert file_sha256(tiny_shards / "train" / shard.index) == shard.index_sha256
    assert (manifest.max_width, manifest.max_height) == (400, 310)
    assert manifest.skeleton == MPII


# Bad input


def error_of(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        data = ShardSet(folder)
        for sample in range(len(data)):
            data.record(sample), data.jpeg(sample), data.facts(sample)
    assert "pack the data" in caught.value.next_step
    return caught.value


def test_whole_shards_raise_nothing(packed: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        error_of(packed)


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
    assert (error.where, error.found) == (str(packed / name), "missing")


def test_index_whose_offsets_are_swapped_is_named(packed: Path) -> None:
    header, first, second, *rest = (packed / "00001.idx").read_text().splitlines()
    (packed / "00001.idx").write_text("\n".join([header, second, first, *rest]) + "\n")
    assert "no tar of these sizes" in error_of(packed).found


def rewrite_index(packed: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of the middle shard's index, and let the manifest vouch for them."""
    index = packed / "00001.idx"
    index.write_text("\n".join(change(index.read_text().splitlines())) + "\n")
    digest = file_sha256(index)
    change_manifest(packed, lambda raw: raw["shards"][1].update(index_sha256=digest))


def test_index_whose_hash_alone_is_another_is_named(packed: Path) -> None:
    change_manifest(packed, lambda raw: raw["shards"][1].update(index_sha256="0" * 64))
    assert "SHA-256" in error_of(packed).found


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("000000006.jpg", "000000007.jpg", "of one key"),
     ("000000006.", "../../006.", "of one key"),
     (" 308 000000006", " 307 000000006", "no tar of these sizes|a record of"),
     (" 308 000000006", f" {10**15} 000000006", "sizes out of range"),
     ("000000006.", "000000002.", "the key 000000002 twice")],
)  # fmt: skip
def test_index_that_lies_is_refused_even_if_the_manifest_vouches_for_it(
    packed: Path, old: str, new: str, found: str
) -> None:
    rewrite_index(packed, lambda lines: [line.replace(old, new) for line in lines])
    with pytest.raises(InputError, match=found):
        ShardSet(packed)


def test_keys_that_are_not_in_the_tar_are_found_by_its_headers(packed: Path) -> None:
    rewrite_index(packed, lambda lines: [x.replace("000000007.", "000000099.") for x in lines])
    with pytest.raises(InputError, match="something else where the index has the f32") as caught:
        ShardSet(packed).records()
    assert caught.value.where == f"{packed / '00001.tar'}: sample 7 (key 000000099)"


def test_picture_of_another_key_behind_a_record_is_found(packed: Path) -> None:
    tar = packed / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"000000008.jpg\0", b"000000009.jpg\0", 1))
    with pytest.raises(InputError, match=r"the jpg of this key") as caught:
        ShardSet(packed).records()
    assert "key 000000008" in caught.value.where


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [(0, 3, "repeated or impossible row"), (0, 0.5, "repeated or impossible row"), (1, np.inf, "not finite"),
     (3, 0, "scale out of range"), (4, -1, "normalize"), (5, 0, "size that the manifest"),
     (6, 311, "size that the manifest"), (7, 0, "affine without an inverse"),
     (13, 1e9, "joint or centre out of range"), (16, 0.5, "marks other than 0 and 1")],
)  # fmt: skip
def test_record_out_of_range_is_named_by_shard_and_key(packed, field, value, found) -> None:
    data = ShardSet(packed)
    record = data.record(6).copy()
    record[field] = value
    with (packed / "00001.tar").open("r+b") as file:
        file.seek(int(data._extents.offset["f32"][6]))
        file.write(record.tobytes())
    with pytest.raises(InputError, match=found) as caught:
        ShardSet(packed).records()
    assert caught.value.where.startswith(str(packed))
    if field:  # of two people with one row, either may be the wrong one
        assert caught.value.where == f"{packed / '00001.tar'}: sample 6 (key 000000006)"


def test_index_of_a_tar_whose_end_is_gone_is_refused_even_if_the_manifest_vouches_for_it(
    packed: Path,
) -> None:
    tar, data = packed / "00001.tar", ShardSet(packed)
    end = int(data._extents.offset["json"][9])  # the last file of this tar
    whole = end + int(data._extents.size["json"][9])

    def cut(size: int) -> None:
        os.truncate(tar, size)
        change_manifest(packed, lambda raw: raw["shards"][1].update(bytes=size))

    cut(end + 512 * -(-(whole - end) // 512))  # without the two empty blocks at a tar's end
    assert len(ShardSet(packed).records()) == 12
    cut(end)
    with pytest.raises(InputError, match="no tar of these sizes") as caught:
        ShardSet(packed)
    assert caught.value.where == str(packed / "00001.idx")


@pytest.mark.parametrize("part", ["f32", "jpg"])
def test_header_that_gives_another_size_than_the_index_is_found(packed: Path, part: str) -> None:
    data = ShardSet(packed)
    place, size = (int(values[part][8]) for values in (data._extents.offset, data._extents.size))
    with (packed / "00001.tar").open("r+b") as file:
        file.seek(place - 512 + 124)  # where a tar's header has the size, in octal
        assert file.read(12) == b"%011o\0" % size
        file.seek(-12, 1)
        file.write(b"%011o\0" % (size - 1))
    with pytest.raises(InputError, match=f"the index has the {part} of this key") as caught:
        ShardSet(packed).records()
    assert "key 000000008" in caught.value.where


def test_index_of_another_tar_is_named(packed: Path) -> None:
    for name in ("00000.idx", "00002.idx"):  # of as many people, and of fewer
        copy = Path(shutil.copytree(packed, packed.with_name(name)))
        shutil.copy(packed / name, copy / "00001.idx")
        assert str(copy) in error_of(copy).where


@pytest.mark.parametrize("part", [0, 0.3, 0.95])
def test_tar_cut_off_is_named(packed: Path, part: float) -> None:
    data = (packed / "00001.tar").read_bytes()
    (packed / "00001.tar").write_bytes(data[: int(len(data) * part)])
    error = error_of(packed)
    assert "00001.tar has" in error.found


def test_tar_cut_off_while_it_is_read_is_named(packed: Path) -> None:
    data = ShardSet(packed)
    tar = packed / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(InputError, match="the tar was cut off") as caught:
        data.jpeg(9)
    assert str(tar) in caught.value.where


@pytest.mark.parametrize(
    "text",
    ["", "\n", "v1.2 5\n", "v1.1 5\nf32", "\x00\x01", "v1.2 5\n" + "f32 a b c\n" * 5,
     "v1.2 5\n" + "f32 0 9 a jpg 0 9 b json 99999999 9 c\n" * 5,
     "v1.2 5\n" + "f32 -9 9 a jpg 0 9 b json 0 9 c\n" * 5,
     "v1.2 5\n" + f"f32 {10**30} 9 a jpg 0 9 b json 0 9 c\n" * 5],
)  # fmt: skip
def test_damaged_index_is_named(packed: Path, text: str) -> None:
    (packed / "00001.idx").write_text(text)
    assert error_of(packed).where == str(packed / "00001.idx")


def test_index_that_is_no_text_is_named(packed: Path) -> None:
    (packed / "00001.idx").write_bytes(b"\xff\xfe\xc3")
    assert error_of(packed).where == str(packed / "00001.idx")


def test_manifest_of_another_version_is_named(packed: Path) -> None:
    change_manifest(packed, lambda raw: raw.update(format_version=2))
    error = error_of(packed)
    assert (error.found, error.expected) == ("format version 2", "format version 1")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(people=13),
        lambda raw: raw.update(joints=17),
        lambda raw: raw.update(joints="many"),
        lambda raw: raw.update(people=0, shards=[]),
        lambda raw: raw.update(shards=None),
        lambda raw: raw["shards"].pop(),
        lambda raw: raw["shards"][0].pop("people"),
        lambda raw: raw["shards"][0].update(people="5"),
        lambda raw: raw["shards"][0].update(people=-5, bytes=-1),
        lambda raw: raw["shards"][0].update(bytes=7),
        lambda raw: raw["shards"][0].update(surprise=1),
        lambda raw: raw["shards"][0].update(tar=3),
        lambda raw: raw["shards"][0].update(people=True),
        lambda raw: raw["shards"].append({**raw["shards"].pop(), "tar": raw["shards"][0]["tar"]}),
        lambda raw: raw.update(max_width=10**9, max_height=0),
        lambda raw: raw.update(max_height="310"),
        lambda raw: raw.update(packing="crop"),
        lambda raw: raw.update(crop={"preset": "x", "reach": 1, "person_px": 3, "quality": 4}),
        lambda raw: raw.update(joints=10**30),
        lambda raw: raw.update(left_out=7),
        lambda raw: raw["shards"][0].update(tar="../train/00000.tar"),
        lambda raw: raw["shards"][0].update(index="/etc/passwd"),
        lambda raw: raw["shards"][0].update(tar=""),
        lambda raw: raw["shards"][0].update(tar="9" * 300 + ".tar"),
        lambda raw: raw["shards"][0].update(tar=".."),
        lambda raw: raw["shards"][0].update(tar="a\0b"),
        lambda raw: raw.pop("skeleton"),
        lambda raw: raw["skeleton"]["names"].pop(),
        lambda raw: raw["skeleton"].update(flip_pairs=[[0]]),
        lambda raw: raw["skeleton"].update(flip_pairs=[[0, 99]]),
        lambda raw: raw.update(format="another"),
        lambda raw: raw.clear(),
    ],
)
def test_manifest_that_lies_is_refused(packed: Path, change: Callable[[dict], Any]) -> None:
    change_manifest(packed, change)
    assert str(packed) in error_of(packed).where


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b" " * (65 << 20)]
)
def test_manifest_that_is_no_manifest_is_refused(packed: Path, data: bytes) -> None:
    (packed / "manifest.json").write_bytes(data)
    assert error_of(packed).where == str(packed / "manifest.json")


def test_damaged_records_and_facts_are_named(tiny_shards, tmp_path):
    """What lies inside the tar, with sizes and indices as they were."""
    import shutil

    for component, method in (("f32", "records"), ("json", "people")):
        copy = shutil.copytree(tiny_shards / "valid", tmp_path / component)
        split = ShardSet(copy)
        offset = int(split._extents.offset[component][3])
        size = int(split._extents.size[component][3])
        split.tars[0].chmod(0o644)
        with split.tars[0].open("r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * size)  # as float32: not a number
        with pytest.raises(InputError, match="sample 3"):
            getattr(ShardSet(copy), method)()


@pytest.mark.slow
def test_what_is_wrong_with_one_of_22000_people_is_found(tiny_shards: Path, tmp_path: Path) -> None:
    small, folder = ShardSet(tiny_shards / "train"), tmp_path / "train"
    folder.mkdir()
    parts = small.record(7).copy(), small.jpeg(7), small._component(7, "json")

    def samples(first: int) -> Iterator[tuple[str, bytes, bytes, bytes]]:
        record, jpeg, text = parts
        for row in range(first, first + 1000):
            record[0] = row
            yield f"{row:09d}", record.tobytes(), jpeg, text

    made = tuple(shards.write_shard(folder, n, samples(1000 * n)) for n in range(22))
    write_manifest(folder, dataclasses.replace(small.manifest, people=22_000, shards=made))
    assert len(ShardSet(folder).records()) == 22_000
    tar = folder / "00021.tar"
    tar.write_bytes(tar.read_bytes().replace(b"000021990.jpg\0", b"000021991.jpg\0", 1))
    with pytest.raises(InputError, match="key 000021990"):
        ShardSet(folder).records()


@pytest.mark.parametrize(
    ("given", "advice"),
    [("above/tiny/train/train",
      "give the folder above one of these splits: {0}/tiny/train"),
     ("above", "give the folder above one of these splits: {0}/tiny/train"),
     ("above/train", "give the folder above one of these splits: {0}/tiny/train"),
     ("above/tiny/valid", "give the folder above one of these splits: {0}/tiny/train"),
     ("nowhere/train", "pack the data first: python tools/make_shards.py --help")],
)  # fmt: skip
def test_a_folder_too_high_or_too_low_is_told_with_the_right_one(
    tiny_shards, tmp_path, given, advice
):
    shutil.copytree(tiny_shards / "train", tmp_path / "above" / "tiny" / "train")
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path / given)
    assert caught.value.next_step == advice.format(tmp_path / "above")
