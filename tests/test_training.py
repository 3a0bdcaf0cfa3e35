"""Training: it learns, it skips what is not finite, it keeps the checkpoints that it should."""

import dataclasses
import json
import re
import shutil
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import (
    CPU,
    leaves,
    make_trainer,
    metrics,
    poison,
    step,
    steps,
    tiny_config,
    train_options,
)

import train
from common import distributed
from common.distributed import choose_dtype, init_distributed
from common.errors import InputError
from configs.schema import Config
from evaluation.inference import predict_distributed
from model.checkpoint import load_checkpoint
from pipelines.loader import choose_loader
from training import checkpoint_manager
from training.checkpoint_manager import step_checkpoints
from training.metrics import MetricsLogger, TimeShares
from training.train_step import AveragedModel, learning_rate


def test_twenty_steps_give_the_stored_losses(tiny_shards, tmp_path):
    """A change that should keep the results proves itself here; otherwise store the new losses."""
    config = tiny_config(
        tiny_shards,
        data={"preset": "newell", "batch_size": 12},
        model={"stacks": 2},
        optim={"schedule": "cosine", "warmup_steps": 3, "lr": 3e-4},
        train={"steps": 20, "steps_per_epoch": 20},
    )
    losses = steps(make_trainer(config, tmp_path / "run"), 20)
    stored = json.loads((ROOT / "tests" / "smoke_losses.json").read_text())
    assert len(stored) == 20
    # Other processors and builds of torch round otherwise, and rounding grows over the steps.
    np.testing.assert_allclose(losses, stored, rtol=0.01)
    np.testing.assert_allclose(losses[:5], stored[:5], rtol=2e-3)


def test_a_run_writes_its_checkpoints_and_every_number(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"steps_per_epoch": 4})
    result = make_trainer(config, tmp_path).train()
    names = {"last.pt", "best.pt", "metrics.jsonl", "config.yaml", "validation.jpg", "curves.png"}
    assert {p.name for p in tmp_path.iterdir()} >= names
    logged = metrics(tmp_path, "train")
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert all(line["people_per_s"] > 0 and 0 <= line["wait_share"] <= 1 for line in logged)
    validated = metrics(tmp_path, "valid")
    assert [line["step"] for line in validated] == [4, 6]
    assert validated[-1]["pckh@0.5_pooled"] == result["pckh"]["0.5"]["pooled"]
    last = load_checkpoint(tmp_path / "last.pt")
    assert last.step == 6 and last.config == config


def test_an_epoch_writes_one_checkpoint_before_its_validation_ends(
    tiny_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(MetricsLogger, "log_pictures", lambda *_: None)
    written, stood, save = [], [], checkpoint_manager.save_checkpoint
    trainer = make_trainer(tiny_config(tiny_shards, train={"steps_per_epoch": 2}), tmp_path)
    run = trainer.validator.run

    def validate(*arguments):
        trainer.checkpoints.wait()
        stood.append(load_checkpoint(tmp_path / "last.pt").step)
        return run(*arguments)

    monkeypatch.setattr(trainer.validator, "run", validate)
    monkeypatch.setattr(
        checkpoint_manager, "save_checkpoint", lambda *a: [written.append(a[1].step), save(*a)]
    )
    trainer.train()
    assert written == stood == [2, 4, 6]


def test_a_checkpoint_holds_the_state_of_its_step_while_training_continues(
    tiny_shards, tmp_path, monkeypatch
):
    trainer = make_trainer(tiny_config(tiny_shards, optim={"ema_decay": 0.9}), tmp_path)
    steps(trainer, 1)
    may_write, save = threading.Event(), checkpoint_manager.save_checkpoint
    monkeypatch.setattr(
        checkpoint_manager, "save_checkpoint", lambda *a: [may_write.wait(60), save(*a)]
    )
    own = trainer._checkpoint([b""])
    expected = leaves([own.weights, own.averaged, own.optimizer])
    trainer.start_saving(["last.pt"])
    steps(trainer, 2)
    assert not (tmp_path / "last.pt").exists()
    may_write.set()
    trainer.checkpoints.wait()
    found = load_checkpoint(tmp_path / "last.pt")
    assert leaves([found.weights, found.averaged, found.optimizer]) == expected
    assert not torch.equal(found.weights["heads.0.bias"], trainer.network.heads[0].bias)


def test_a_checkpoint_is_written_after_save_minutes_without_one(tiny_shards, tmp_path, monkeypatch):
    """A step takes four minutes: at 12 min, 24 min, the end of the epoch at 28, 40 min, the end."""
    clock, saved = [0.0], []
    monkeypatch.setattr(MetricsLogger, "log_pictures", lambda *_: None)
    options = {"steps": 11, "steps_per_epoch": 7, "log_every": 5, "save_minutes": 10}
    trainer = make_trainer(tiny_config(tiny_shards, train=options), tmp_path)
    run, save = trainer.train_step.run, trainer.start_saving

    def slow(*arguments):
        run(*arguments)
        clock[0] += 240.0

    def recorded(names):
        saved.append(trainer.progress.step)
        save(names)

    monkeypatch.setattr(trainer.train_step, "run", slow)
    monkeypatch.setattr(trainer, "start_saving", recorded)
    monkeypatch.setattr("training.trainer.time.perf_counter", lambda: clock[0])
    trainer.train()
    assert saved == [3, 6, 7, 10, 11]
    assert [x["step"] for x in metrics(tmp_path, "train")] == [3, 5, 6, 7, 10, 11]


def test_the_newest_checkpoints_and_the_best_are_kept(tiny_shards, tmp_path, monkeypatch):
    config = tiny_config(tiny_shards, train={"steps": 5, "steps_per_epoch": 1, "keep_last": 3})
    trainer = make_trainer(config, tmp_path)
    pooled = iter([0.1, 0.7, 0.2, 0.3, 0.2])
    monkeypatch.setattr(
        trainer.validator,
        "run",
        lambda *_: {
            "pckh": {"0.5": {"pooled": next(pooled)}, "0.1": {"pooled": 0.0}},
            "auc": 0.0,
            "peak": 1.0,
            "people": 5,
            "people_scored": 5,
            "joints_counted": 70,
            "sets": {},
        },
    )
    monkeypatch.setattr(MetricsLogger, "log_pictures", lambda *_: None)
    monkeypatch.setattr(trainer.validator, "picture", lambda: None)
    trainer.train()
    names = [path.name for path in step_checkpoints(tmp_path)]
    assert names == [f"step_{n:08d}.pt" for n in (5, 4, 3)]
    assert load_checkpoint(tmp_path / "best.pt").step == 2
    assert load_checkpoint(tmp_path / "last.pt").step == 5
    assert not list(tmp_path.glob("*.tmp"))


def test_a_time_limit_that_ends_before_the_last_step_is_announced_once(
    tiny_shards, tmp_path, monkeypatch
):
    """After 100 steps in one of two minutes, at half a second each, 120 more are possible."""
    config = tiny_config(tiny_shards, train={"steps": 500, "max_minutes": 2.0})
    trainer, lines = make_trainer(config, tmp_path), []
    trainer.log, trainer.time = types.SimpleNamespace(info=lines.append), TimeShares()
    trainer.progress.step = 100
    for spent, seconds_per_step in ((5, 9.0), (60, 0.5), (60, 9.0)):  # the first is too early
        trainer.time.started = time.perf_counter() - spent
        trainer._warn_of_time_limit(seconds_per_step)
    (line,) = lines
    reached = int(re.search(r"allows about (\d+) of 500 steps", line)[1])
    assert 215 <= reached <= 220 and f"--train.steps {reached} fits" in line


def test_validation_uses_the_averaged_weights_in_eval_mode(tiny_shards, tmp_path):
    trainer = make_trainer(tiny_config(tiny_shards, optim={"ema_decay": 0.9}), tmp_path)
    steps(trainer, 3)
    network = trainer.evaluation_network()
    assert not network.training
    averaged, current = trainer.train_step.averaged_weights, trainer.network.state_dict()
    assert all(torch.equal(t, averaged[name]) for name, t in network.state_dict().items())
    assert not torch.equal(averaged["heads.0.weight"], current["heads.0.weight"])


def test_a_run_validates_through_its_own_loader(tiny_shards, tmp_path):
    """The two loaders' crops differ by some grey levels, so their predictions are not equal."""
    pytest.importorskip("nvidia.dali")
    trainer = make_trainer(tiny_config(tiny_shards, data={"loader": "dali"}), tmp_path)
    network, valid = trainer.evaluation_network(), trainer.validator
    valid.run(network)
    arguments = network, valid.shards, valid.samples, trainer.codec, CPU
    dali, opencv = (
        predict_distributed(*arguments, loader=loader, batch_size=4, workers=0, flip=True)
        for loader in ("dali", "opencv")
    )
    assert np.array_equal(valid.found.keypoints_NJ2, dali.keypoints_NJ2)
    assert not np.array_equal(valid.found.keypoints_NJ2, opencv.keypoints_NJ2)


def test_the_average_follows_its_formula_from_the_first_step():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    values, decay = [0.0, 1.0, 2.0, 4.0], 0.5
    torch.nn.init.constant_(network[0].weight, values[0])
    averaged, expected = AveragedModel(network, decay), values[0]
    for number, value in enumerate(values[1:]):
        torch.nn.init.constant_(network[0].weight, value)
        network[1].num_batches_tracked += 1
        averaged.update(number)
        d = min(decay, (1 + number) / (10 + number))
        expected = d * expected + (1 - d) * value
    assert averaged.module[0].weight.item() == pytest.approx(expected)
    assert averaged.module[1].num_batches_tracked == 3, "counters are copied"


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_step_that_is_not_finite_changes_nothing(
    optimizer, tiny_shards, tmp_path, capsys, monkeypatch
):
    config = tiny_config(
        tiny_shards,
        optim={"name": optimizer, "ema_decay": 0.9},
        model={"input_mean": [0.4, 0.4, 0.4]},
    )
    trainer = make_trainer(config, tmp_path)
    trainer.log = trainer.open_log()
    steps(trainer, 1)
    trainer.report(step(trainer))
    before = {name: t.clone() for name, t in trainer.network.named_parameters()}
    mean = "stem.conv.1.running_mean"
    averaged_mean = trainer.train_step.averaged_weights[mean].clone()
    moments = [s["step"].item() for s in trainer.train_step.optimizer.state.values()]
    poison(monkeypatch, [0])
    trainer.report(step(trainer))
    assert "skipped 1 of the last 1 steps" in capsys.readouterr().err
    assert all(torch.equal(t, before[name]) for name, t in trainer.network.named_parameters())
    assert moments == [s["step"].item() for s in trainer.train_step.optimizer.state.values()]
    assert all(torch.isfinite(buffer).all() for buffer in trainer.network.buffers())
    assert torch.equal(trainer.train_step.averaged_weights[mean], averaged_mean)
    assert not torch.equal(averaged_mean, trainer.network.state_dict()[mean])
    assert np.isfinite(steps(trainer, 1)).all()
    trainer.log.close()


@pytest.mark.parametrize(
    ("bad", "limit", "ends_at"),
    [
        (range(1, 7), 6, 8),  # from the middle of one log interval to the middle of another
        ([0, 1, 2, 4, 5, 6], 3, 4),
        ([0, 1, 2, 4, 5, 6], 4, None),
    ],
)
def test_skipped_steps_in_a_row_stop_the_run_at_the_limit(
    bad, limit, ends_at, tiny_shards, tmp_path, monkeypatch
):
    options = {"steps": 12, "steps_per_epoch": 12, "log_every": 4, "max_bad_steps": limit}
    trainer = make_trainer(tiny_config(tiny_shards, train=options), tmp_path)
    monkeypatch.setattr(trainer, "_finish_epoch", dict)
    poison(monkeypatch, bad)
    if ends_at is None:
        trainer.train()
        return
    with pytest.raises(InputError, match=f"step {ends_at}\n.*{limit} steps in a row"):
        trainer.train()


def test_the_people_of_skipped_steps_are_written_down(tiny_shards, tmp_path, monkeypatch):
    config = tiny_config(tiny_shards, optim={"accumulate": 2}, train={"log_every": 3})
    trainer = make_trainer(config, tmp_path)
    poison(monkeypatch, [3])  # the second batch of the second step
    hand_out, rows = trainer.loader.next, []

    def record():
        raw = hand_out()
        rows.append(raw.records_NR[:, 0].int().tolist())
        return raw

    monkeypatch.setattr(trainer.loader, "next", record)
    monkeypatch.setattr(trainer, "_finish_epoch", dict)
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2]
    assert [line["loss_is_finite"] for line in lines] == [True, False]
    assert [line["rows"] for line in lines] == rows[2:4]
    people, samples = trainer.shards.people()
    assert lines[1]["people"] == [
        f"{people.images[row]} ({trainer.shards.where(samples[row])})" for row in rows[3]
    ]
    logged = metrics(tmp_path, "train")
    assert [line["bad_steps"] for line in logged] == [1, 0]


def half_precision_trainer(shards: Path, folder: Path, **options: object):
    options = {"steps": 30, "steps_per_epoch": 30, "precision": "fp16", **options}
    config = tiny_config(shards, train=options, optim={"ema_decay": 0.9})
    return make_trainer(config, folder, dist=CPU._replace(dtype=torch.float16))


def test_with_fp16_the_search_for_a_scale_is_no_fault(tiny_shards, tmp_path, capsys):
    trainer = half_precision_trainer(tiny_shards, tmp_path, steps=8, max_bad_steps=2)
    trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    before = trainer.network.heads[0].weight.clone()
    trainer._finish_epoch = dict
    trainer.train()
    assert trainer.train_step.scaler.get_scale() < 2.0**21, "gradients overflow before"
    assert not torch.equal(trainer.network.heads[0].weight, before)
    assert "skipped" not in capsys.readouterr().err
    assert sum(line["bad_steps"] for line in metrics(tmp_path, "train")) == 0


def test_with_fp16_a_scale_without_room_is_a_fault(tiny_shards, tmp_path):
    trainer = half_precision_trainer(tiny_shards, tmp_path, max_bad_steps=3, log_every=1)
    trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.network.heads[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(InputError, match="3 steps in a row"):
        trainer.train()
    # The scale of 4 is halved at each step, and from the 3rd on it has no room left.
    lines = [json.loads(x) for x in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5]
    assert all(line["loss_is_finite"] for line in lines)


def test_with_fp16_a_loss_that_is_not_finite_is_counted_and_spoils_nothing(
    tiny_shards, tmp_path, capsys, monkeypatch
):
    trainer = half_precision_trainer(tiny_shards, tmp_path, steps=6, steps_per_epoch=6)
    poison(monkeypatch, [2, 3])
    trainer._finish_epoch = dict
    trainer.train()
    assert capsys.readouterr().err.count("skipped 2 of the last 2 steps") == 1
    logged = metrics(tmp_path, "train")
    assert [line["bad_steps"] for line in logged] == [0, 2, 0]
    assert [line["loss"] is None for line in logged] == [False, True, False]
    last = load_checkpoint(tmp_path / "last.pt")
    for weights in (last.weights, last.averaged):
        assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_float32_weights(precision, tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"precision": precision})
    dist = CPU._replace(dtype=choose_dtype(precision, CPU.device))
    trainer = make_trainer(config, tmp_path, dist=dist)
    before = trainer.network.heads[0].weight.clone()
    assert np.isfinite(steps(trainer, 3)).all()
    weight = trainer.network.heads[0].weight
    assert weight.dtype == torch.float32 and not torch.equal(before, weight)
    assert trainer.train_step.scaler.is_enabled() == (precision == "fp16")


def test_gradient_clipping_bounds_the_norm(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, optim={"clip_norm": 1e-3, "name": "rmsprop"})
    trainer = make_trainer(config, tmp_path)
    norms = []
    trainer.train_step.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in trainer.network.parameters()]).item()
        )
    )
    steps(trainer, 2)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_learning_rates_by_hand():
    optim = dataclasses.replace(
        Config().optim, lr=1.0, warmup_steps=4, milestones=(10, 20), gamma=0.1
    )
    rates = [learning_rate(optim, s, 100) for s in (0, 3, 9, 10, 20)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.1, 0.01])
    cosine = dataclasses.replace(optim, schedule="cosine", final_fraction=0.0)
    assert learning_rate(cosine, 4 + 48, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("workers", "device", "cores", "expected"),
    [
        ("auto", "cuda", 32, 6),
        ("auto", "cuda", 8, 1),
        ("auto", "cpu", 64, 4),
        ("auto", "cpu", 2, 1),
        (0, "cuda", 32, 0),
        (9, "cpu", 2, 9),
    ],
)
def test_automatic_workers_are_a_share_of_a_ranks_cores(
    workers, device, cores, expected, monkeypatch
):
    """Four ranks: 8 cores each of 32, less two on a GPU; a quarter of 16 on a CPU."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "usable_cores", lambda: cores)
    assert distributed.loader_workers(workers, torch.device(device)) == expected


def test_automatic_workers_are_stored_as_a_number(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 8)
    config = tiny_config(tiny_shards, data={"workers": "auto"})
    trainer = make_trainer(config, tmp_path)
    trainer.open_log().close()
    trainer.save(["last.pt"])
    assert "workers: 2\n" in (tmp_path / "config.yaml").read_text()
    assert load_checkpoint(tmp_path / "last.pt").config.data.workers == 2


def test_a_collapse_to_zero_is_reported(tiny_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.learning_check.FROM_STEP", 1)
    config = tiny_config(tiny_shards, train={"steps": 2, "steps_per_epoch": 2}, optim={"lr": 1e-9})
    trainer = make_trainer(config, tmp_path)
    torch.nn.init.zeros_(trainer.network.heads[0].weight)
    torch.nn.init.zeros_(trainer.network.heads[0].bias)
    trainer.train()
    assert "almost only zeros" in capsys.readouterr().err


def test_the_time_limit_ends_with_a_validation_and_a_checkpoint(tiny_shards, tmp_path, capsys):
    options = {"steps": 10_000, "steps_per_epoch": 10_000, "max_minutes": 0.005, "log_every": 1}
    make_trainer(tiny_config(tiny_shards, train=options), tmp_path).train()
    stopped_at = load_checkpoint(tmp_path / "last.pt").step
    assert 0 < stopped_at < 10_000
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [stopped_at]
    assert "max_minutes 0.005 is over" in capsys.readouterr().err


def test_the_faster_number_of_threads_is_measured_used_and_stored(
    tiny_shards, tmp_path, monkeypatch, capsys
):
    """Time is simulated: with 4 threads a step takes 3 s, with 3 beside one worker 4 s."""
    threads, clock = [3], [0.0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "cores_per_rank", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = {"steps": 30, "steps_per_epoch": 30, "threads": 0}
    trainer = make_trainer(tiny_config(tiny_shards, train=options), tmp_path)
    assert threads[-1] == 3, "the measurement begins with the free cores"
    real = trainer.train_step.run

    def timed(*arguments):
        real(*arguments)
        clock[0] += {3: 4.0, 4: 3.0}[threads[-1]]

    monkeypatch.setattr(trainer.train_step, "run", timed)
    monkeypatch.setattr("training.trainer.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer, "_finish_epoch", dict)
    trainer.train()
    assert set(threads[1:]) == {3, 4} and threads[-1] == 4 and threads.count(3) > 8
    assert "4000 ms a step with 3, 3000 ms a step with 4" in capsys.readouterr().err
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved.config.train.threads == 4
    assert "threads: 4" in (tmp_path / "config.yaml").read_text()
    resumed = make_trainer(tiny_config(tiny_shards, train=options), tmp_path, saved)
    assert resumed.config.train.threads == resumed.saved_config.train.threads == 4


@pytest.fixture
def tuner(monkeypatch):
    """Of a run on two cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "cores_per_rank", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    dist = distributed.DistributedContext(0, 1, torch.device("cpu"), torch.float32)
    return distributed.ThreadTuner(dist, threads=0, workers=0)


def test_one_far_slower_step_ends_the_measurement_of_threads(tuner):
    assert not any(tuner.add_step(0.1) for _ in range(8)), "warm-up and one thread"
    assert tuner.add_step(8.0) == {1: 0.1, 2: 8.0}
    assert tuner.add_step(0.1) == {}


def test_a_run_returns_to_fewer_threads_if_steps_become_far_slower(tuner):
    steps = [0.2] * 8 + [0.1] * 4 + [0.2] * 4 + [0.1] * 3
    assert not any(map(tuner.add_step, steps))
    assert tuner.add_step(0.1) == {1: 0.2, 2: 0.1}
    assert not any(map(tuner.add_step, [2.0, 0.1, 2.0, 2.0, 2.0]))
    assert tuner.add_step(2.0) == {1: 0.2, 2: 2.0}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_run_on_damaged_shards_is_refused_before_it_begins(split, tiny_shards, tmp_path):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    tar = data / split / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:30_000])
    with pytest.raises(InputError) as caught:
        make_trainer(tiny_config(data), tmp_path / "run")
    assert str(data / split) in caught.value.where and not list((tmp_path / "run").iterdir())


def test_train_then_resume_from_the_command_line(tiny_shards, tmp_path, capfd):
    words = train_options(tiny_shards, tmp_path, "r", "--train.steps_per_epoch 4")
    assert train.main(words) == 0
    text = capfd.readouterr()
    assert "batch: 4 = 4 per rank x 1 rank(s) x 1" in text.out
    assert f"Next: python evaluate.py --checkpoint {tmp_path / 'r' / 'best.pt'}" in text.out
    assert all(path.name in text.out for path in (tmp_path / "r").iterdir())
    assert "\nstep 1/4  " in text.err and "\r" not in text.err
    with pytest.raises(InputError, match="a run of this name"):
        train.main(words)
    assert train.main([*words, "--resume"]) == 0
    assert "The run was complete: step 4 is its last" in capfd.readouterr().out
    assert train.main([*words, "--train.steps", "6", "--resume"]) == 0
    assert [m["step"] for m in metrics(tmp_path / "r", "train")] == list(range(1, 7))


def test_a_new_run_may_start_from_the_weights_of_another(tiny_shards, tmp_path, capsys):
    words = train_options(tiny_shards, tmp_path, "second")
    first = make_trainer(tiny_config(tiny_shards), tmp_path / "first")
    steps(first, 2)
    first.save(["last.pt"])
    source = tmp_path / "first" / "last.pt"
    more = ["--init_from", str(source), "--optim.lr", "1e-30"]
    assert train.main([*words, *more]) == 0
    count = len(first.network.state_dict())
    assert f"weights from {source}: {count} tensors loaded\n" in capsys.readouterr().err
    mine = load_checkpoint(tmp_path / "second" / "last.pt")
    theirs = load_checkpoint(source)
    assert mine.step == 4 and torch.equal(
        mine.weights["heads.0.weight"], theirs.weights["heads.0.weight"]
    )
    with pytest.raises(InputError, match="one of them"):
        train.main([*words, "--init_from", str(source), "--resume", str(source)])


def test_short_memory_keeps_its_traceback_and_adds_what_to_change(
    tiny_shards, tmp_path, monkeypatch
):
    def allocate_too_much(*arguments):
        torch.empty(1 << 55, dtype=torch.uint8)

    monkeypatch.setattr(train.Trainer, "train", allocate_too_much)
    with pytest.raises(RuntimeError, match="allocate") as caught:
        train.main(train_options(tiny_shards, tmp_path, "run"))
    assert caught.value.__notes__ == [train.OUT_OF_MEMORY]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_like_a_plain_one(tiny_shards, tmp_path):
    """Other rounding grows from step to step; it was 4e-5 in the second and 2e-3 in the third."""
    plain = make_trainer(tiny_config(tiny_shards), tmp_path / "plain")
    compiled = make_trainer(tiny_config(tiny_shards, train={"compile": True}), tmp_path / "fast")
    losses = [steps(trainer, 3) for trainer in (compiled, plain)]
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-3)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains(loader, compiled, tiny_shards, tmp_path):
    dist = init_distributed("cuda", "auto")
    config = tiny_config(tiny_shards, data={"loader": loader}, train={"compile": compiled})
    trainer = make_trainer(config, tmp_path, dist=dist)
    assert np.isfinite(steps(trainer, 4)).all()
    assert np.isfinite(trainer.validator.run(trainer.evaluation_network())["auc"])
    assert dist.dtype in (torch.bfloat16, torch.float16)
    assert choose_loader("auto", dist.device) == "dali"
