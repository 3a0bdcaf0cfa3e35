"""Faults are injected: damaged files, full disks, signals, numbers that are not finite."""

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, may_mount
from test_training import HERE, SMALL, make_run, metrics, poison, steps, tiny_config, unpoison
from two_ranks import leaves

import train as train_program
import training.trainer
from common.errors import InputError
from configs.schema import Config, save_yaml
from configs.skeleton import MPII
from model import checkpoint
from pipelines.opencv_loader import STOP_SIGNALS
from training import checkpoint_manager as keeping
from training import preemption as signals
from training.metrics import Totals, cut
from training.trainer import Run

__all__ = ["unpoison"]


def flipped(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def sealed(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    make_run(tiny_config(tiny_shards), folder).save(["last.pt"])
    return folder / "last.pt"


def test_a_bit_flipped_anywhere_and_a_cut_anywhere_are_found(sealed, tmp_path):
    size, rng = sealed.stat().st_size, random.Random(0)
    places = [0, 3, size - 1, size - 65, size - 71, size - 72, size - 73, size - 93]
    places += [rng.randrange(size) for _ in range(60)]
    damaged = tmp_path / "x.pt"
    for place in places:
        shutil.copy(sealed, damaged)
        flipped(damaged, place, rng.randrange(8))
        with pytest.raises(InputError):
            checkpoint.load_checkpoint(damaged)
    for length in [0, 1, 70, 71, 72, size - 1, size - 71, size - 22, *places[8:30]]:
        damaged.write_bytes(sealed.read_bytes()[:length])
        with pytest.raises(InputError):
            checkpoint.load_checkpoint(damaged)


def test_a_checkpoint_is_read_by_torch_and_travels_as_one_file(sealed, tmp_path):
    moved = tmp_path / "elsewhere.pt"
    shutil.copy(sealed, moved)
    assert checkpoint.find_damage(moved) == "" and checkpoint.load_checkpoint(moved).step == 0
    assert torch.load(moved, weights_only=True)["step"] == 0
    assert torch.load(moved, weights_only=True, mmap=True)["format"] == checkpoint.FORMAT
    bias = checkpoint.load_checkpoint(moved).weights["heads.0.bias"].numpy().tobytes()
    flipped(moved, moved.read_bytes().index(bias), 0)
    assert torch.load(moved, weights_only=True)["step"] == 0, "torch itself does not look"
    assert "do not match its checksum" in checkpoint.find_damage(moved)


def test_an_older_checkpoint_without_a_seal_is_read_and_its_records_are_checked(sealed, tmp_path):
    old = tmp_path / "old.pt"
    torch.save(torch.load(sealed, weights_only=True), old)
    assert checkpoint.load_checkpoint(old).step == 0
    bias = checkpoint.load_checkpoint(old).weights["heads.0.bias"].numpy().tobytes()
    flipped(old, old.read_bytes().index(bias) + 40, 3)
    with pytest.raises(InputError, match=r"record .*data/\d+ is damaged"):
        checkpoint.load_checkpoint(old)


def test_the_last_so_many_and_the_best_are_kept(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"steps": 5, "steps_per_epoch": 1, "keep_last": 3})
    run = make_run(config, tmp_path)
    pooled = iter([0.1, 0.7, 0.2, 0.3, 0.2])
    run.validate = lambda progress: {  # type: ignore[method-assign]
        "pckh": {"0.5": {"pooled": next(pooled)}, "0.1": {"pooled": 0.0}},
        "auc": 0.0, "peak": 1.0, "people": 5, "joints_counted": 70,
    }  # fmt: skip
    run._sheet = lambda: np.zeros((8, 8, 3), np.uint8)  # type: ignore[method-assign]
    run.train()
    names = [path.name for path in keeping.numbered(tmp_path)]
    assert names == ["step_00000005.pt", "step_00000004.pt", "step_00000003.pt"]
    assert checkpoint.load_checkpoint(tmp_path / "best.pt").step == 2
    assert checkpoint.load_checkpoint(tmp_path / "last.pt").step == 5
    assert not list(tmp_path.glob("*.tmp"))


def test_where_the_disk_has_no_links_names_are_copies(tiny_shards, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    run = make_run(tiny_config(tiny_shards), tmp_path)
    run.save(["last.pt", "best.pt"])
    assert checkpoint.find_damage(tmp_path / "best.pt") == ""
    assert not os.path.samefile(tmp_path / "last.pt", tmp_path / "best.pt")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(damage, tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"steps": 3, "steps_per_epoch": 1})
    make_run(config, tmp_path).train()
    last = tmp_path / "last.pt"
    if damage == "cut":
        os.truncate(last, last.stat().st_size // 2)  # step_00000003.pt is the same file
    elif damage == "flip":
        flipped(last, 4321, 6)
        (tmp_path / "step_00000003.pt").unlink()
    else:
        last.unlink()
        (tmp_path / "step_00000003.pt").unlink()
    start, remarks = train_program.find_start(tmp_path, "", False)
    assert Path(start).name == "step_00000002.pt"
    if damage != "gone":
        assert remarks[0].startswith(f"{last} is damaged (")
        assert len([line for line in remarks if " is damaged (" in line]) == 1
    longer = tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 1})
    run = make_run(longer, tmp_path, train_program.load_run(Path(start)))
    run.train()
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [1, 2, 3, 4]
    assert checkpoint.load_checkpoint(last).step == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(sealed, tmp_path):
    shutil.copy(sealed, tmp_path / "last.pt")
    flipped(tmp_path / "last.pt", 100, 1)
    with pytest.raises(InputError, match="all of them damaged"):
        train_program.find_start(tmp_path, "auto", False)


def unreadable(path: Path, number: int, monkeypatch) -> None:
    """Let a file fail as a disk lets it: when it is read, or opened."""
    real = Path.open

    def fail(opened: Path, *rest, **options):
        if os.path.samefile(opened, path):
            raise OSError(number, os.strerror(number), str(opened))
        return real(opened, *rest, **options)

    monkeypatch.setattr(Path, "open", fail)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_said_and_the_one_before_it_is_used(
    number, tiny_shards, tmp_path, monkeypatch
):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    for run.step in (2, 4):
        run.save(["last.pt"])
    unreadable(tmp_path / "last.pt", number, monkeypatch)
    start, remarks = train_program.find_start(tmp_path, "auto", False)
    assert Path(start).name == "step_00000002.pt"
    assert remarks[0].startswith(f"{tmp_path}/last.pt cannot be read ({os.strerror(number)})")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EIO, r"found: .* all of them damaged"), (errno.EACCES, r"last\.pt\n.* no permission")],
)
def test_if_no_checkpoint_can_be_read_the_reason_is_told(
    number, said, sealed, tmp_path, monkeypatch
):
    shutil.copy(sealed, tmp_path / "last.pt")
    unreadable(tmp_path / "last.pt", number, monkeypatch)
    with pytest.raises(InputError, match=said):
        train_program.find_start(tmp_path, "auto", False)


@pytest.mark.parametrize(
    ("name", "write"),
    [("config.yaml", lambda folder: save_yaml(Config(), folder / "config.yaml")),
     ("resume_me", lambda folder: keeping.ask_to_resume(folder, "STOPPED EARLY"))],
)  # fmt: skip
def test_a_kill_in_a_write_leaves_the_small_files_of_a_run_as_they_were(
    name, write, tmp_path, monkeypatch
):
    def killed(path: Path, data: str | bytes) -> None:
        path.open("w").close()
        raise KeyboardInterrupt

    (tmp_path / name).write_text("of before")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        patch.setattr(Path, "write_bytes", killed)
        write(tmp_path)
    assert (tmp_path / name).read_text() == "of before"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to look a file up in")
def test_a_checkpoint_is_whole_and_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = list[tuple[str, str]](), os.fsync, Path.replace

    def noting_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.is_dir() or checkpoint.find_damage(path) == "", (
            "what is synced is not all of it"
        )
        done.append(("sync", path.name))
        fsync(descriptor)

    def noting_replace(path: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    folder = tmp_path.name
    made = checkpoint.Checkpoint(
        path=tmp_path,
        config=Config(),
        skeleton=MPII,
        step=3,
        weights={},
        averaged={},
        optimizer=None,
        run=None,
    )
    keeping.save(tmp_path, made, ["last.pt", "best.pt"], keep=2)
    assert done == [
        ("sync", "step_00000003.pt.tmp"), ("rename", "step_00000003.pt"), ("sync", folder),
        ("rename", "last.pt"), ("rename", "best.pt"), ("sync", folder),
    ]  # fmt: skip


def broken(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(os, "fsync", broken), (Path, "replace", broken)],
)
def test_whatever_part_of_a_write_fails_the_last_checkpoint_is_whole_and_the_run_alive(
    owner, name, fault, tiny_shards, tmp_path, capsys, monkeypatch
):
    run = make_run(tiny_config(tiny_shards, train={"steps_per_epoch": 2}), tmp_path)
    real, seen = run.save, {}

    def save(names: list[str]) -> None:
        with monkeypatch.context() as patch:
            if run.step == 4:
                patch.setattr(owner, name, fault)
            real(names)
        seen[run.step] = checkpoint.load_checkpoint(tmp_path / "last.pt").step

    run.save = save  # type: ignore[method-assign]
    run.train()
    assert seen == {2: 2, 4: 2, 6: 6} and not list(tmp_path.glob("*.tmp"))
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("WARNING: no checkpoint of step 4 could be written") == 1
    assert "training goes on" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_alive(
    tiny_shards, tmp_path, capsys
):
    config = tiny_config(tiny_shards, train={"steps": 6, "steps_per_epoch": 2})
    run = make_run(config, tmp_path)
    seen = {}
    real = run.save

    def save(names: list[str]) -> None:
        if run.step == 4:
            (tmp_path / "step_00000004.pt.tmp").symlink_to("/dev/full")
        real(names)
        seen[run.step] = checkpoint.load_checkpoint(tmp_path / "last.pt").step

    run.save = save  # type: ignore[method-assign]
    run.train()
    assert seen == {2: 2, 4: 2, 6: 6}
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("WARNING: no checkpoint of step 4 could be written") == 1
    assert "No space left on device: " in text and "step_00000004.pt'; training goes on" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_full_disk_is_told_as_what_it_is_and_nothing_stays(numbers, tmp_path):
    (tmp_path / "x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/x\.pt'") as caught:
        checkpoint.write_archive(tmp_path / "x.pt", {"weights": torch.zeros(numbers)})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_run_whose_end_could_not_be_written_does_not_end_well(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards, train={"steps": 2, "steps_per_epoch": 2}), tmp_path)
    real = run.save

    def save(names: list[str]) -> None:
        (tmp_path / "step_00000002.pt.tmp").symlink_to("/dev/full")
        real(names)

    run.save = save  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no checkpoint of step 2"):
        run.train()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_the_end_tells_what_a_full_disk_cost(tiny_shards, tmp_path, capsys):
    run = make_run(tiny_config(tiny_shards, train={"steps": 9, "log_every": 1}), tmp_path)
    steps(run, 2)
    run.save(["last.pt"])
    real = run.save

    def save(names: list[str]) -> None:
        for name in ("step_00000003.pt", "resume_me"):
            (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
        real(names)

    run.save = save  # type: ignore[method-assign]
    run._is_asked_to_stop = lambda: run.step == 3  # type: ignore[method-assign]
    run.train()
    train_program.conclude(run, 0)
    text = capsys.readouterr().out
    assert "last.pt  (weights, optimizer and place in the data after step 2)" in text
    assert "LOST: steps 3 to 3: no checkpoint of step 3 could be written" in text
    assert f"no room for {tmp_path / 'resume_me'}" in text
    again = make_run(run.config, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt"))
    assert (again.step, again.saved_step) == (2, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_log_that_cannot_be_written_is_said_once_and_ends_no_run(tiny_shards, tmp_path, capsys):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    real = run._open_log

    def open_log():
        log = real()
        log._file.close()
        log._file = Path("/dev/full").open("a")  # noqa: SIM115
        return log

    run._open_log = open_log  # type: ignore[method-assign]
    run.train()
    assert capsys.readouterr().err.count("the log cannot be written") == 1
    assert checkpoint.load_checkpoint(tmp_path / "last.pt").step == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("steps, code", [(4, 0), (0, 2)])
def test_a_run_whose_reader_is_gone_and_whose_output_is_on_a_full_disk_goes_on_to_its_end(
    steps, code, tiny_shards, tmp_path
):
    words = ["train.py", *SMALL, "--data.shards", tiny_shards, "--train.out", tmp_path,
             "--train.name", "run", "--train.steps", steps]  # fmt: skip
    read, gone = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, stdout=full, stderr=gone, timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
    os.close(gone)
    assert done.returncode == code
    assert code or checkpoint.load_checkpoint(tmp_path / "run" / "last.pt").step == steps


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.usefixtures("unpoison")
def test_the_people_of_skipped_steps_are_written_down(tiny_shards, tmp_path):
    config = tiny_config(
        tiny_shards, optim={"accumulate": 2}, train={"log_every": 3, "max_bad_steps": 2}
    )
    run = make_run(config, tmp_path)
    poison(run, {3})  # the second batch of the second step
    poisoned, rows = training.trainer.make_batch, []

    def noting(*arguments, **options):
        batch = poisoned(*arguments, **options)
        rows.append(batch.rows_N.tolist())
        return batch

    training.trainer.make_batch = noting
    run.train()
    lines = [json.loads(x) for x in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2]
    assert [line["loss_is_finite"] for line in lines] == [True, False]
    assert [line["rows"] for line in lines] == rows[2:4]
    people, samples = run.train_shards.people()
    assert lines[1]["people"] == [
        f"{people.images[row]} ({run.train_shards.where(samples[row])})" for row in rows[3]
    ]


@pytest.mark.usefixtures("unpoison")
def test_a_run_stopped_at_the_limit_names_the_file_of_its_people(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"max_bad_steps": 2, "log_every": 1})
    run = make_run(config, tmp_path)
    poison(run, {1, 2})
    with pytest.raises(InputError, match=r"2 steps in a row .*skipped_batches\.jsonl"):
        run.train()
    assert len((tmp_path / "skipped_batches.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("unpoison")
def half_precision_run(shards: Path, folder: Path, **train: object) -> Run:
    train = {"steps": 30, "steps_per_epoch": 30, "precision": "fp16", **train}
    config = tiny_config(shards, train=train, optim={"ema_decay": 0.9})
    return make_run(config, folder, place=HERE._replace(dtype=torch.float16))


def test_with_fp16_the_search_for_a_scale_is_no_fault(tiny_shards, tmp_path, capsys):
    run = half_precision_run(tiny_shards, tmp_path, max_bad_steps=2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = run.network.heads[0].weight.clone()
    run.train()
    assert run.scaler.get_scale() < 2.0**36, "gradients overflow before"
    assert not torch.equal(run.network.heads[0].weight, before)
    assert "skipped" not in capsys.readouterr().err
    assert sum(line["bad_steps"] for line in metrics(tmp_path, "train")) == 0


def test_with_fp16_a_scale_without_room_is_a_fault(tiny_shards, tmp_path):
    run = half_precision_run(tiny_shards, tmp_path, max_bad_steps=4)
    run.network.heads[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(InputError, match="4 steps in a row"):
        run.train()
    # The scale of 2^16 is halved at each step, and from the 17th on it has no room left.
    assert run.step == 20
    lines = [json.loads(x) for x in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [17, 18, 19, 20]
    assert all(line["loss_is_finite"] for line in lines)


@pytest.mark.usefixtures("unpoison")
def test_a_line_without_a_finite_loss_has_none(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    poison(run, {2, 3})
    run.train()
    lines = [
        json.loads(x, parse_constant=pytest.fail)
        for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    values = [line["loss"] for line in lines if line["kind"] == "train"]
    assert values[1] is None and None not in (values[0], values[2])


@pytest.mark.usefixtures("unpoison")
def test_with_fp16_one_loss_that_is_not_finite_is_counted_and_spoils_nothing(
    tiny_shards, tmp_path, capsys
):
    run = half_precision_run(tiny_shards, tmp_path, steps=8, steps_per_epoch=8)
    poison(run, {3})
    run.train()
    assert capsys.readouterr().err.count("skipped 1 of the last 2 steps") == 1
    assert [line["bad_steps"] for line in metrics(tmp_path, "train")] == [0, 1, 0, 0]
    state = checkpoint.load_checkpoint(tmp_path / "last.pt")
    for tensors in (state.weights, state.averaged):
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.usefixtures("unpoison")
@pytest.mark.parametrize(
    ("bad", "limit", "ends_at"),
    [(range(1, 7), 6, 8),  # from the middle of a line of the log to the middle of another
     ([0, 1, 2, 4, 5, 6], 3, 4), ([0, 1, 2, 4, 5, 6], 4, None), ([1, 2, 5, 6], 3, None)],
)  # fmt: skip
def test_skipped_steps_in_a_row_are_counted_one_by_one(bad, limit, ends_at, tiny_shards, tmp_path):
    train = {"steps": 12, "steps_per_epoch": 12, "log_every": 4, "max_bad_steps": limit}
    run = make_run(tiny_config(tiny_shards, train=train), tmp_path)
    poison(run, set(bad))
    if ends_at is None:
        run.train()
        return
    with pytest.raises(InputError, match=f"step {ends_at}\n.*{limit} steps in a row"):
        run.train()


@pytest.mark.usefixtures("unpoison")
def test_averaged_statistics_go_back_to_their_own_and_not_the_networks(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, optim={"ema_decay": 0.99}, train={"log_every": 1})
    run = make_run(config, tmp_path)
    run.log = run._open_log()
    for bad in (False, True):
        if bad:
            own = {name: tensor.clone() for name, tensor in run.average.tensors.items()}
            poison(run, {0})
        totals = Totals(run.place.device)
        run.network.train()
        run._train_step(totals)
        run._report(totals)
    name = "stem.conv.1.running_mean"
    assert torch.equal(run.average.tensors[name], own[name])
    assert not torch.equal(own[name], run.network.state_dict()[name])


def test_workers_ignore_the_signals_and_end_at_their_parents_word(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, data={"workers": 2})
    run = make_run(config, tmp_path)
    expected = steps(make_run(tiny_config(tiny_shards), tmp_path / "other"), 3)
    losses = steps(run, 1)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in STOP_SIGNALS:
            subprocess_kill(worker.pid, number)
    assert losses + steps(run, 2) == expected
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not may_mount(), reason="no small disk can be mounted here")
@pytest.mark.parametrize("megabytes, batch", [(1, 4), (2, 32)])
def test_too_little_shared_memory_is_said_and_hangs_nothing(
    megabytes, batch, tiny_shards, tmp_path
):
    words = ["train.py", "--data.shards", tiny_shards, "--data.workers", 2,
             "--data.batch_size", batch, "--data.input_px", 256, "--model.width", 8,
             "--train.out", tmp_path, "--train.name", "x", "--train.steps", 50,
             "--train.device", "cpu"]  # fmt: skip
    mount = f"mount -t tmpfs -o size={megabytes}m x /dev/shm"
    command = shlex.join([sys.executable, *map(str, words)])
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"{mount} && exec {command}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no room for a batch of" in done.stderr and "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_never_destroys_what_it_inherits(tiny_shards, tmp_path):
    """A dead pipeline of DALI would wait for its threads, which are not in the worker, for ever."""
    armed, log = [True], tmp_path / "log"

    class Inherited:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            log.touch()

    def inherit() -> None:
        if armed:
            gc.set_threshold(1)
            Inherited()

    os.register_at_fork(after_in_child=inherit)
    try:
        steps(make_run(tiny_config(tiny_shards, data={"workers": 1}), tmp_path / "run"), 2)
    finally:
        armed.clear()
    assert not log.exists()
    assert gc.isenabled()


def subprocess_kill(pid: int, number: int) -> None:
    """Send a signal from another process: this one's word ends a worker."""
    sender = multiprocessing.get_context("fork").Process(target=os.kill, args=(pid, number))
    sender.start()
    sender.join(10)


def wait_for_signals(pipe, forwarded: bool) -> None:
    if forwarded:
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
    with signals.noted() as noted:
        pipe.send("ready")
        while not noted:
            time.sleep(0.01)
        pipe.send(noted[0])
        time.sleep(30)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(second):
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=wait_for_signals, args=(there, False)
    )
    process.start()
    assert here.recv() == "ready"
    os.kill(process.pid, signal.SIGUSR1)
    assert here.recv() == signal.SIGUSR1
    began = time.monotonic()
    os.kill(process.pid, second)
    process.join(20)
    assert process.exitcode == -second and time.monotonic() - began < 10


def work_without_an_end_of_pythons(pipe) -> None:
    """One operation of a second or two, in which Python hears no signal."""
    signal.signal(signal.SIGCHLD, lambda *_: None)  # as a DataLoader has it
    with signals.noted() as noted:
        pipe.send("ready")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
        pipe.send(noted)
        time.sleep(30)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD])
def test_two_signals_within_one_operation_of_torch_are_two(first):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work_without_an_end_of_pythons, args=(there,))
    process.start()
    assert here.recv() == "ready"
    began = time.monotonic()
    for number in (first, signal.SIGTERM):
        time.sleep(0.2)
        os.kill(process.pid, number)
    if first == signal.SIGCHLD:  # a worker has ended, and one signal came
        assert here.recv() == [signal.SIGTERM]
        process.kill()
    process.join(20)
    expected = signal.SIGKILL if first == signal.SIGCHLD else signal.SIGTERM
    assert process.exitcode == -expected and time.monotonic() - began < 15


def test_a_signal_that_torchrun_forwards_once_more_is_the_same_one():
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=wait_for_signals, args=(there, True)
    )
    process.start()
    assert here.recv() == "ready"
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    assert here.recv() == signal.SIGTERM and process.is_alive()
    process.kill()
    process.join(10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc that tells masks")
def test_a_signal_to_a_start_that_resumes_ends_it_with_75_before_its_first_step(
    tiny_shards, tmp_path
):
    words = ["train.py", *SMALL, "--data.shards", tiny_shards, "--train.out", tmp_path,
             "--train.name", "run", "--train.steps", 100_000, "--resume", "auto"]  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGUSR1):  # to a run that is not there yet, and is
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        end = time.monotonic() + 2
        while not holds(process.pid, number) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        said, text = process.communicate(timeout=120)
        assert process.returncode == 75, text
        name = signal.Signals(number).name
        marker = (tmp_path / "run" / "resume_me").read_text()
        assert marker == f"STOPPED EARLY at step 0 of 100000: {name}.\n"
        assert "The run was done" not in said and "Traceback" not in text
        assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt").step == 0
    assert "continuing from" in text


def holds(pid: int, number: int) -> bool:
    """Whether a process holds a signal back."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigBlk:")[1].split()[0], 16) >> (number - 1) & 1)


def test_a_signal_in_the_last_step_of_an_epoch_leaves_the_validation_for_later(
    tiny_shards, tmp_path
):
    run = make_run(tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 2}), tmp_path)
    real = run._train_step

    def stopped(totals):
        real(totals)
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    run._train_step = stopped  # type: ignore[method-assign]
    assert run.train() == {} and run.interrupted
    state = checkpoint.load_checkpoint(tmp_path / "last.pt")
    assert state.step == 2 and state.run.validation_due
    assert (tmp_path / "resume_me").read_text() == "STOPPED EARLY at step 2 of 4: SIGUSR1.\n"
    make_run(
        tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 2}), tmp_path, state
    ).train()
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [2, 4]


def test_a_signal_in_a_validation_leaves_it_for_later_and_the_run_ends_as_one_without(
    tiny_shards, tmp_path
):
    """It has three batches, of which one is predicted; also in the run that goes on with it."""
    config = tiny_config(
        tiny_shards, train={"steps": 4, "steps_per_epoch": 2}, eval={"batch_size": 2, "flip": False}
    )
    predicted = []

    def ask_to_stop(*_: object) -> None:
        predicted.append(run.step)
        if not run.noted:  # a second one would end these tests
            os.kill(os.getpid(), signal.SIGUSR1)

    state = None
    for _ in range(2):
        run = make_run(config, tmp_path / "run", state)
        real = run._evaluated_network

        def watched(real=real):
            network = real()
            network.register_forward_hook(ask_to_stop)
            return network

        run._evaluated_network = watched  # type: ignore[method-assign]
        assert run.train() == {} and run.interrupted
        state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
        assert state.step == 2 and state.run.validation_due and state.run.best == -1
        marker = (tmp_path / "run" / "resume_me").read_text()
        assert marker == "STOPPED EARLY at step 2 of 4: SIGUSR1.\n"
    assert predicted == [2, 2] and metrics(tmp_path / "run", "valid") == []
    states = []
    for name, begun in (("run", state), ("quiet", None)):
        make_run(config, tmp_path / name, begun).train()
        states.append(leaves(torch.load(tmp_path / name / "last.pt", weights_only=True)))
        del states[-1]["seconds/"]
    assert [line["step"] for line in metrics(tmp_path / "run", "valid")] == [2, 4]
    differing = [name for name in states[0] if states[0][name] != states[1].get(name)]
    assert differing == [] and len(states[0]) == len(states[1]) > 100


def test_a_validation_that_fails_loses_no_step_of_its_epoch(tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 2})
    run = make_run(config, tmp_path)

    def rotten(progress):
        raise InputError("valid/00000.tar, key 000000001", "no picture", "a JPEG", "replace it")

    run.validate = rotten  # type: ignore[method-assign]
    with pytest.raises(InputError, match="key 000000001"):
        run.train()
    state = checkpoint.load_checkpoint(tmp_path / "last.pt")
    assert state.step == 2 and state.run.validation_due
    make_run(config, tmp_path, state).train()
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [2, 4]


def test_a_rank_whose_torchrun_is_gone_ends_with_a_checkpoint(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    run = make_run(tiny_config(tiny_shards, train={"steps": 50, "steps_per_epoch": 50}), tmp_path)
    real = run._train_step

    def orphaned(totals):
        real(totals)
        monkeypatch.setattr(os, "getppid", lambda: run.parent + 1)

    run._train_step = orphaned  # type: ignore[method-assign]
    run.train()
    assert run.interrupted and checkpoint.load_checkpoint(tmp_path / "last.pt").step == 1
    assert "torchrun is gone" in (tmp_path / "resume_me").read_text()
