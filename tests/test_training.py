"""Training: it learns, it resumes exactly, it skips what is not finite, it says what it does."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_program
from common.distributed import DistributedContext, choose_dtype, init_distributed
from common.errors import InputError
from configs.schema import Config, config_from_dict
from configs.skeleton import unnamed
from model import checkpoint
from pipelines.loader import choose_loader, make_batch
from training.metrics import Totals
from training.optimizer import Average, learning_rate
from training.trainer import Run

ROOT = Path(__file__).parents[1]
HERE = DistributedContext(0, 1, torch.device("cpu"), torch.float32)
GPU = pytest.mark.gpu


def tiny_config(shards: Path, **sections: dict) -> Config:
    raw: dict = {
        "data": {"shards": str(shards), "batch_size": 4, "workers": 0, "input_px": 64},
        "heatmaps": {"sigma": 4.0},
        "model": {"stacks": 1, "width": 16, "depth": 2, "stem": [8, 16, 16]},
        "optim": {"schedule": "constant", "lr": 3e-3},
        "train": {"steps": 6, "steps_per_epoch": 6, "log_every": 2, "precision": "fp32"},
        "eval": {"batch_size": 4},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return config_from_dict(raw, "test")


def make_run(config: Config, folder: Path, state=None, dist: DistributedContext = HERE) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, dist, folder, state)


def steps(run: Run, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        totals = Totals(run.dist.device)
        run.network.train()
        run._train_step(totals)
        run.step += 1
        losses.append(totals.sums[0].item())
    return losses


def test_moments_of_another_layout_are_taken_over_element_by_element(tiny_shards, tmp_path):
    """princeton-vl's checkpoints are NCHW, our weights channels-last."""
    config = tiny_config(tiny_shards)
    run = make_run(config, tmp_path / "run")
    steps(run, 2)
    run.save(["last.pt"])
    losses, weights, strides = [], [], []
    for name in ("as saved", "NCHW"):
        state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
        if name == "NCHW":
            for moments in state.optimizer["state"].values():
                moments |= {key: tensor.contiguous() for key, tensor in moments.items()}
        resumed = make_run(config, tmp_path / name, state)
        losses.append(steps(resumed, 2))
        weights.append(resumed.network.state_dict())
        strides += [
            (parameter.stride(), moments["exp_avg"].stride(), moments["exp_avg_sq"].stride())
            for parameter, moments in resumed.optimizer.state.items()
        ]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, weights[1][key]) for key, a in weights[0].items())
    assert len(strides) > 50 and all(len(set(each)) == 1 for each in strides)


def metrics(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_stopped_in_mid_epoch_and_resumed_gives_the_same_weights_bit_for_bit(
    loader, ema, tiny_shards, tmp_path
):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config = tiny_config(
        tiny_shards,
        data={"loader": loader, "preset": "princeton"},
        optim={"ema_decay": ema, "accumulate": 2},
    )
    whole = make_run(config, tmp_path / "whole")
    expected = steps(whole, 5)
    first = make_run(config, tmp_path / "parts")
    begun = steps(first, 2)
    first.save(["last.pt"])
    second = make_run(
        config, tmp_path / "parts", checkpoint.load_checkpoint(tmp_path / "parts" / "last.pt")
    )
    assert begun + steps(second, 3) == expected
    assert second.step == 5
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    if ema:
        assert whole.average and second.average
        for name, tensor in whole.average.tensors.items():
            assert torch.equal(tensor, second.average.tensors[name]), name


def test_it_learns_twelve_people_by_heart(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, data={"preset": "none", "batch_size": 12}, optim={"lr": 1e-2})
    run = make_run(config, tmp_path / "run")
    losses = steps(run, 80)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[10:15])


def test_twenty_steps_give_the_stored_losses(tiny_shards, tmp_path):
    """A change that should keep the results proves itself here; otherwise store the new losses."""
    config = tiny_config(
        tiny_shards,
        data={"preset": "newell", "batch_size": 12},
        model={"stacks": 2},
        optim={"schedule": "cosine", "warmup_steps": 3, "lr": 3e-4},
        train={"steps": 20, "steps_per_epoch": 20},
    )
    losses = steps(make_run(config, tmp_path / "run"), 20)
    stored = json.loads((ROOT / "tests" / "smoke_losses.json").read_text())
    assert len(stored) == 20
    # Other processors and builds of torch round otherwise, and rounding grows over the steps.
    np.testing.assert_allclose(losses, stored, rtol=0.01)
    np.testing.assert_allclose(losses[:5], stored[:5], rtol=2e-3)


def test_a_run_writes_what_it_says_it_writes(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, optim={"ema_decay": 0.9}, train={"steps_per_epoch": 4})
    folder = tmp_path / "run"
    result = make_run(config, folder).train()
    assert {p.name for p in folder.iterdir()} >= {
        "last.pt",
        "best.pt",
        "metrics.jsonl",
        "tensorboard",
    }
    logged = metrics(folder, "train")
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert all(line["people_per_s"] > 0 and 0 <= line["wait_share"] <= 1 for line in logged)
    validated = metrics(folder, "valid")
    assert [line["step"] for line in validated] == [4, 6]
    assert validated[-1]["pckh@0.5_pooled"] == result["pckh"]["0.5"]["pooled"]
    state = checkpoint.load_checkpoint(folder / "last.pt")
    assert state.step == 6 and state.config.train.steps == 6
    assert list((folder / "tensorboard").glob("events.*"))


def test_validation_judges_the_averaged_weights_in_eval_mode(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, optim={"ema_decay": 0.9})
    run = make_run(config, tmp_path / "run")
    steps(run, 3)
    network = run._evaluated_network()
    assert not network.training
    assert run.average
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, run.average.tensors[name])


def test_the_average_follows_its_formula():
    network = torch.nn.Linear(1, 1, bias=False)
    values, decay = [0.0, 1.0, 2.0, 4.0], 0.5
    torch.nn.init.constant_(network.weight, values[0])
    average, expected = Average(network, decay), values[0]
    for step, value in enumerate(values[1:]):
        torch.nn.init.constant_(network.weight, value)
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value
    assert average.tensors["weight"].item() == pytest.approx(expected)


def poison(run: Run, bad_calls: set[int]) -> None:
    """Make the images of some batches not finite."""
    real, calls = make_batch, [0]

    def poisoned(raw, codec, device, **options):
        batch = real(raw, codec, device)
        calls[0] += 1
        if calls[0] - 1 in bad_calls:
            batch = batch._replace(images_N3HW=batch.images_N3HW * float("nan"))
        return batch

    run_module = sys.modules["training.trainer"]
    run_module.make_batch = poisoned  # type: ignore[attr-defined]


@pytest.fixture
def unpoison():
    yield
    sys.modules["training.trainer"].make_batch = make_batch  # type: ignore[attr-defined]


@pytest.mark.usefixtures("unpoison")
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    optimizer, tiny_shards, tmp_path, capsys
):
    config = tiny_config(
        tiny_shards,
        optim={"name": optimizer, "ema_decay": 0.9},
        model={"input_mean": [0.4, 0.4, 0.4]},
        train={"log_every": 1},
    )
    run = make_run(config, tmp_path / "run")
    steps(run, 1)
    before = {name: t.clone() for name, t in run.network.named_parameters()}
    moments = json.dumps(
        [s["step"].item() if "step" in s else 0 for s in run.optimizer.state.values()]
    )
    poison(run, {0})
    run.log = run._open_log()
    totals = Totals(run.dist.device)
    run._train_step(totals)
    for name, tensor in run.network.named_parameters():
        assert torch.equal(tensor, before[name]), name
    after = json.dumps(
        [s["step"].item() if "step" in s else 0 for s in run.optimizer.state.values()]
    )
    assert after == moments
    run._report(totals)
    assert "skipped 1 of the last 1 steps" in capsys.readouterr().err
    assert all(torch.isfinite(b).all() for b in run.network.buffers())
    assert run.average and all(torch.isfinite(t).all() for t in run.average.tensors.values())
    assert np.isfinite(steps(run, 1)).all()


@pytest.mark.usefixtures("unpoison")
def test_too_many_such_steps_in_a_row_stop_the_run(tiny_shards, tmp_path):
    config = tiny_config(
        tiny_shards, train={"steps": 30, "steps_per_epoch": 30, "max_bad_steps": 4, "log_every": 2}
    )
    run = make_run(config, tmp_path / "run")
    poison(run, set(range(3, 30)))
    with pytest.raises(InputError, match=r"step 8"):
        run.train()


def test_a_collapse_to_zero_is_said(tiny_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.trainer.COLLAPSE_FROM_STEP", 1)
    config = tiny_config(tiny_shards, train={"steps": 1, "steps_per_epoch": 1}, optim={"lr": 1e-9})
    run = make_run(config, tmp_path / "run")
    torch.nn.init.zeros_(run.network.heads[0].weight)
    torch.nn.init.zeros_(run.network.heads[0].bias)
    run.train()
    assert "nothing but zeros" in capsys.readouterr().err


def test_the_time_limit_ends_with_a_validation_and_a_checkpoint(tiny_shards, tmp_path, capsys):
    config = tiny_config(
        tiny_shards,
        train={"steps": 10_000, "steps_per_epoch": 10_000, "max_minutes": 0.01, "log_every": 1},
    )
    run = make_run(config, tmp_path / "run")
    run.train()
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert 0 < state.step < 10_000
    assert [line["step"] for line in metrics(tmp_path / "run", "valid")] == [state.step]
    assert "max_minutes 0.01 is over" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train(precision, tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"precision": precision})
    dist = HERE._replace(dtype=choose_dtype(precision, HERE.device))
    run = make_run(config, tmp_path / "run", dist=dist)
    before = run.network.heads[0].weight.clone()
    assert np.isfinite(steps(run, 3)).all()
    assert not torch.equal(before, run.network.heads[0].weight)
    assert run.network.heads[0].weight.dtype == torch.float32
    assert run.scaler.is_enabled() == (precision == "fp16")


def test_gradient_clipping_bounds_the_norm(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, optim={"clip_norm": 1e-3, "name": "rmsprop"})
    run = make_run(config, tmp_path / "run")
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda o, *_: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in run.network.parameters()]).item()
        )
    )
    steps(run, 2)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_learning_rates_by_hand():
    optim = dataclasses.replace(
        Config().optim, lr=1.0, warmup_steps=4, milestones=(10, 20), gamma=0.1
    )
    step = [learning_rate(optim, s, 100) for s in (0, 3, 9, 10, 20)]
    assert step == pytest.approx([0.25, 1.0, 1.0, 0.1, 0.01])
    cosine = dataclasses.replace(optim, schedule="cosine", final_fraction=0.0)
    assert learning_rate(cosine, 4 + 48, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0, abs=1e-9)


def test_weights_alone_may_start_a_run_with_another_number_of_joints(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, model={"stacks": 2})
    run = make_run(config, tmp_path / "run")
    run.save(["last.pt"])
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    network = checkpoint.build_network(config, joints=5)
    fresh = checkpoint.init_weights(network, unnamed(5), state)
    assert fresh == ["heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias",
                     "merge_heatmaps.0.weight"]  # fmt: skip
    assert torch.equal(network.stem.conv[0].weight, state.weights["stem.conv.0.weight"])


def test_a_checkpoint_of_another_architecture_names_the_tensors(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards), tmp_path / "run")
    run.save(["last.pt"])
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    wider = checkpoint.build_network(tiny_config(tiny_shards, model={"width": 32}), 16)
    with pytest.raises(InputError, match=r"stem\.residual3\.conv1\.weight is \(8, 16, 1, 1\)"):
        checkpoint.load_weights(wider, state.weights, tmp_path / "last.pt")


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04" + b"\0" * 60], ids=["empty", "text", "zip"]
)
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt"):
        checkpoint.load_checkpoint(tmp_path / "x.pt")


def test_a_truncated_checkpoint_and_one_of_another_version_are_refused(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    run.save(["last.pt"])
    data = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.pt"):
        checkpoint.load_checkpoint(tmp_path / "cut.pt")
    torch.save({"format": checkpoint.FORMAT, "format_version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="version 99"):
        checkpoint.load_checkpoint(tmp_path / "new.pt")


def test_a_checkpoint_never_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"format": checkpoint.FORMAT, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError):
        checkpoint.load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.write_archive(tmp_path / "last.pt", {"step": 1})
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        checkpoint.write_archive(tmp_path / "last.pt", {"step": 2})
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_folder_that_exists_is_refused_without_resume(tmp_path):
    last = tmp_path / "last.pt"
    with pytest.raises(InputError, match="no checkpoint yet") as caught:
        train_program.find_start(tmp_path, None, [])
    assert "remove this folder" in caught.value.next_step
    with pytest.raises(InputError, match=r"last\.pt"):
        train_program.find_start(tmp_path, "", [])
    last.write_bytes(b"")
    with pytest.raises(InputError, match="--resume"):
        train_program.find_start(tmp_path, None, [])


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [("optim", {"name": "rmsprop"}, "optim.name was adam, is rmsprop"),
     ("data", {"batch_size": 6}, "data.batch_size was 4, is 6"),
     ("heatmaps", {"rule": "hrnet"}, "heatmaps.rule was exact, is hrnet"),
     ("model", {"width": 32}, "model.width was 16, is 32")],
)  # fmt: skip
def test_resuming_with_settings_of_another_run_is_refused(
    section, values, named, tiny_shards, tmp_path
):
    make_run(tiny_config(tiny_shards), tmp_path).save(["last.pt"])
    other = tiny_config(tiny_shards, **{section: values})
    with pytest.raises(InputError, match=named):
        make_run(other, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt"))


def test_settings_that_may_change_are_remarked_on_and_take_effect(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    steps(run, 1)
    run.save(["last.pt"])
    other = tiny_config(tiny_shards, optim={"weight_decay": 0.5, "lr": 1e-4}, train={"steps": 9})
    again = make_run(other, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt"))
    assert again.remarks == ["changed on resuming: optim.lr was 0.003, is 0.0001",
                             "changed on resuming: optim.weight_decay was 0.0, is 0.5"]  # fmt: skip
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_run_resumed_in_another_folder_has_a_best_of_its_own(tiny_shards, tmp_path):
    first = make_run(tiny_config(tiny_shards), tmp_path / "a")
    first.best = 0.9
    first.save(["last.pt"])
    source = tmp_path / "a" / "last.pt"
    (tmp_path / "b").mkdir()
    moved = Run(tiny_config(tiny_shards), HERE, tmp_path / "b", checkpoint.load_checkpoint(source))
    kept = Run(tiny_config(tiny_shards), HERE, tmp_path / "a", checkpoint.load_checkpoint(source))
    assert (moved.best, kept.best) == (-1.0, 0.9)


def test_lines_after_the_checkpoint_are_dropped_on_resuming(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"log_every": 1})
    first = make_run(config, tmp_path)
    first.train()
    state = dataclasses.replace(checkpoint.load_checkpoint(tmp_path / "last.pt"), step=3)
    make_run(config, tmp_path, state).train()
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.slow) for s in
                      (signal.SIGTERM, signal.SIGUSR1))],
)  # fmt: skip
def test_a_signal_ends_the_step_and_keeps_it(number, tiny_shards, tmp_path):
    words = ["--data.shards", tiny_shards, "--train.out", tmp_path, "--train.name", "r", *SMALL,
             "--train.steps", 100_000, "--train.steps_per_epoch", 100_000,
             "--data.workers", 1]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = tmp_path / "r" / "metrics.jsonl"
    for _ in range(600):
        if lines.exists() and lines.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    _, text = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "STOPPED EARLY" in text and "Traceback" not in text
    state = checkpoint.load_checkpoint(tmp_path / "r" / "last.pt")
    assert state.step >= 3
    more = [*words, "--train.steps", state.step + 2]
    assert command(*more, "--resume").returncode == 0


def command(*words: object, program: str = "train.py") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, program, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


SMALL = ["--data.batch_size", 4, "--data.workers", 0, "--data.input_px", 64, "--model.width", 16,
         "--model.depth", 2, "--model.stacks", 1, "--model.stem", "[8,16,16]", "--train.steps", 4,
         "--train.steps_per_epoch", 2, "--train.log_every", 1]  # fmt: skip


def test_train_then_resume_from_the_command_line(tiny_shards, tmp_path):
    words = ["--data.shards", tiny_shards, "--train.out", tmp_path, "--train.name", "r", *SMALL]
    first = command(*words)
    assert first.returncode == 0, first.stderr
    assert "batch: 4 = 4 per rank x 1 rank(s) x 1" in first.stdout
    assert "\nstep 1/4  " in first.stderr and "\r" not in first.stderr
    refused = command(*words)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    more = [*words, "--train.steps", 15]
    second = command(*more, "--resume", "--profile")
    assert second.returncode == 0, second.stderr
    assert [m["step"] for m in metrics(tmp_path / "r", "train")] == list(range(1, 16))
    assert "aten::" in second.stderr
    assert "convolution" in (tmp_path / "r" / "trace.json").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_run_that_another_process_trains_is_refused(tiny_shards, tmp_path):
    held = "import sys, pathlib; from training import keeping; keeping.begin(pathlib.Path("
    held += "sys.argv[1]), []); print('held', flush=True); sys.stdin.read()"
    words = ["--data.shards", tiny_shards, "--train.out", tmp_path, "--train.name", "r", *SMALL]
    with subprocess.Popen([sys.executable, "-c", held, tmp_path / "r"], cwd=ROOT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout.readline() == b"held\n"
        done = command(*words, "--resume", "auto")
        assert done.returncode == 2 and f"(process {other.pid} on " in done.stderr, done.stderr
        other.communicate()
    assert command(*words, "--resume", "auto").returncode == 0, "the lock outlived its process"
    again = command(*words, "--resume")
    assert "The run was done: step 4 is its last" in again.stdout


def test_an_output_folder_in_a_file_is_one_message(tiny_shards, tmp_path):
    (tmp_path / "file").touch()
    done = command("--data.shards", tiny_shards, "--train.out", tmp_path / "file", *SMALL)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'file'}" in done.stderr


def test_training_without_shards_says_what_to_do(tmp_path):
    done = command("--data.shards", tmp_path / "none", "--train.out", tmp_path, *SMALL)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tools/make_shards.py" in done.stderr
    assert not (tmp_path / "hourglass").exists(), "a run that never began left a folder"


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("fault", ["a tar cut off", "an index of another tar", "a lying manifest"])
def test_a_run_on_damaged_shards_is_refused_before_it_begins(fault, split, tiny_shards, tmp_path):
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    if fault == "a tar cut off":
        os.truncate(data / split / "00000.tar", 30_000)
    elif fault == "an index of another tar":
        other = {"train": "train/00001.idx", "valid": "train/00000.idx"}[split]
        shutil.copy(data / other, data / split / "00000.idx")
    else:
        manifest = data / split / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"people": 5', '"people": 4', 1))
    with pytest.raises(InputError) as caught:
        make_run(tiny_config(data), tmp_path / "run")
    assert str(data / split) in caught.value.where and not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_two_ranks_train_validate_and_resume_under_torchrun(tiny_shards, tmp_path):
    words = ["--data.shards", tiny_shards, "--train.out", tmp_path, "--train.name", "r", *SMALL,
             "--train.device", "cpu"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    first = command(*launch[1:], *words, program="-m")
    assert first.returncode == 0, first.stderr
    assert "batch: 8 = 4 per rank x 2 rank(s) x 1" in first.stdout
    state = checkpoint.load_checkpoint(tmp_path / "r" / "last.pt")
    assert state.run.ranks == 2 and len(state.run.rng) == 2
    second = command(*launch[1:], *words, "--train.steps", 6, "--resume", program="-m")
    assert second.returncode == 0, second.stderr
    assert [m["step"] for m in metrics(tmp_path / "r", "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_a_compiled_network_trains_like_a_plain_one(tiny_shards, tmp_path):
    plain = make_run(tiny_config(tiny_shards), tmp_path / "plain")
    compiled = make_run(tiny_config(tiny_shards, train={"compile": True}), tmp_path / "compiled")
    np.testing.assert_allclose(steps(compiled, 3), steps(plain, 3), rtol=1e-3)


@GPU
@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains(loader, compiled, tiny_shards, tmp_path):
    dist = init_distributed("cuda", "auto")
    config = tiny_config(tiny_shards, data={"loader": loader}, train={"compile": compiled})
    run = make_run(config, tmp_path / "run", dist=dist)
    assert np.isfinite(steps(run, 4)).all()
    assert np.isfinite(run.validate()["auc"])
    assert dist.dtype in (torch.bfloat16, torch.float16)
    assert choose_loader("auto", dist.device) == "dali"
