"""A damaged picture in training is named, or replaced by a neighbour while nothing else changes."""

import errno
import gc
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    make_codec,
    make_spec,
    make_trainer,
    overwrite,
    place_of,
    sample_of_row,
    steps,
    tiny_config,
)

from common.errors import InputError
from model.checkpoint import load_checkpoint
from pipelines.bad_samples import FILE_NAME, BadSamples, SkippingLoader
from pipelines.jpeg import BadSamplesError
from pipelines.loader import Loader, RawBatch, TrainLoader, evaluation_batches
from pipelines.shards import ShardSet

LOADERS = ["opencv", "dali"]
WITH_WORKERS = [("opencv", 1), ("processes", 1), ("dali", 1)]
"""`processes`: OpenCV's workers are processes, not threads."""


@pytest.fixture(autouse=True)
def skip_without_dali(request) -> None:
    if getattr(request.node, "callspec", None) and "dali" in request.node.callspec.params.values():
        pytest.importorskip("nvidia.dali")


def damage(split: Path, sample: int, fault: bytes = b"\x13") -> None:
    """Overwrite all of a picture in its tar."""
    size = place_of(ShardSet(split), sample, "jpg").size
    overwrite(split, sample, "jpg", fault * (size // len(fault)))


def damaged(split: Path, copy: Path, *samples: int, fault: bytes = b"\x13") -> Path:
    """A copy of a split in which these pictures are overwritten."""
    shutil.copytree(split, copy)
    for sample in samples:
        damage(copy, sample, fault)
    return copy


def damage_later(split: Path, sample: int) -> None:
    """The same in mid-run, after all batches that are made ahead, so that none sees half of it."""
    time.sleep(0.3)
    damage(split, sample)


def make(name: str, workers: int = 0):
    """What SkippingLoader takes: a function that makes a loader."""
    loader, kind = ("opencv", name) if name == "processes" else (name, "threads")
    spec = make_spec("newell", loader, workers=workers, worker_kind=kind, seed=5)
    return lambda shards, first_step: TrainLoader(shards, spec, first_step)


def skip(split: Path | ShardSet, run: Path, name="opencv", workers=0, limit=5) -> SkippingLoader:
    shards = split if isinstance(split, ShardSet) else ShardSet(split)
    return SkippingLoader(make(name, workers), BadSamples(shards, run, limit))


def read(loader: Loader, batches: int = 9) -> None:
    for _ in range(batches):
        loader.next()


def next_batch(loader: Loader) -> RawBatch:
    return RawBatch(*(tensor.clone() for tensor in loader.next()))


def count_replaced(shards: ShardSet, replacement: dict[int, int], pairs: list) -> int:
    """Check that all but the damaged people are equal; returns how often these were replaced."""
    count = 0
    for whole, found in pairs:
        assert torch.equal(whole.draws_ND, found.draws_ND)
        rows = zip(whole.records_NR[:, 0], found.records_NR[:, 0], strict=True)
        for person, (row, row_found) in enumerate(rows):
            sample = sample_of_row(shards, row)
            if sample in replacement:
                assert sample_of_row(shards, row_found) == replacement[sample]
                count += 1
            else:
                parts = zip(whole, found, strict=True)
                assert all(torch.equal(a[person], b[person]) for a, b in parts)
    return count


@pytest.mark.parametrize(("name", "workers"), [("opencv", 0), *WITH_WORKERS])
@pytest.mark.parametrize("replacement", [{9: 5}, {0: 1, 5: 9, 6: 9, 7: 9, 8: 9}])
def test_a_neighbour_replaces_the_damaged_and_all_others_are_equal_to_the_bit(
    name, workers, replacement, tiny_shards, tmp_path
):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", *replacement)
    split = ShardSet(tiny_shards / "train")
    whole = make(name)(split, 0)
    skipping = skip(folder, tmp_path / "run", name, workers)
    pairs = [(next_batch(whole), next_batch(skipping)) for _ in range(9)]
    assert count_replaced(split, replacement, pairs) >= 2 * len(replacement)
    assert skipping.bad_samples.faults.keys() == replacement.keys()


def test_workers_of_a_loader_that_failed_end_at_once(tiny_shards, tmp_path):
    """If the garbage collector ended them, it would wait five seconds for each."""
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 1, 6)
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        skipping = skip(folder, tmp_path / "run", "processes", workers=1)
        for _ in range(9):
            skipping.next()
            assert len(set(multiprocessing.active_children()) - before) == 1
    finally:
        gc.enable()
    assert set(skipping.bad_samples.faults) == {1, 6}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("fault", [b"\xff\xd8\xff\xe0", b"\xff\xd8" + bytes(60)])
def test_in_stop_mode_the_error_names_shard_and_key(name, fault, tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 6, fault=fault)
    loader = make(name)(ShardSet(folder), 0)
    with pytest.raises(BadSamplesError, match="on_bad_sample skip") as caught:
        for _ in range(9):
            loader.next()
    assert caught.value.where == f"{folder / '00001.tar'}: sample 6 (key 000000006)"


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
def test_a_picture_damaged_in_mid_run_is_replaced_from_then_on(
    name, workers, tiny_shards, tmp_path
):
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    split = ShardSet(tiny_shards / "train")
    whole = make(name)(split, 0)
    skipping = skip(folder, tmp_path / "run", name, workers)
    pairs, damaged_at = [], []
    for number in range(24):  # eight passes; up to four batches are made ahead
        if number in (4, 14):  # and then the replacement itself
            damage_later(folder, {4: 6, 14: 7}[number])
        pairs.append((next_batch(whole), next_batch(skipping)))
        damaged_at.append(sorted(skipping.bad_samples.faults))
    first, second = damaged_at.index([6]), damaged_at.index([6, 7])
    assert 4 <= first < 14 <= second < 21
    assert count_replaced(split, {}, pairs[:first]) == 0
    assert count_replaced(split, {6: 7}, pairs[first:second]) >= 1
    assert count_replaced(split, {6: 8, 7: 8}, pairs[second:]) >= 2


def test_a_picture_in_a_bad_sector_is_replaced(tiny_shards, tmp_path, monkeypatch):
    split, pread = ShardSet(tiny_shards / "train"), os.pread
    place = place_of(split, 6, "jpg")

    def failing_pread(file: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{file}") == str(place.tar) and offset == place.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, count, offset)

    monkeypatch.setattr(os, "pread", failing_pread)
    skipping = skip(split, tmp_path / "run", "opencv", workers=1)
    rows = [row for _ in range(9) for row in skipping.next().records_NR[:, 0]]
    samples = [sample_of_row(split, row) for row in rows]
    assert len(samples) == 36 and 6 not in samples and samples.count(7) == 6
    assert skipping.bad_samples.faults == {6: "not readable (Input/output error)"}


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
def test_of_a_tar_truncated_in_mid_run_only_the_lost_people_are_replaced(
    name, workers, tiny_shards, tmp_path
):
    data = ShardSet(Path(shutil.copytree(tiny_shards / "train", tmp_path / "train")))
    data.records()
    loader = skip(data, tmp_path / "run", name, workers, limit=2)
    loader.next()
    place = place_of(data, 8, "jpg")
    os.truncate(place.tar, place.offset + place.size // 2)
    read(loader, 18)
    assert set(loader.bad_samples.faults) == {8, 9}
    assert all("the tar was cut off" in fault for fault in loader.bad_samples.faults.values())


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("mode", ["skip", "stop"])
def test_a_tar_that_vanishes_in_mid_run_is_named_and_stops_it_at_the_limit(
    mode, name, tiny_shards, tmp_path
):
    data = ShardSet(Path(shutil.copytree(tiny_shards / "train", tmp_path / "train")))
    run = tmp_path / "run"
    loader = skip(data, run, name, limit=2) if mode == "skip" else make(name)(data, 0)
    data.tars[1].unlink()
    with pytest.raises(InputError) as caught:
        read(loader)
    if mode == "stop":
        assert isinstance(caught.value, BadSamplesError)
        assert caught.value.where.startswith(f"{data.tars[1]}: sample ")
        assert caught.value.found.startswith("not readable (No such file or directory)")
    else:
        assert "people with damaged pictures" in caught.value.found
        lines = [
            json.loads(line) for line in (tmp_path / "run" / FILE_NAME).read_text().splitlines()
        ]
        assert {line["sample"] for line in lines} <= set(range(5, 10)) and len(lines) > 2


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_whose_picture_is_damaged_continues_and_reports_it(
    name, tiny_shards, tmp_path, capsys
):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    options = {"loader": name, "on_bad_sample": "skip"}
    config = tiny_config(data, data=options, train={"steps": 12})
    run = make_trainer(config, tmp_path / "run")
    damage(data / "train", 6)
    run.train()
    printed = " ".join(capsys.readouterr().err.split())
    person = f"{data / 'train' / '00001.tar'}: sample 6 (key 000000006)"
    assert printed.count(f"{person} is left out, a neighbour replaces it") == 1
    lines = (tmp_path / "run" / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [6]
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 12


@pytest.mark.parametrize(("name", "workers"), [("opencv", 1), ("dali", 1)])
def test_evaluation_names_the_picture_and_never_skips(name, workers, tiny_shards, tmp_path):
    data = ShardSet(damaged(tiny_shards / "valid", tmp_path / "bad", 3))
    spec = {"loader": name, "device": torch.device("cpu"), "batch_size": 2, "workers": workers}
    batches = evaluation_batches(data, np.arange(5), make_codec("none"), **spec)
    with pytest.raises(BadSamplesError, match=r"sample 3 \(key 000000003\)"):
        list(batches)


@pytest.mark.parametrize("name", LOADERS)
def test_beyond_the_limit_the_run_stops(name, tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 1, 6, 11)
    loader = skip(folder, tmp_path / "run", name, limit=2)
    with pytest.raises(InputError, match=r"3 people with damaged pictures"):
        read(loader)
    lines = (tmp_path / "run" / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000000001", "000000006", "000000011"]
    whole = ShardSet(tiny_shards / "train")
    with pytest.raises(InputError, match="remove this list") as caught:
        BadSamples(whole, tmp_path / "run", 2).merge([{}])
    Path(caught.value.where).unlink()
    assert BadSamples(whole, tmp_path / "run", 2).merge([{}]) == []


@pytest.mark.parametrize("name", LOADERS)
def test_a_tar_without_one_undamaged_picture_ends_in_an_error(name, tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 10, 11)
    loader = skip(folder, tmp_path / "run", name, limit=5)
    with pytest.raises(InputError, match="2 damaged pictures of 2"):
        read(loader)


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_run_with_damaged_people_is_the_run_that_was_not_stopped(
    name, tiny_shards, tmp_path
):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    shutil.rmtree(data / "train")
    damaged(tiny_shards / "train", data / "train", 2, 7)
    options = {"loader": name, "on_bad_sample": "skip", "preset": "princeton"}
    config = tiny_config(data, data=options, optim={"accumulate": 2})
    expected = steps(make_trainer(config, tmp_path / "whole"), 6)
    first = make_trainer(config, tmp_path / "parts")
    begun = steps(first, 3)
    first.save(["last.pt"])
    second = make_trainer(
        config, tmp_path / "parts", load_checkpoint(tmp_path / "parts" / "last.pt")
    )
    assert set(second.bad_samples.faults) == {2, 7}
    assert begun + steps(second, 3) == expected


def test_what_another_rank_found_is_reported_once_and_written(tiny_shards, tmp_path):
    data = ShardSet(tiny_shards / "train")
    ranks = [BadSamples(data, tmp_path / "run", 2, rank) for rank in (0, 1)]
    ranks[1].add(BadSamplesError.of({6: "noise"}, data.where(6), "noise"))
    assert not (tmp_path / "run" / FILE_NAME).exists(), "only the first rank writes"
    reports = [dict(rank.faults) for rank in ranks]
    sentences = [rank.merge(reports) for rank in ranks]
    assert sentences[0] == sentences[1] and len(sentences[0]) == 1
    assert sentences[0][0].startswith(data.where(6))
    assert [rank.merge(reports) for rank in ranks] == [[], []]
    assert json.loads((tmp_path / "run" / FILE_NAME).read_text())["where"] == data.where(6)
    for sample, rank in enumerate(ranks, 1):
        rank.add(BadSamplesError.of({sample: "noise"}, data.where(sample), "noise"))
    reports = [dict(rank.faults) for rank in ranks]
    for rank in ranks:  # two each, three together
        with pytest.raises(InputError, match="3 people"):
            rank.merge(reports)


def test_people_of_other_shards_in_the_list_are_ignored(tiny_shards, tmp_path):
    data = ShardSet(tiny_shards / "train")
    people = [(3, "000000003"), (4, "another"), (99, "000000099")]
    lines = [json.dumps({"sample": sample, "key": key, "fault": "x"}) for sample, key in people]
    (tmp_path / FILE_NAME).write_text("\n".join(lines))
    assert set(BadSamples(data, tmp_path, 5).faults) == {3}
