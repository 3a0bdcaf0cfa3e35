"""A resumed run equals an uninterrupted one; on another number of ranks as nearly as possible."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, pack_arguments
from helpers import CPU, ENVIRONMENT, leaves, make_trainer, metrics, step, steps, tiny_config
from two_ranks import differences, rows_of

from common.distributed import from_first_rank, init_distributed
from common.errors import InputError
from configs.schema import Config, save_yaml
from configs.skeleton import MPII
from model.checkpoint import Checkpoint, RunState, load_checkpoint
from pipelines.shard_format import HEADER_LENGTH, people_sha256
from pipelines.shards import ShardSet
from tools import make_shards
from training.checkpoint_manager import RESUME_ME, lock_run_folder
from training.metrics import METRICS, MetricsLogger
from training.resume import find_start, fit_to_ranks, global_batch_size, load_resumable

LAST = Path("last.pt")


@pytest.fixture(scope="module")
def two_ranks(tiny_shards, tmp_path_factory) -> Path:
    """The folder in which tests/two_ranks.py worked, under torchrun."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path_factory.mktemp("ranks")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command += f" {ROOT / 'tests' / 'two_ranks.py'} {tiny_shards} {folder}"
    words = [sys.executable, *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder


def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_two_ranks_stopped_after_each_step_end_with_the_same_bytes(loader, two_ranks):
    assert [rank[loader] for rank in reports(two_ranks)] == [[], []]


@pytest.mark.parametrize(
    ("loader", "workers"),
    [("opencv", 0), pytest.param("opencv", 1, marks=pytest.mark.slow), ("dali", 0)],
)
def test_one_rank_stopped_after_each_step_ends_with_the_same_bytes(
    loader, workers, tiny_shards, tmp_path
):
    """Batches, losses, weights, averages, optimizer, schedule, scaler and generators of fp16."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    dist = CPU._replace(dtype=torch.float16)
    assert differences(loader, tiny_shards, tmp_path, dist, workers) == []


def test_a_run_resumed_in_mid_epoch_logs_and_writes_what_an_uninterrupted_one_does(
    tiny_shards, tmp_path
):
    config = tiny_config(
        tiny_shards, optim={"ema_decay": 0.9}, train={"steps_per_epoch": 4, "log_every": 1}
    )
    make_trainer(config, tmp_path / "whole").train()
    first = make_trainer(config, tmp_path / "parts")
    steps(first, 3)
    first.save(["last.pt"])
    make_trainer(config, tmp_path / "parts", tmp_path / "parts" / "last.pt").train()
    whole, parts = (
        leaves(torch.load(tmp_path / name / "last.pt", weights_only=True))
        for name in ("whole", "parts")
    )
    differing = [name for name in whole if whole[name] != parts.get(name)]
    assert differing == ["seconds/"] and len(whole) > 100
    lines, expected = metrics(tmp_path / "parts", "train"), metrics(tmp_path / "whole", "train")
    assert [x["loss"] for x in lines] == [x["loss"] for x in expected[3:]]


def test_a_run_resumed_after_a_validation_ends_as_an_uninterrupted_one(
    tiny_shards, tmp_path, monkeypatch
):
    """It repeats neither the validation nor a random number."""
    monkeypatch.setattr(MetricsLogger, "log_pictures", lambda *_: None)
    config = tiny_config(tiny_shards, train={"steps_per_epoch": 3})
    make_trainer(config, tmp_path / "whole").train()
    shorter = tiny_config(tiny_shards, train={"steps": 3, "steps_per_epoch": 3})
    make_trainer(shorter, tmp_path / "parts").train()
    make_trainer(config, tmp_path / "parts", tmp_path / "parts" / "last.pt").train()
    whole, parts = (
        leaves(torch.load(tmp_path / name / "last.pt", weights_only=True))
        for name in ("whole", "parts")
    )
    assert [name for name in whole if whole[name] != parts.get(name)] == ["seconds/"]
    validations, expected = (
        [(x["step"], x["peak"]) for x in metrics(tmp_path / name, "valid")]
        for name in ("parts", "whole")
    )
    assert validations == expected and [step for step, _ in expected] == [3, 6]
    assert whole["best/"] > -1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(two_ranks):
    expected = {"skipped": 1.0, "weights stay": True, "statistics are finite": True}
    assert [rank["poisoned"] for rank in reports(two_ranks)] == [expected] * 2
    lines = (two_ranks / "poisoned" / "skipped_batches.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(x["step"], x["rank"], x["loss_is_finite"]) for x in found] == [
        (1, 0, True),
        (1, 1, False),
    ]


@pytest.mark.slow
def test_two_ranks_train_in_a_graph_as_with_ddp(two_ranks):
    first, second = (rank["graph"] for rank in reports(two_ranks))
    assert first["differing"] == second["differing"] == []
    assert first["losses"][0] == first["losses"][1] != second["losses"][0] == second["losses"][1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_in_a_graph_as_with_ddp(tiny_shards, tmp_path):
    """Six steps; kernels of the gradient add in another order."""
    losses = []
    for name, graphed in (("ddp", False), ("graph", True)):
        train = {"cuda_graph": graphed, "log_every": 1, "out": str(tmp_path), "name": name}
        save_yaml(tiny_config(tiny_shards, train=train), tmp_path / "config.yaml")
        command = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py --config"
        words = [sys.executable, *command.split(), str(tmp_path / "config.yaml")]
        subprocess.run(words, check=True, cwd=ROOT, env=ENVIRONMENT)
        losses.append([line["loss"] for line in metrics(tmp_path / name, "train")])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


@pytest.mark.slow
def test_ranks_exchange_bytes_of_any_length(two_ranks):
    assert [rank["gathered"] for rank in reports(two_ranks)] == [[0, 5], [0, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_one_rank_goes_on_with_the_people_and_losses_of_two(
    loader, two_ranks, tiny_shards, tmp_path
):
    config = tiny_config(
        tiny_shards, data={"loader": loader, "preset": "newell"}, train={"steps_per_epoch": 2}
    )
    trainer = make_trainer(config, tmp_path, two_ranks / f"{loader}2" / "last.pt")
    assert "; a step takes 8 people as before, 4 per rank x 1 rank(s) x 2" in trainer.remarks[0]
    first, second = (rank[f"{loader} goes on"] for rank in reports(two_ranks))
    after = [step(trainer) for _ in range(2)]
    assert [rows_of(totals) for totals in after] == [
        a + b for a, b in zip(first["rows"], second["rows"], strict=True)
    ]
    expected = np.add(first["losses"], second["losses"])
    # Sums over a batch are rounded otherwise, and the second step begins from other weights so.
    np.testing.assert_allclose([t.sums[0].item() for t in after], expected, rtol=1e-4)


def test_a_run_resumed_with_the_other_loader_has_the_same_people_and_nearly_the_same_losses(
    tiny_shards, tmp_path
):
    pytest.importorskip("nvidia.dali")
    data = {"preset": "newell", "loader": "opencv"}
    config = tiny_config(tiny_shards, data=data)
    other = tiny_config(tiny_shards, data=data | {"loader": "dali"})
    whole = make_trainer(config, tmp_path / "whole")
    first = [step(whole) for _ in range(2)]
    whole.save(["last.pt"])
    resumed = make_trainer(other, tmp_path / "whole", tmp_path / "whole" / "last.pt")
    expected, found = ([step(run) for _ in range(2)] for run in (whole, resumed))
    assert [rows_of(totals) for totals in found] == [rows_of(totals) for totals in expected]
    losses, others = ([t.sums[0].item() for t in totals] for totals in (expected, found))
    # Crops differ by 0.01 grey levels, and the second step begins from other weights so.
    np.testing.assert_allclose(losses, others, rtol=5e-3)
    assert abs(first[0].sums[0].item() - losses[0]) > 2e-2 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_a_run_resumed_on_a_gpu_is_within_the_noise_of_uninterrupted_ones(
    loader, tiny_shards, tmp_path
):
    """The noise of a GPU is measured here, by three uninterrupted runs."""
    dist = init_distributed("cuda", "auto")
    config = tiny_config(
        tiny_shards,
        data={"loader": loader, "preset": "princeton"},
        optim={"ema_decay": 0.9},
        train={"steps": 12, "steps_per_epoch": 12},
    )
    runs = [steps(make_trainer(config, tmp_path / str(i), dist=dist), 12) for i in range(3)]
    first = make_trainer(config, tmp_path / "parts", dist=dist)
    begun = steps(first, 5)
    first.save(["last.pt"])
    last = load_checkpoint(tmp_path / "parts" / "last.pt")
    resumed = begun + steps(make_trainer(config, tmp_path / "parts", last, dist), 7)
    noise = np.maximum.accumulate(np.ptp(runs, axis=0))
    nearest = np.abs(np.array(runs) - resumed).min(axis=0)
    assert (nearest <= 2 * noise).all(), (nearest, noise)
    # A run without its optimizer's state is found out.
    forgetful = dataclasses.replace(last, optimizer={**last.optimizer, "state": {}})
    other = begun + steps(make_trainer(config, tmp_path / "parts", forgetful, dist), 7)
    assert (np.abs(np.array(runs) - other).min(axis=0) > 2 * noise).any()


def test_moments_of_another_memory_layout_are_taken_over_element_by_element(tiny_shards, tmp_path):
    """princeton-vl's checkpoints are NCHW, our weights channels-last."""
    config = tiny_config(tiny_shards)
    first = make_trainer(config, tmp_path)
    steps(first, 2)
    first.save(["last.pt"])
    losses, strides = [], []
    for layout in ("as saved", "NCHW"):
        saved = load_checkpoint(tmp_path / "last.pt")
        for moments in saved.optimizer["state"].values() if layout == "NCHW" else ():
            moments |= {key: tensor.contiguous() for key, tensor in moments.items()}
        resumed = make_trainer(config, tmp_path, saved)
        losses.append(steps(resumed, 2))
        strides += [
            (parameter.stride(), moments["exp_avg"].stride(), moments["exp_avg_sq"].stride())
            for parameter, moments in resumed.train_step.optimizer.state.items()
        ]
    assert losses[0] == losses[1]
    assert len(strides) > 50 and all(len(set(each)) == 1 for each in strides)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("optim", {"name": "rmsprop"}, "optim.name was adam, is rmsprop"),
        ("data", {"batch_size": 6}, "data.batch_size was 4, is 6"),
        ("train", {"seed": 9}, "train.seed was 0, is 9"),
    ],
)
def test_settings_that_make_another_run_are_refused(section, values, named):
    saved = saved_checkpoint(tiny_config(Path("x")), 1, step=6)
    with pytest.raises(InputError, match=named):
        fit_to_ranks(tiny_config(Path("x"), **{section: values}), saved, 1)


def test_settings_that_may_change_are_remarked_on_and_take_effect(tiny_shards, tmp_path):
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path)
    steps(trainer, 1)
    trainer.save(["last.pt"])
    other = tiny_config(tiny_shards, optim={"weight_decay": 0.5, "lr": 1e-4}, train={"steps": 9})
    again = make_trainer(other, tmp_path, tmp_path / "last.pt")
    assert again.remarks == [
        "changed on resuming: optim.lr was 0.003, is 0.0001",
        "changed on resuming: optim.weight_decay was 0.0, is 0.5",
    ]
    assert again.train_step.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_run_resumed_in_another_folder_has_a_best_of_its_own(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards)
    first = make_trainer(config, tmp_path / "a")
    first.progress.best = 0.9
    first.save(["last.pt"])
    moved, kept = (
        make_trainer(config, tmp_path / name, tmp_path / "a" / "last.pt") for name in ("b", "a")
    )
    assert (moved.progress.best, kept.progress.best) == (-1.0, 0.9)


def test_lines_after_the_checkpoint_are_dropped_on_resuming(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"log_every": 1})
    make_trainer(config, tmp_path).train()
    earlier = dataclasses.replace(load_checkpoint(tmp_path / "last.pt"), step=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')  # of a killed run
    make_trainer(config, tmp_path, earlier).train()
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_does_not_go_on_with_other_people(tiny_set, tiny_shards, tmp_path):
    make_trainer(tiny_config(tiny_shards), tmp_path / "run").save(["last.pt"])
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert make_shards.main(pack_arguments(tiny_set, tmp_path / "crops", "--packing", "crop")) == 0
    make_trainer(tiny_config(tmp_path / "crops"), tmp_path / "run", saved)
    run = dataclasses.replace(saved.run, people_sha256="0" * 64)
    with pytest.raises(InputError, match=r"weights than those of .*last\.pt") as caught:
        make_trainer(
            tiny_config(tiny_shards), tmp_path / "run", dataclasses.replace(saved, run=run)
        )
    assert "--init_from" in caught.value.next_step


def test_the_hash_of_people_is_of_who_and_in_which_order(tiny_shards):
    records = ShardSet(tiny_shards / "train").records().copy()
    known = people_sha256(records)
    for column in (0, 1, HEADER_LENGTH, HEADER_LENGTH + 50):
        other = records.copy()
        other[3, column] += 1
        assert people_sha256(other) != known, column
    assert people_sha256(records[::-1]) != known


@pytest.mark.parametrize(
    ("batch", "parts", "before", "now", "expected"),
    [
        (4, 1, 2, 1, (4, 2)),  # a rank is lost: two batches make up the step
        (4, 1, 1, 2, (2, 1)),  # one is won: each takes half
        (4, 2, 3, 2, (4, 3)),
        (6, 1, 2, 3, (4, 1)),
        (2, 4, 1, 4, (2, 1)),
    ],
)
def test_another_number_of_ranks_shares_the_same_global_batch(batch, parts, before, now, expected):
    config = tiny_config(Path("x"), data={"batch_size": batch}, optim={"accumulate": parts})
    saved = saved_checkpoint(config, before, step=6)
    fitted, remarks = fit_to_ranks(config, saved, now)
    assert (fitted.data.batch_size, fitted.optim.accumulate) == expected
    assert f"the run had {before} rank(s) and has {now}" in remarks[0]
    # And again, when this run is resumed in its turn.
    run = dataclasses.replace(saved.run, ranks=now, people_a_step=global_batch_size(fitted, now))
    assert fit_to_ranks(config, dataclasses.replace(saved, run=run), now) == (fitted, [])


def saved_checkpoint(config: Config, ranks: int, step: int, path: Path = LAST) -> Checkpoint:
    people = global_batch_size(config, ranks)
    run = RunState(
        ranks=ranks,
        loader="opencv",
        rng=[],
        people_sha256="",
        people_a_step=people,
        best=-1.0,
        seconds=0.0,
        validation_due=False,
        scaler={},
    )
    empty = {"weights": {}, "averaged": {}, "optimizer": {}}
    return Checkpoint(path=path, config=config, skeleton=MPII, step=step, run=run, **empty)


def test_a_global_batch_may_be_shared_by_hand_but_not_changed():
    old = tiny_config(Path("x"), data={"batch_size": 4})
    by_hand = tiny_config(Path("x"), data={"batch_size": 2})
    saved = saved_checkpoint(old, 1, step=6)
    fitted, _ = fit_to_ranks(by_hand, saved, 2)
    assert (fitted.data.batch_size, fitted.optim.accumulate) == (2, 1)
    with pytest.raises(InputError, match=r"data\.batch_size was 4, is 2"):
        fit_to_ranks(by_hand, saved, 3)
    with pytest.raises(InputError, match="4 people a step, now on 3 ranks"):
        fit_to_ranks(old, saved, 3)


def test_a_start_finds_the_runs_checkpoint_and_protects_it(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    assert find_start(folder, None, False) == ("", [])
    assert find_start(folder, "auto", False)[1] == [
        "no checkpoint yet, so the run starts at step 0"
    ]
    with pytest.raises(InputError, match=r"last\.pt"):
        find_start(folder, "", False)
    trainer = make_trainer(tiny_config(tiny_shards), folder)
    with pytest.raises(InputError, match="a run of this name") as caught:
        find_start(folder, None, False)
    assert "remove this folder" in caught.value.next_step
    lock_run_folder(folder)  # as a run does that ends before its first checkpoint
    assert find_start(folder, None, False) == ("", [])
    (folder / METRICS).write_text("{}")  # the log of a run whose checkpoints were removed
    with pytest.raises(InputError, match="a run of this name"):
        find_start(folder, None, False)
    trainer.save(["last.pt"])
    last = str(folder / "last.pt")
    assert find_start(folder, "auto", False) == (last, [f"continuing from {last}"])
    assert find_start(folder, None, restarted=True)[0] == last
    assert find_start(folder, last, False) == (last, [])
    with pytest.raises(InputError, match="a run of this name") as caught:
        find_start(folder, None, False)
    assert caught.value.next_step.endswith("continue it with --resume")
    elsewhere = tmp_path / "elsewhere.pt"
    assert find_start(folder, str(elsewhere), False) == (str(elsewhere), [])  # fails when read
    elsewhere.touch()
    with pytest.raises(InputError, match="of another run"):
        find_start(folder, str(elsewhere), False)
    (folder / "last.pt").unlink()
    assert Path(find_start(folder, "", False)[0]).name == "step_00000000.pt"


def test_weights_alone_cannot_be_resumed(tiny_shards, tmp_path):
    make_trainer(tiny_config(tiny_shards), tmp_path).save(["last.pt"])
    raw = torch.load(tmp_path / "last.pt", weights_only=True)
    del raw["optimizer"]
    torch.save(raw, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="--init_from"):
        load_resumable(tmp_path / "weights.pt")


def test_a_start_removes_what_a_killed_one_left(tiny_shards, tmp_path):
    for name in ("step_00000006.pt.tmp", "last.pt.tmp", "last.pt"):
        (tmp_path / name).touch()
    lock_run_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "lock"}
    (tmp_path / RESUME_ME).touch()
    make_trainer(tiny_config(tiny_shards), tmp_path).open_log().close()
    assert not (tmp_path / "resume_me").exists()


def test_an_error_of_the_first_rank_is_raised_and_other_answers_are_plain_values():
    assert from_first_rank(lambda: ("a", ["b"]), CPU) == ("a", ["b"])

    def refuse() -> None:
        raise InputError("where", "found", "expected", "next")

    with pytest.raises(InputError, match=r"where\n  found:    found"):
        from_first_rank(refuse, CPU)
