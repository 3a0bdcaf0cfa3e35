"""The benchmark runs, measures in turns, and ends in one JSON line."""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_codec

from benchmarks import (
    comparing,
    evaluation,
    loading,
    made_people,
    packing,
    princeton_path,
    throughput,
    timing,
)
from benchmarks.timing import Case, take_turns
from common.distributed import DistributedContext
from common.errors import InputError
from evaluation.inference import predict_distributed
from model.hourglass import StackedHourglass
from pipelines import princeton
from pipelines.augment import PRESETS
from pipelines.heatmaps import decode, render
from pipelines.loader import make_batch
from pipelines.opencv_loader import CropDataset, collate
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

ROOT = Path(__file__).parents[1]


def test_cases_take_turns_after_a_round_that_does_not_count():
    calls = []
    cases = [Case(name, lambda name=name: calls.append(name) or 1) for name in "ab"]
    results = take_turns(cases, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3
    assert [r.name for r in results] == ["a", "b"]


def test_what_was_made_ahead_is_used_up_before_the_clock_starts(monkeypatch):
    order = []
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: order.append("clock") or 1e-9 * len(order)
    )
    case = Case("a", lambda: order.append("run") or 1, lambda: order.append("prepare"))
    take_turns([case], 1, torch.device("cpu"))
    assert order[-4:] == ["prepare", "clock", "run", "clock"]


def test_the_first_case_is_what_ratios_divide_by():
    results = take_turns([Case("a", lambda: 1), Case("b", lambda: 1)], 2, torch.device("cpu"))
    assert results[0].ratio == results[0].ratio_low == results[0].ratio_high == 1


def test_ratios_are_taken_within_a_round(monkeypatch):
    # The clock makes the second round ten times slower for both; the ratio stays 2.
    times = iter([0, 1, 0, 1, 0, 2, 0, 1, 0, 20, 0, 10])  # the first four: a round not counted
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    slow, fast = take_turns(
        [Case("slow", lambda: 4), Case("fast", lambda: 4)], 2, torch.device("cpu")
    )
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == (2, 2, 2)
    assert (slow.low, slow.high) == (0.2, 2)


def test_the_loop_that_heatmaps_are_measured_against_makes_the_same_maps():
    joints = np.random.default_rng(0).uniform(1, 63, (16, 2))
    batched = render(
        torch.from_numpy(joints)[None].float(), torch.ones(1, 16), 64, "princeton", 1.0
    )
    np.testing.assert_allclose(princeton_path.render_by_loop(joints), batched[0].numpy(), atol=1e-6)


def test_people_are_as_large_as_in_mpii():
    scale = made_people.make_people(4000, np.random.default_rng(0)).scale
    assert np.percentile(scale, 50) == pytest.approx(3.45, abs=0.15)
    assert scale.min() >= 1.43 and scale.max() <= 8.58


def test_what_works_ahead_is_stopped_before_the_next_turn():
    calls = []
    cases = [
        Case(
            name,
            lambda name=name: calls.append(f"run {name}") or 1,
            lambda name=name: calls.append(f"start {name}"),
            lambda name=name: calls.append(f"stop {name}"),
        )
        for name in "ab"
    ]
    take_turns(cases, 1, torch.device("cpu"))
    assert calls == ["start a", "run a", "stop a", "start b", "run b", "stop b"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_cpu_time_counts_work_and_not_waiting():
    def work() -> int:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return 10

    def wait() -> int:
        time.sleep(0.3)
        return 10

    busy, idle = take_turns([Case("busy", work), Case("idle", wait)], 1, torch.device("cpu"))
    assert 28 <= busy.cpu_ms <= 36 and idle.cpu_ms <= 4


@pytest.fixture
def few(tmp_path) -> tuple[ShardSet, ShardSet]:
    """Six made people, as originals and as crops."""
    originals = made_people.make_originals(tmp_path / "originals", 6)
    return originals, made_people.make_crops(tmp_path / "crops", originals)


def test_princetons_steps_make_what_the_preset_princeton_makes(few):
    """Images and targets of the denominator against those of this project's own path."""
    originals, _ = few
    ours = CropDataset(originals, PRESETS["princeton"], 256, seed=0)
    theirs = princeton_path.PrincetonPeople(originals, 256)
    keys = [(sample, epoch) for sample in range(6) for epoch in range(2)]
    raw = collate([ours[key] for key in keys])
    assert 2 <= raw.draws_ND[:, 2].sum() <= 10  # some are mirrored and coloured, some are not
    codec = make_codec("princeton", "princeton", 256)
    batch = make_batch(raw, codec, torch.device("cpu"))
    differing = 0
    for row, key in enumerate(keys):
        image, heat = theirs[key]
        np.testing.assert_allclose(batch.images_N3HW[row].permute(1, 2, 0), image, atol=1e-4)
        differing += (np.abs(batch.heat_NJHW[row].numpy() - heat).max(axis=(1, 2)) > 1e-6).sum()
    # A joint on the edge of a pixel may be truncated to either side.
    assert differing <= 2


def test_made_crops_are_a_third_in_bytes_and_the_same_people(few):
    originals, crops = few
    np.testing.assert_array_equal(originals.records()[:, :5], crops.records()[:, :5])
    assert crops.manifest.shards[0].bytes < originals.manifest.shards[0].bytes / 3


def test_many_people_are_the_first_shards_renumbered(tmp_path, monkeypatch):
    monkeypatch.setattr(made_people, "PER_SHARD", 3)
    many = made_people.make_many(tmp_path / "many", 8)
    assert len(many) == 9 and len(many.records()) == 9
    assert many.records()[:, 0].tolist() == list(range(9))
    assert many.jpeg(0) == many.jpeg(3) and many.facts(7)["row"] == 7
    assert len(made_people.first_shards(many, tmp_path / "some", 5)) == 6


def test_starting_up_reports_seconds_and_memory_of_the_loader(few):
    _, crops = few
    load = loading.Load(4, 2, 1, 64, torch.device("cpu"))
    facts = loading.start_up(crops.folder, load, multiprocessing.get_start_method())
    assert facts["people"] == 6 and 0 < facts["start_up_s"] < 60
    assert facts["peak_mib"] > 50 or sys.platform != "linux"


def entry(name: str, ratio: float, spread: float = 0.1) -> dict:
    return {"name": name, "median": 10 * ratio, "low": 9 * ratio, "high": 11 * ratio,
            "ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}  # fmt: skip


def report_of(*entries: dict, processor: str = "P") -> dict:
    world = {"device": "cpu", "processor": processor, "cores": 2}
    return {"world": world, "options": {}, "loader": [entry("base", 1, 0), *entries]}


def test_what_moved_is_told_from_noise_by_the_spread():
    old = report_of(entry("a", 2.0), entry("b", 2.0), entry("c", 2.0), entry("d", 1.0))
    new = report_of(entry("a", 2.15), entry("b", 2.5), entry("c", 1.5), entry("e", 3.0))
    lines = {line.split()[0]: line for line in comparing.compare(old, new).splitlines()}
    assert "unchanged  2.00 -> 2.15 x" in lines["a"]
    assert "faster     2.00 -> 2.50 x" in lines["b"]
    assert "SLOWER     2.00 -> 1.50 x" in lines["c"]
    assert "gone" in lines["d"] and "new        3.00 x" in lines["e"]


def test_another_machine_or_another_base_is_said():
    new = report_of(entry("a", 2.0))
    assert "another machine: cpu, Q, 2" in comparing.compare(report_of(processor="Q"), new)
    old = report_of()
    old["loader"][0]["name"] = "other"
    assert "divides by `other`; not compared" in comparing.compare(old, new)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="--json wrote"):
        comparing.read_report(tmp_path / "x.json")
    with pytest.raises(InputError):
        comparing.read_report(tmp_path / "none.json")


def test_the_chart_is_a_picture_or_says_what_to_install(tmp_path):
    report = report_of(entry("a", 2.0))
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(InputError, match="pip install matplotlib"):
            comparing.draw_chart(report, tmp_path / "c.png")
        return
    comparing.draw_chart(report, tmp_path / "c.png")
    assert cv2.imread(str(tmp_path / "c.png")).std() > 10


def test_psnr_of_a_constant_difference():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)
    # 10 log10(255^2 / 16^2) = 20 log10(15.9375)
    assert packing.psnr([black], [grey]) == pytest.approx(24.0484, abs=1e-3)
    assert packing.psnr([black], [black]) == float("inf")


def test_the_area_reference_is_the_mean_of_blocks(few):
    """A box of 640 px about whole pixels, unturned: an input pixel is a block of 10 x 10."""
    image = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    _, png = cv2.imencode(".png", image)
    record = np.zeros(13 + 64)
    record[1:4], record[7:13] = (639.5, 359.5, 3.2), (1, 0, 0, 0, 1, 0)
    packed = packing.Packed([png.tobytes()], [record])
    options = argparse.Namespace(reach="none", input_px=64)
    (area,) = packing.area_inputs(packed, options)
    blocks = image[40:680, 320:960, ::-1].reshape(64, 10, 64, 10, 3).mean(axis=(1, 3))
    # Interpolation of the finest pixels mixes a quarter of a neighbour in at the blocks' edges.
    assert np.abs(area - blocks).mean() < 1
    assert np.abs(packing.make_inputs(packed, options)[0] - blocks).mean() > 20  # it aliases


@pytest.mark.slow
def test_packings_are_compared_on_real_pictures(shared, capsys, monkeypatch):
    data = shared / "data" / "mpii_sample"
    words = ["packing.py", "--annotations", data / "annot" / "valid.h5",
             "--images", data / "images", "--person-px", 144, 288]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    packing.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0] if row[0] == "original" else row[1]: row for row in rows if len(row) > 6}
    kilobytes = [float(found[name][-6]) for name in ("144", "288", "original")]
    assert kilobytes == sorted(kilobytes)
    to_area = {name: float(found[name][-2]) for name in ("144", "288", "original")}
    assert to_area["288"] > to_area["original"] > to_area["144"]


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_one_json_line(tmp_path):
    suites = [suite for suite in throughput.SUITES if suite != "scaling"]  # it makes 25,000 people
    done = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", "--rounds", "1", "--people", "4",
         "--batch-size", "2", "--workers", "1", "--input-px", "128", "--device", "cpu",
         "--json", str(tmp_path / "r.json"), "--suites", *suites],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert {"world", *suites} <= result.keys()
    assert result["world"]["torch"] == torch.__version__
    assert all(case["median"] > 0 for suite in suites for case in result[suite])
    assert "not measured" in done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_people.make_originals(tmp_path_factory.mktemp("made") / "originals", 6)


def test_decoding_by_a_loop_gives_the_joints_of_the_batched_routine(made):
    heat = torch.rand(6, 16, 64, 64)
    heat[0, 0] = -heat[0, 0]  # nothing positive
    fields = unpack_records(made.records().astype(np.float64))
    joints, _ = decode(heat, "princeton")
    center, scale = fields.center_N2, fields.scale_N
    batched = princeton.image_joints(joints.double().numpy(), center, scale, 256, 64)
    for row in range(6):
        alone = evaluation.decode_by_loop(heat[row], center[row], float(scale[row]))
        np.testing.assert_allclose(alone, batched[row], atol=1)  # a truncation may flip
        assert (alone == batched[row]).mean() > 0.95


def test_evaluating_one_by_one_gives_the_joints_of_the_batched_way(made):
    torch.manual_seed(0)
    network, cpu = StackedHourglass(1, 16, 16).eval(), torch.device("cpu")
    alone = [evaluation.predict_by_one(network, made, sample, cpu) for sample in range(6)]
    together = predict_distributed(
        network, made, np.arange(6), evaluation.princeton_codec(made),
        DistributedContext(0, 1, cpu, torch.float32), batch_size=3, workers=0, flip=True,
    )  # fmt: skip
    # An untrained network's maps are nearly flat, so that a hair's breadth can move a maximum.
    assert (np.abs(np.stack(alone) - together.keypoints_NJ2).max(axis=-1) <= 1).mean() > 0.9
