"""The benchmark: how it measures, what it compares with, and that every suite runs on a CPU."""

import json
import os
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import new_network

from benchmarks import accuracy_suite, loader_suites, step_suites, throughput
from benchmarks.loader_suites import Options
from benchmarks.princeton_baseline import PrincetonPeople, princeton_step, render_by_loop
from benchmarks.timing import Case, Turn, run_here, run_isolated, summarize, take_turns
from configs.skeleton import MPII
from model.loss import stack_losses
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.heatmaps import render
from pipelines.loader import make_batch
from pipelines.opencv_loader import CropDataset

CPU = torch.device("cpu")
PEOPLE = 6
TINY = "--device cpu --rounds 1 --people 4 --batch-sizes 2 --workers 1 --input-px 128 --width 16"


def test_cases_take_turns_after_a_round_that_does_not_count():
    calls: list[str] = []

    def case(name: str) -> Case:
        def call(what: str) -> int:
            calls.append(f"{what} {name}")
            return 1

        return Case(name, partial(call, "run"), partial(call, "start"), partial(call, "stop"))

    rows = run_here(lambda: [case("a"), case("b")], 2, CPU)
    assert calls == ["start a", "run a", "stop a", "start b", "run b", "stop b"] * 3
    assert [row["name"] for row in rows] == ["a", "b"]


def test_ratios_are_taken_within_a_round():
    # The second round is ten times slower for both; the ratio stays 2.
    rates = [("slow", 0, 9.0), ("fast", 0, 9.0), ("slow", 1, 2.0), ("fast", 1, 4.0),
             ("slow", 2, 0.2), ("fast", 2, 0.4)]  # fmt: skip
    slow, fast = summarize([Turn(name, n, rate, 1.0, 0.0, 0.01) for name, n, rate in rates])
    assert (fast["ratio"], fast["ratio_low"], fast["ratio_high"]) == (2, 2, 2)
    assert (slow["low"], slow["median"], slow["high"], slow["ratio"]) == (0.2, 1.1, 2, 1)
    assert slow["tflops"] == pytest.approx(0.011)
    assert slow["share_of_790_tflops"] == pytest.approx(0.011 / 790)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_cpu_time_counts_work_and_not_waiting():
    def work() -> int:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return 10

    def wait() -> int:
        time.sleep(0.2)
        return 10

    turns = list(take_turns([Case("busy", work), Case("idle", wait)], 0, CPU))
    assert 18 <= turns[1].cpu_ms <= 25 and turns[3].cpu_ms <= 3


@pytest.mark.parametrize("fault", ["dies", "raises", "hangs"])
def test_a_case_that_fails_in_a_child_process_does_not_take_the_others_with_it(fault):
    def culprit() -> int:
        if fault == "dies":
            os._exit(9)
        if fault == "hangs":
            time.sleep(60)
        raise RuntimeError("out of something")

    cases = [Case("a", lambda: 1), Case("b", culprit), Case("c", lambda: 1)]
    limit_s = 1.0 if fault == "hangs" else 60.0
    rows, failed = run_isolated(lambda: cases, 1, CPU, limit_s, method="fork")
    assert [row["name"] for row in rows] == ["a", "c"] and list(failed) == ["b"]
    reason = {"dies": "exit code 9", "raises": "exit code 1", "hangs": "time limit"}[fault]
    assert reason in failed["b"]


def test_rounds_before_a_failure_are_kept():
    runs = []

    def fails_in_round_2() -> int:
        runs.append(1)
        return 1 if len(runs) < 3 else os._exit(1)

    cases = [Case("a", lambda: 1), Case("b", fails_in_round_2)]
    rows, failed = run_isolated(lambda: cases, 5, CPU, 60.0, method="fork")
    assert [row["name"] for row in rows] == ["a", "b"] and list(failed) == ["b"]


def test_the_loop_of_the_baseline_makes_the_same_heatmaps():
    joints = np.random.default_rng(0).uniform(1, 63, (16, 2))
    batched = render(
        torch.from_numpy(joints)[None].float(), torch.ones(1, 16), 64, "princeton", 1.0
    )
    np.testing.assert_allclose(render_by_loop(joints), batched[0].numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    folder = tmp_path_factory.mktemp("benchmark") / "data"
    loader_suites.make_shards(folder, PEOPLE, packings=("original", "crop"))
    sizes = {"people": PEOPLE, "workers": 0, "input_px": 64, "width": 16}
    return Options(device=CPU, folder=folder, **sizes)


def test_people_are_as_large_as_mpiis_and_their_crops_are_smaller_files(options):
    originals, crops = options.shards("original"), options.shards("crop")
    scales = np.sort(originals.records()[:, 3])
    expected = np.interp(100 * (np.arange(PEOPLE) + 0.5) / PEOPLE, *loader_suites.SCALE_PERCENTILES)
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert 300e3 < originals.manifest.shards[0].bytes / PEOPLE < 800e3  # MPII: about 500 kB
    assert crops.manifest.shards[0].bytes < originals.manifest.shards[0].bytes / 3


def test_princetons_loader_makes_what_the_preset_princeton_makes(options):
    """Images and targets of the baseline against those of this project's own path."""
    originals, preset = options.shards("original"), PRESETS["princeton"]
    ours, theirs = CropDataset(originals, preset, 256, seed=0), PrincetonPeople(originals, 256)
    keys = [(sample, epoch) for sample in range(PEOPLE) for epoch in range(2)]
    raw = ours.batch(keys)
    assert 2 <= raw.draws_ND[:, 2].sum() <= 10  # some are mirrored and coloured, some are not
    codec = Codec(preset=preset, rule="princeton", sigma=1.0, input_px=256, skeleton=MPII)
    batch = make_batch(raw, codec, CPU)
    differing = 0
    for row, key in enumerate(keys):
        image, heat = theirs[key]
        np.testing.assert_allclose(batch.images_N3HW[row].permute(1, 2, 0), image, atol=1e-4)
        differing += (np.abs(batch.heat_NJHW[row].numpy() - heat).max(axis=(1, 2)) > 1e-6).sum()
    # A joint on the edge of a pixel may be truncated to either side.
    assert differing <= 2


def test_princetons_step_minimises_the_loss_of_this_project():
    torch.manual_seed(0)
    network = new_network(2, 16, 16, 2, (8, 8, 8))
    images, heat = torch.rand(2, 64, 64, 3), torch.rand(2, 16, 16, 16)
    expected = stack_losses(network(images.permute(0, 3, 1, 2)), heat, torch.ones(2, 16))
    before = [p.detach().clone() for p in network.parameters()]
    found = princeton_step(network, torch.optim.Adam(network.parameters()), images, heat)
    assert found == pytest.approx(expected.mean().item(), rel=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stacks", "gigaflop"), [(2, 49.7), pytest.param(8, 164.3, marks=pytest.mark.slow)]
)
def test_the_floating_point_operations_of_a_person_are_those_of_the_documentation(
    stacks, gigaflop, tmp_path
):
    counted = step_suites.flop_of_a_person(stacks, Options(device=CPU, folder=tmp_path))
    assert counted / 1e9 == pytest.approx(gigaflop, rel=0.005)


@pytest.mark.gpu
def test_every_variant_of_the_step_runs_on_a_gpu(tmp_path):
    device = torch.device("cuda", 0)
    options = Options(device=device, folder=tmp_path, input_px=128, width=64)
    rows, failed = run_isolated(partial(step_suites.step_group, options, 1, 4), 1, device, 300)
    assert len(rows) == len(step_suites.variants_of(options)) and not failed
    assert all(row["peak_mb"] > 0 for row in rows)


@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_time_to_the_same_pck_is_interpolated_up_to_what_both_reach(slower):
    ours = {"seconds": [10.0, 20.0, 30.0], "pck": [20.0, 60.0, 80.0]}
    theirs = {"seconds": [10.0 * slower, 20.0 * slower], "pck": [30.0, 50.0]}
    found = accuracy_suite.time_to_same_pck({"ours": ours, "theirs": theirs})
    assert found == {"pck": 50.0, "ours": 17.5, "theirs": 20.0 * slower}  # 10 + 30 / 40 x 10 s


def test_a_quick_run_writes_json_and_what_the_budget_left_out(tmp_path, capsys):
    words = f"{TINY} --suites step --json {tmp_path}/r.json"
    assert throughput.main(words.split()) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        len(report["step, 2 stacks, batch 2"]) == 2
        and report["world"]["torch"] == torch.__version__
    )
    assert throughput.main(f"{TINY} --suites step --budget 0".split()) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_measured"] == [
        "step, 2 stacks, batch 2"
    ]


@pytest.mark.slow
def test_every_suite_runs_on_a_cpu(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setattr(step_suites, "LEAST_STEPS", 3)
    suites = " ".join((*throughput.SUITES, "accuracy"))
    words = f"{TINY} --suites {suites} --data {tiny_set} --people-to-train 16"
    assert throughput.main([*words.split(), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["failed"] and not report["not_measured"]
    expected = {"loader, batch 2": 11, "step, 2 stacks, batch 2": 2, "training, batch 2": 5}
    expected["operators, batch 2"] = 2
    assert {name: len(report[name]) for name in expected} == expected
    assert all(case["median"] > 0 for name in expected for case in report[name])
    curves = [found for name, found in report.items() if name.startswith("accuracy, ")]
    assert [len(curve["pck"]) for curve in curves] == [8, 8]
    assert len(report["time_to_same_pck"]) == 3
