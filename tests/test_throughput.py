"""The benchmark runs, measures in turns, and ends in one JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import evaluation, throughput, timing
from benchmarks.timing import Case, take_turns
from model.hourglass import StackedHourglass
from pipelines import princeton
from pipelines.heatmaps import decode, render
from pipelines.shards import unpack_records
from training.runtime import Runtime
from training.validation import predict_together

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
    times = iter([0, 0, 0, 2, 0, 1, 0, 20, 0, 10])  # the first two: rounds that do not count
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    slow, fast = take_turns(
        [Case("slow", lambda: 4), Case("fast", lambda: 4)], 2, torch.device("cpu")
    )
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == (2, 2, 2)
    assert (slow.low, slow.high) == (0.2, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return throughput.make_shards(tmp_path_factory.mktemp("made"), 6)


def test_decoding_by_a_loop_gives_the_joints_of_the_batched_routine(made):
    heat = torch.rand(6, 16, 64, 64)
    heat[0, 0] = -heat[0, 0]  # nothing positive
    fields = unpack_records(made.records().astype(np.float64))
    joints, _ = decode(heat, "princeton")
    center, scale = fields.center_N2, fields.scale_N
    batched = princeton.image_points(joints.double().numpy(), center, scale, 256, 64)
    for row in range(6):
        alone = evaluation.decode_by_loop(heat[row], center[row], float(scale[row]))
        np.testing.assert_allclose(alone, batched[row], atol=1)  # a truncation may flip
        assert (alone == batched[row]).mean() > 0.95


def test_evaluating_one_by_one_gives_the_joints_of_the_batched_way(made):
    torch.manual_seed(0)
    network, cpu = StackedHourglass(1, 16, 16).eval(), torch.device("cpu")
    alone = [evaluation.predict_by_one(network, made, sample, cpu) for sample in range(6)]
    together = predict_together(
        network, made, np.arange(6), evaluation.target_of_princeton(made),
        Runtime(0, 1, cpu, torch.float32), batch_size=3, workers=0, flip=True,
    )  # fmt: skip
    # An untrained network's maps are nearly flat, so that a hair's breadth can move a maximum.
    assert (np.abs(np.stack(alone) - together.keypoints_NJ2).max(axis=-1) <= 1).mean() > 0.9


def test_the_loop_that_heatmaps_are_measured_against_makes_the_same_maps():
    joints = np.random.default_rng(0).uniform(1, 63, (16, 2))
    batched = render(
        torch.from_numpy(joints)[None].float(), torch.ones(1, 16), 64, "princeton", 1.0
    )
    np.testing.assert_allclose(throughput.render_by_loop(joints), batched[0].numpy(), atol=1e-6)


def test_people_are_as_large_as_in_mpii():
    scale = throughput.make_people(4000, np.random.default_rng(0)).scale
    assert np.percentile(scale, 50) == pytest.approx(3.45, abs=0.15)
    assert scale.min() >= 1.43 and scale.max() <= 8.58


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_one_json_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", "--rounds", "1", "--people", "4",
         "--batch-size", "2", "--workers", "1", "--input-px", "128", "--device", "cpu",
         "--json", str(tmp_path / "r.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert {"world", "loader", "heatmaps", "train"} <= result.keys()
    assert result["world"]["torch"] == torch.__version__
    assert all(case["median"] > 0 for suite in throughput.SUITES for case in result[suite])
    assert "not measured" in done.stdout
