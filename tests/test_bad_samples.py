"""A damaged picture met in training: named, or replaced by a neighbour and nothing else changed."""

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
from helpers import make_codec, make_trainer, steps, tiny_config

from common.errors import InputError
from model import checkpoint
from pipelines.augment import PRESETS
from pipelines.bad_samples import LIST, BadSamples, SkippingLoader
from pipelines.jpeg import BadSamplesError
from pipelines.loader import Loader, LoaderSpec, RawBatch, evaluation_batches, train_loader
from pipelines.shards import ShardSet

LOADERS = ["opencv", "dali"]
MIDDLE = range(5, 10)
"""The samples of the tiny set's second tar."""


@pytest.fixture(autouse=True)
def loader_is_there(request) -> None:
    if getattr(request.node, "callspec", None) and "dali" in request.node.callspec.params.values():
        pytest.importorskip("nvidia.dali")


def damaged(split: Path, copy: Path, *samples: int, fault: bytes = b"\x13") -> Path:
    """A copy of a split in which these pictures are noise from their first byte to their last."""
    shutil.copytree(split, copy)
    for sample in samples:
        overwrite(copy, sample, fault)
    return copy


def rot(split: Path, sample: int, fault: bytes = b"\x13", part: str = "jpg") -> None:
    """The same in mid-run, once all batches are made that are made ahead: none sees half of it."""
    time.sleep(0.3)
    overwrite(split, sample, fault, part)


def overwrite(split: Path, sample: int, fault: bytes, part: str = "jpg") -> None:
    """A picture or a record, where it lies: whoever has the tar open or mapped sees it."""
    place = ShardSet(split).place(sample, part)
    with place.tar.open("r+b", buffering=0) as file:
        file.seek(place.offset)
        file.write(fault * (place.size // len(fault)))


def loader_of(name: str, workers: int = 0):
    spec = LoaderSpec(
        loader=name, device=torch.device("cpu"), preset=PRESETS["newell"], input_px=64,
        batch_size=4, workers=workers, shuffle_buffer=6, seed=5,
    )  # fmt: skip

    def make(shards: ShardSet, first_step: int, state: bytes):
        return train_loader(shards, spec, first_step, state)

    return make


def whole_and_skipping(
    name: str, shards: Path, bad: Path, run: Path, count: int = 9, workers: int = 0
) -> tuple[list[RawBatch], list[RawBatch], BadSamples]:
    """Batches of whole shards and of damaged ones with stand-ins."""
    whole = loader_of(name)(ShardSet(shards), 0, b"")
    bad_samples = BadSamples(ShardSet(bad), run, 5)
    skipping = SkippingLoader(loader_of(name, workers), bad_samples, 0, b"")
    pairs = [(clone(whole.next()), clone(skipping.next())) for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], bad_samples


def clone(raw: RawBatch) -> RawBatch:
    return RawBatch(*(tensor.clone() for tensor in raw))


def compare(
    shards: ShardSet, stand_in: dict[int, int], whole: list[RawBatch], found: list[RawBatch]
) -> int:
    """Everybody but the damaged is the same to the bit; how often a stand-in was given."""
    row = {sample: float(shards.record(sample)[0]) for sample in range(len(shards))}
    stand_in_row = {row[bad]: row[good] for bad, good in stand_in.items()}
    given = 0
    for a, b in zip(whole, found, strict=True):
        assert torch.equal(a.draws_ND, b.draws_ND)
        for person in range(4):
            wanted = a.records_NR[person, 0].item()
            if wanted in stand_in_row:
                assert b.records_NR[person, 0].item() == stand_in_row[wanted]
                given += 1
            else:
                assert all(torch.equal(x[person], y[person]) for x, y in zip(a, b, strict=True))
    return given


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("bad", "stand_in"),
    [([6], {6: 7}), ([9], {9: 5}),  # the last of its tar: the first stands in
     ([6, 7], {6: 8, 7: 8}), ([0, 5, 6, 7, 8], {0: 1, 5: 9, 6: 9, 7: 9, 8: 9})],
)  # fmt: skip
def test_a_neighbour_stands_in_and_all_others_are_the_very_same(
    name, bad, stand_in, tiny_shards, tmp_path
):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", *bad)
    whole, found, bad_samples = whole_and_skipping(
        name, tiny_shards / "train", folder, tmp_path / "run"
    )
    assert compare(ShardSet(tiny_shards / "train"), stand_in, whole, found) >= 2 * len(bad)
    assert set(bad_samples.faults) == set(bad)


def test_worker_processes_give_the_same_stand_ins(tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 3)
    whole, found, _ = whole_and_skipping(
        "opencv", tiny_shards / "train", folder, tmp_path / "run", workers=1
    )
    assert compare(ShardSet(tiny_shards / "train"), {3: 4}, whole, found) >= 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("name", LOADERS)
def test_a_picture_may_turn_out_rotten_while_the_disk_is_full(name, tiny_shards, tmp_path):
    folder, run = damaged(tiny_shards / "train", tmp_path / "bad", 6), tmp_path / "run"

    def fill(file: str) -> None:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / f"{file}.tmp").symlink_to("/dev/full")

    fill(LIST)
    fill("indices_0/00001.idx")
    whole, found, bad_samples = whole_and_skipping(name, tiny_shards / "train", folder, run)
    assert compare(ShardSet(tiny_shards / "train"), {6: 7}, whole, found) >= 2
    assert not (run / LIST).exists() and not (run / "indices_0" / "00001.idx").exists()
    said = []
    for _ in range(2):
        fill(LIST)
        said += bad_samples.learn([bad_samples.report()])
    assert len(said) == 2 and "left out" in said[0]
    assert "No space left" in said[1] and said[1].endswith("bad_samples.jsonl'; training goes on")
    assert bad_samples.learn([bad_samples.report()]) == [], "there is room again"
    assert set(BadSamples(ShardSet(folder), run, 5).faults) == {6}


def test_workers_of_a_loader_that_failed_end_at_once(tiny_shards, tmp_path):
    """Found by the collector instead, each of them would keep the run waiting for five seconds."""
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 1, 6)
    before = set(multiprocessing.active_children())
    bad_samples = BadSamples(ShardSet(folder), tmp_path / "run", 5)
    gc.disable()
    try:
        skipping = SkippingLoader(loader_of("opencv", workers=1), bad_samples, 0, b"")
        for _ in range(9):
            skipping.next()
            assert len(set(multiprocessing.active_children()) - before) == 1
    finally:
        gc.enable()
    assert set(bad_samples.faults) == {1, 6}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("fault", [b"\x13", b"\xff\xd8\xff\xe0", b"\xff\xd8" + bytes(60)])
def test_without_leave_to_skip_the_error_names_shard_and_key(name, fault, tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 6, fault=fault)
    loader = loader_of(name)(ShardSet(folder), 0, b"")
    with pytest.raises(BadSamplesError, match="on_bad_sample skip") as caught:
        for _ in range(9):
            loader.next()
    assert caught.value.where == f"{folder / '00001.tar'}: sample 6 (key 000000006)"


WITH_WORKERS = [("opencv", 0), ("opencv", 1), ("dali", 1)]


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
def test_a_neighbour_stands_in_from_when_a_picture_rots_in_mid_run(
    name, workers, tiny_shards, tmp_path
):
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    before = ShardSet(tiny_shards / "train")
    bad_samples = BadSamples(ShardSet(folder), tmp_path / "run", 5)
    whole = loader_of(name)(before, 0, b"")
    skipping = SkippingLoader(loader_of(name, workers), bad_samples, 0, b"")
    pairs, known = [], []
    for number in range(24):  # eight passes; up to four batches are made ahead
        if number in (4, 14):  # and then the stand-in itself
            rot(folder, {4: 6, 14: 7}[number])
        pairs.append((clone(whole.next()), clone(skipping.next())))
        known.append(sorted(bad_samples.faults))
    first, second = known.index([6]), known.index([6, 7])
    assert 4 <= first < 14 <= second < 21
    for stand_in, part in [
        ({}, pairs[:first]), ({6: 7}, pairs[first:second]), ({6: 8, 7: 8}, pairs[second:])
    ]:  # fmt: skip
        given = compare(before, stand_in, [a for a, _ in part], [b for _, b in part])
        assert given >= len(stand_in)


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
def test_without_leave_to_skip_a_picture_that_rots_in_mid_run_is_named(
    name, workers, tiny_shards, tmp_path
):
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    loader = loader_of(name, workers)(ShardSet(folder), 0, b"")
    loader.next()
    rot(folder, 6)
    with pytest.raises(BadSamplesError, match="on_bad_sample skip") as caught:
        for _ in range(9):
            loader.next()
    assert caught.value.where == f"{folder / '00001.tar'}: sample 6 (key 000000006)"


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
@pytest.mark.parametrize("fault", [b"\x13", b"\0"])
def test_a_record_that_rots_in_mid_run_changes_nothing_or_ends_the_run_with_its_name(
    fault, name, workers, tiny_shards, tmp_path
):
    """OpenCV's path has read all records at the start; DALI reads them from the tar."""
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    whole = loader_of(name)(ShardSet(tiny_shards / "train"), 0, b"")
    data = ShardSet(folder)
    data.records()
    loader = loader_of(name, workers)(data, 0, b"")
    loader.next(), whole.next()
    rot(folder, 6, fault, "f32")
    if name == "opencv":
        for _ in range(9):
            assert all(map(torch.equal, loader.next(), whole.next()))
    elif fault == b"\x13":
        with pytest.raises(BadSamplesError, match="its record has changed") as caught:
            for _ in range(9):
                loader.next()
        assert caught.value.where == f"{folder / '00001.tar'}: sample 6 (key 000000006)"
        bad_samples = BadSamples(data, tmp_path / "run", 5)
        skipping = SkippingLoader(loader_of(name), bad_samples, 0, b"")
        assert all(skipping.next().input_from_image_N23.isfinite().all() for _ in range(9))
        assert set(bad_samples.faults) == {6}
    else:  # crops of no numbers; the loss tells, and who is asked for names finds the record
        assert not all(loader.next().input_from_image_N23.isfinite().all() for _ in range(9))
        with pytest.raises(InputError, match="sample 6"):
            data.records()


def place_of(data: ShardSet, sample: int) -> tuple[int, int]:
    """First byte and size of a picture in its tar."""
    place = data.place(sample, "jpg")
    return place.offset, place.size


@pytest.fixture
def bad_sector(tiny_shards, monkeypatch) -> ShardSet:
    """The tiny set on a disk that cannot read the picture of sample 6."""
    data, real = ShardSet(tiny_shards / "train"), os.pread
    start, _ = place_of(data, 6)

    def pread(file: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{file}") == str(data.tars[1]) and start == offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_for_a_picture_in_a_bad_sector_a_neighbour_stands_in(workers, bad_sector, tmp_path):
    bad_samples = BadSamples(bad_sector, tmp_path / "run", 5)
    skipping = SkippingLoader(loader_of("opencv", workers), bad_samples, 0, b"")
    rows = [row for _ in range(9) for row in skipping.next().records_NR[:, 0].tolist()]
    row = {sample: float(bad_sector.record(sample)[0]) for sample in (6, 7)}
    assert len(rows) == 36 and row[6] not in rows and rows.count(row[7]) == 6
    assert bad_samples.faults == {6: "not readable (Input/output error)"}


@pytest.mark.parametrize("workers", [0, 1])
def test_without_leave_to_skip_a_picture_in_a_bad_sector_is_named(workers, bad_sector):
    loader = loader_of("opencv", workers)(bad_sector, 0, b"")
    with pytest.raises(BadSamplesError, match="Input/output error") as caught:
        for _ in range(9):
            loader.next()
    assert caught.value.where == f"{bad_sector.tars[1]}: sample 6 (key 000000006)"


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
@pytest.mark.parametrize("leave", ["skip", "stop"])
def test_of_a_tar_cut_off_in_mid_run_only_those_are_left_out_whose_bytes_are_gone(
    leave, name, workers, tiny_shards, tmp_path
):
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    data = ShardSet(folder)
    data.records()
    bad_samples = BadSamples(data, tmp_path / "run", 2)
    make = loader_of(name, workers)
    loader = SkippingLoader(make, bad_samples, 0, b"") if leave == "skip" else make(data, 0, b"")
    loader.next()
    start, size = place_of(data, 8)
    os.truncate(data.tars[1], start + size // 2)
    if leave == "skip":
        for _ in range(18):
            loader.next()
        assert set(bad_samples.faults) == {8, 9}
        assert all("the tar was cut off" in fault for fault in bad_samples.faults.values())
        return
    with pytest.raises(BadSamplesError, match=r"key 00000000[89].*\n.*the tar was cut off"):
        for _ in range(18):
            loader.next()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("leave", ["skip", "stop"])
def test_a_tar_that_vanishes_in_mid_run_is_named_and_stops_it_at_the_limit(
    leave, name, tiny_shards, tmp_path
):
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    data = ShardSet(folder)
    loader: Loader = loader_of(name)(data, 0, b"")
    if leave == "skip":
        bad_samples = BadSamples(data, tmp_path / "run", 2)
        loader = SkippingLoader(loader_of(name), bad_samples, 0, b"")
    data.tars[1].unlink()
    with pytest.raises(InputError) as caught:
        for _ in range(9):
            loader.next()
    if leave == "stop":
        assert isinstance(caught.value, BadSamplesError)
        assert caught.value.where.startswith(f"{data.tars[1]}: sample ")
        assert caught.value.found.startswith("not readable (No such file or directory)")
    else:
        assert "people with damaged pictures" in caught.value.found
        lines = [json.loads(line) for line in (tmp_path / "run" / LIST).read_text().splitlines()]
        assert {line["sample"] for line in lines} <= set(MIDDLE) and len(lines) > 2


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("leave", ["skip", "stop"])
def test_a_run_whose_picture_rots_goes_on_and_says_so_or_ends_with_its_name(
    leave, name, tiny_shards, tmp_path, capsys
):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    config = tiny_config(
        data, data={"loader": name, "on_bad_sample": leave}, train={"steps": 12}
    )  # fmt: skip
    run = make_trainer(config, tmp_path / "run")
    real = run.train_step.run

    def step(loader, number, totals):
        if number == 4:
            rot(data / "train", 6)
        real(loader, number, totals)

    run.train_step.run = step  # type: ignore[method-assign]
    person = f"{data / 'train' / '00001.tar'}: sample 6 (key 000000006)"
    if leave == "stop":
        with pytest.raises(BadSamplesError) as caught:
            run.train()
        assert caught.value.where == person and run.progress.step >= 4
        return
    run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{person} is left out, a neighbour stands in") == 1
    lines = (tmp_path / "run" / LIST).read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [6]
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt").step == 12


@pytest.mark.parametrize(("name", "workers"), WITH_WORKERS)
def test_evaluation_names_the_picture_never_skips_and_does_not_advise_to(
    name, workers, tiny_shards, tmp_path
):
    data = ShardSet(damaged(tiny_shards / "valid", tmp_path / "bad", 3))
    codec = make_codec("none")
    batches = evaluation_batches(
        data, np.arange(5), codec, loader=name, device=torch.device("cpu"), batch_size=2,
        workers=workers,
    )  # fmt: skip
    with pytest.raises(BadSamplesError, match=r"sample 3 \(key 000000003\)") as caught:
        list(batches)
    assert "on_bad_sample" not in caught.value.next_step
    assert "make_shards.py, whose --skip-bad" in caught.value.next_step


@pytest.mark.parametrize("name", LOADERS)
def test_beyond_the_limit_the_run_stops(name, tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 1, 6, 11)
    bad_samples = BadSamples(ShardSet(folder), tmp_path / "run", 2)
    loader = SkippingLoader(loader_of(name), bad_samples, 0, b"")
    with pytest.raises(InputError, match=r"3 people with damaged pictures") as caught:
        for _ in range(9):
            loader.next()
    assert "check_shards.py --decode" in caught.value.next_step
    lines = (tmp_path / "run" / LIST).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000000001", "000000006", "000000011"]
    whole = ShardSet(tiny_shards / "train")
    with pytest.raises(InputError, match="remove this list") as caught:  # as is still to be done
        BadSamples(whole, tmp_path / "run", 2).learn([b"{}"])
    Path(caught.value.where).unlink()
    assert BadSamples(whole, tmp_path / "run", 2).learn([b"{}"]) == []


def test_a_tar_without_one_good_picture_ends_in_an_error(tiny_shards, tmp_path):
    folder = damaged(tiny_shards / "train", tmp_path / "bad", 10, 11)
    bad_samples = BadSamples(ShardSet(folder), tmp_path / "run", 5)
    loader = SkippingLoader(loader_of("opencv"), bad_samples, 0, b"")
    with pytest.raises(InputError, match="2 damaged pictures of 2"):
        for _ in range(9):
            loader.next()


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_run_remembers_them_and_is_the_run_that_was_not_stopped(
    name, tiny_shards, tmp_path
):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    shutil.rmtree(data / "train")
    damaged(tiny_shards / "train", data / "train", 2, 7)
    config = tiny_config(
        data, data={"loader": name, "on_bad_sample": "skip", "preset": "princeton"},
        optim={"accumulate": 2},
    )  # fmt: skip
    expected = steps(make_trainer(config, tmp_path / "whole"), 6)
    first = make_trainer(config, tmp_path / "parts")
    begun = steps(first, 3)
    first.save(["last.pt"])
    known = (tmp_path / "parts" / LIST).read_text()
    assert [json.loads(line)["sample"] for line in known.splitlines()] == [2, 7]
    second = make_trainer(
        config, tmp_path / "parts", checkpoint.load_checkpoint(tmp_path / "parts" / "last.pt")
    )
    assert set(second.bad_samples.faults) == {2, 7}
    assert begun + steps(second, 3) == expected


def test_what_another_rank_found_is_said_once_and_written(tiny_shards, tmp_path, capsys):
    data = ShardSet(tiny_shards / "train")
    first, second = (BadSamples(data, tmp_path / "run", 2, rank) for rank in (0, 1))
    error = BadSamplesError.of({6: "noise"}, data.where(6), "noise")
    second.add(error)
    assert not (tmp_path / "run" / LIST).exists(), "the first rank alone writes"
    reports = [first.report(), second.report()]
    expected = f"{data.where(6)} is left out, a neighbour stands in: noise"
    assert [q.learn(reports) for q in (first, second)] == [[expected]] * 2
    assert [q.learn(reports) for q in (first, second)] == [[], []]
    assert json.loads((tmp_path / "run" / LIST).read_text())["where"] == data.where(6)
    first.add(BadSamplesError.of({1: "noise"}, data.where(1), "noise"))
    second.add(BadSamplesError.of({2: "noise"}, data.where(2), "noise"))
    for bad_samples in (first, second):  # two each, three together
        with pytest.raises(InputError, match="3 people"):
            bad_samples.learn([first.report(), second.report()])


def test_the_list_of_other_shards_is_not_believed_and_a_damaged_one_is_named(tiny_shards, tmp_path):
    data = ShardSet(tiny_shards / "train")
    lines = [{"sample": 3, "key": "000000003", "fault": "x"},
             {"sample": 4, "key": "another", "fault": "x"},
             {"sample": 99, "key": "000000099", "fault": "x"}]  # fmt: skip
    (tmp_path / LIST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(BadSamples(data, tmp_path, 5).faults) == {3}
    for text in ("{\n", '{"sample": Infinity}\n', "[]\n"):
        (tmp_path / LIST).write_text(text)
        with pytest.raises(InputError, match="remove the file"):
            BadSamples(data, tmp_path, 5)
