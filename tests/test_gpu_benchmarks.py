"""The benchmarks for a GPU: tried out on a CPU, and what they do when time or a piece fails."""

import json
import sys

import cv2
import pytest
import torch

from benchmarks import gpu_accuracy, gpu_loader, gpu_steps, gpu_train, pieces
from benchmarks.gpu_steps import Network, TimedStep, ways
from benchmarks.pieces import Deadline, Piece, run_pieces
from benchmarks.timing import Result
from common.errors import InputError
from model.hourglass import StackedHourglass
from model.loss import stack_losses

CPU = torch.device("cpu")
PROGRAMS = [gpu_loader, gpu_train, gpu_accuracy]


def run(program, monkeypatch, out, words: str) -> tuple[int, dict]:
    """A program's exit code and report."""
    name = program.__name__.split(".")[-1]
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *words.split()])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    code = program.main()
    assert cv2.imread(str(out / f"{name}.png")) is not None
    return code, json.loads((out / f"{name}.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_gpu_nothing_is_measured_and_nothing_is_written(program, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["program", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no CUDA device"):
        program.main()
    assert not (tmp_path / "out").exists()


def test_what_fails_or_does_not_fit_is_named_and_the_rest_is_kept(tmp_path, capsys):
    def broken():
        raise RuntimeError("out of something")

    found = Result("a", 10.0, 9.0, 11.0, 1.0, 1.0, 1.0)
    path, report = tmp_path / "new" / "x.json", {"options": {}}
    code = run_pieces(
        [
            Piece("first", lambda: [found]),
            Piece("second", broken),
            Piece("third", lambda: {"x": 3}),
            Piece("long", lambda: pytest.fail("begun"), seconds=1e6),
        ],
        report, path, CPU, Deadline(1.0),
    )  # fmt: skip
    written = json.loads(path.read_text())
    assert code == 1 and written["third"] == {"x": 3} and written["first"][0]["median"] == 10
    assert written["failed"] == {"second": "RuntimeError: out of something"}
    assert written["left_out"] == ["long"] and "long" in capsys.readouterr().out
    assert cv2.imread(str(path.with_suffix(".png"))) is not None


def test_what_was_measured_is_on_the_disk_before_the_next_piece_begins(tmp_path):
    path = tmp_path / "x.json"
    seen = []
    run_pieces(
        [
            Piece("first", lambda: 1),
            Piece("second", lambda: seen.append(json.loads(path.read_text())["first"]) or 2),
        ],
        {"options": {}}, path, CPU, Deadline(1.0),
    )  # fmt: skip
    assert seen == [1]


def test_words_choose_pieces(tmp_path):
    report: pieces.Report = {"options": {"only": ["crops"]}}
    both = [Piece("crops: a", lambda: 1), Piece("originals: a", lambda: 2)]
    assert run_pieces(both, report, tmp_path / "x.json", CPU, Deadline(1.0)) == 0
    assert report["crops: a"] == 1 and "originals: a" not in report


@pytest.mark.parametrize(
    ("stacks", "gigaflop"), [(2, 49.7), pytest.param(8, 164.3, marks=pytest.mark.slow)]
)
def test_a_person_costs_the_floating_point_operations_that_utilisation_divides_by(stacks, gigaflop):
    """Forward and backward at 256 px; the numbers are those of docs/performance.md."""
    counted = gpu_steps.flops_of_a_person(Network(stacks, 256, 4, 256))
    assert counted / 1e9 == pytest.approx(gigaflop, rel=0.005)


def test_every_way_to_make_a_step_trains_the_same_network(monkeypatch):
    """In float32 and without a compiler: weights' layout, targets, activations twice.

    Plain descent in place of Adam, which divides by the size of a gradient and so enlarges its
    rounding. NCHW is left out: it rounds otherwise, and batch norms of noise enlarge that.
    """
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, 0.1))
    weights = []
    chosen = [way for way in ways(CPU) if way.layout == torch.channels_last]
    for way in chosen:
        torch.manual_seed(0)
        step = TimedStep(way._replace(dtype=torch.float32), Network(2, 16, 2, 64), 2, CPU)
        start = torch.cat([p.detach().flatten() for p in step.network.parameters()])
        for _ in range(3):
            step()
        weights.append(torch.cat([p.detach().flatten() for p in step.network.parameters()]))
    assert len(weights) == 8 and (weights[0] - start).abs().max() > 1e-2
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_a_step_of_cuda_graphs_trains_the_same_network(monkeypatch):
    """In float32 without TF32, plain descent in place of Adam as above."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, 0.1))
    weights = []
    for graphed in (False, True):
        torch.manual_seed(0)
        way = gpu_steps.OURS._replace(dtype=torch.float32, graphed=graphed, tries_algorithms=False)
        step = TimedStep(way, Network(2, 64, 2, 128), 8, device)
        for _ in range(3):
            step()
        weights.append(torch.cat([p.detach().flatten() for p in step.network.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_every_way_to_make_a_step_runs():
    """With compilers and graphs, in the precision of each."""
    device = torch.device("cuda", 0)
    for way in ways(device):
        step = TimedStep(way, Network(1, 64, 2, 128), 4, device)
        step()
        step()
        assert all(torch.isfinite(p).all() for p in step.network.parameters()), way.name


def test_princetons_step_minimises_the_loss_of_this_project():
    torch.manual_seed(0)
    network = StackedHourglass(2, 16, 16, 2, (8, 8, 8))
    images, heat = torch.rand(2, 64, 64, 3), torch.rand(2, 16, 16, 16)
    expected = stack_losses(network(images.permute(0, 3, 1, 2)), heat, torch.ones(2, 16), "empty")
    before = [p.detach().clone() for p in network.parameters()]
    found = gpu_accuracy.princeton_step(
        network, torch.optim.Adam(network.parameters()), iter([[images, heat]]), CPU
    )
    assert found == pytest.approx(expected.mean().item(), rel=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.slow
def test_the_sweep_keeps_the_fastest_of_each_setting(monkeypatch, tmp_path):
    pytest.importorskip("nvidia.dali")
    small = "--device cpu --people 4 --turn 8 --batch-size 4 --workers 2 --rounds 1 --input-px 64"
    monkeypatch.setattr(gpu_loader, "AXIS_SECONDS", 0.0)
    monkeypatch.setattr(gpu_loader, "BATCHES", (4,))
    code, report = run(gpu_loader, monkeypatch, tmp_path, f"{small} --only pixels threads best")
    assert code == 0 and not report["failed"]
    assert [gap["packing"] for gap in report["pixels"]] == ["originals", "crops"]
    assert all(gap["mean"] < 0.5 and gap["percentile_99_9"] <= 6 for gap in report["pixels"])
    for packing in ("originals", "crops"):
        results = report[f"{packing}: threads"]
        fastest = max(results, key=lambda result: result["median"])
        assert fastest["name"] == f"threads {report['best'][packing]['threads']}"
    assert "crops: roi" not in report and "originals: roi" not in report


def test_the_step_is_timed_with_what_it_uses_of_the_card(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    code, report = run(
        gpu_train, monkeypatch, tmp_path,
        "--device cpu --stacks 1 --width 16 --depth 2 --input-px 64 --batch-size 2 "
        "--small-batch 2 --largest-batch 4 --rounds 1 --only card stacks heatmaps",
    )  # fmt: skip
    assert code == 0 and not report["failed"] and not report["left_out"]
    step = report["1 stacks, batch 2"]
    used = report["flops utilisation"]["1 stacks, batch 2"]
    name = step[0]["name"]
    assert used[name]["TFLOP/s"] == pytest.approx(
        step[0]["median"] * used["GFLOP a person"] / 1e3, rel=1e-6
    )
    own = report["card"]["bf16_flops_per_s"] / 1e12
    assert used[name]["of this card's"] == pytest.approx(used[name]["TFLOP/s"] / own, rel=1e-6)
    memory = report["memory, 1 stacks"]
    assert all(list(entry["peak_mb"]) == ["1", "2", "4"] for entry in memory.values())
    assert report["heatmaps"]["plain"]["of copy bandwidth"] > 0
    assert len(report["1 stacks, batch 2, compiled"]) == 4


def test_a_way_that_fails_does_not_take_the_others_with_it(monkeypatch):
    step_case = gpu_train.step_case

    def fails(way, *rest):
        case = step_case(way, *rest)
        return case if way is gpu_steps.OURS else case._replace(run=lambda: 1 / 0)

    monkeypatch.setattr(gpu_train, "step_case", fails)
    report: pieces.Report = {"failed": {}}
    size, load = Network(1, 16, 2, 64), gpu_loader.Load(2, 2, 1, 64, CPU)
    chosen = [gpu_steps.PRINCETON, gpu_steps.OURS]
    results = gpu_train.steps("x", size, 2, chosen, load, 1, report)
    assert [result.name for result in results] == [gpu_steps.OURS.name]
    assert list(report["failed"]) == [f"x: {gpu_steps.PRINCETON.name}"]


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    def peak(way, size, people, device):
        if people > 32:
            raise torch.OutOfMemoryError("full")
        return 100.0 + 3.0 * people

    monkeypatch.setattr(gpu_steps, "peak_mb", peak)
    load = gpu_loader.Load(16, 16, 1, 64, CPU)
    found = gpu_steps.memory_of(gpu_steps.OURS, Network(1, 16, 2, 64), load, 4096)
    assert (found["fits"], found["does_not"], found["mb_a_person"]) == (32, 64, 3.0)


SMALL_TRIAL = (
    "--device cpu --people 16 --batch-size 4 --large-batch 8 --seeds 3 --stacks 1 --width 16 "
    "--depth 2 --input-px 64 --workers 0"
)


@pytest.mark.slow
def test_both_ways_see_as_many_people_and_are_scored(tiny_set, monkeypatch, tmp_path):
    code, report = run(
        gpu_accuracy, monkeypatch, tmp_path, f"{SMALL_TRIAL} --data {tiny_set} --minutes 5"
    )
    assert code == 0
    names = ["princeton-vl's way, seed 3", "ours, seed 3", "ours, batch 8, seed 3"]
    runs = [report[name] for name in names]
    assert [entry["people"] for entry in runs] == [16, 16, 16]
    assert all(entry["whole"] and 0 <= entry["pck@0.5"] <= 100 for entry in runs)
    assert all(entry["people_per_s"] == entry["people"] / entry["seconds"] for entry in runs)


def test_a_training_that_is_cut_short_shortens_those_after_it(tmp_path):
    words = f"{SMALL_TRIAL} --minutes 1".split()
    trial = gpu_accuracy.Trial(
        gpu_accuracy.make_parser().parse_args(words), tmp_path, tmp_path, CPU, Deadline(10.0)
    )
    given: list[tuple[int, float]] = []

    def train(seed: int, seconds: float) -> dict:
        given.append((trial.people, seconds))
        return {"people": 12 if len(given) == 1 else trial.people, "seconds": 3.0}

    trial.left = 3
    found = [trial._timed(train, 3) for _ in range(3)]
    assert [people for people, _ in given] == [16, 12, 12]
    assert [entry["people_per_s"] for entry in found] == [4.0, 4.0, 4.0]
    # 600 s for three, then for two, then for one; 12 s of each are kept for validation.
    assert [seconds for _, seconds in given] == pytest.approx([188, 288, 588], abs=1)
