"""Injected faults: damaged checkpoints, full disks, signals, a killed process."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import (
    ENVIRONMENT,
    leaves,
    make_trainer,
    metrics,
    new_network,
    step,
    steps,
    tiny_config,
    train_options,
)

import train
from common.errors import InputError
from model.checkpoint import (
    FORMAT,
    find_damage,
    init_weights,
    load_checkpoint,
    load_weights,
    write_archive,
)
from training.checkpoint_manager import CheckpointManager, lock_run_folder
from training.metrics import MetricsLogger, read_metrics
from training.preemption import stop_signals
from training.resume import find_start, load_resumable

FULL_DISK = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(tiny_config(tiny_shards), folder).save(["last.pt"])
    return folder / "last.pt"


# Checkpoint files


def test_a_bit_flipped_anywhere_and_a_cut_anywhere_are_found(saved, tmp_path):
    size, rng = saved.stat().st_size, random.Random(0)
    places = [0, 3, size - 1, size - 65, size - 71, size - 72, size - 73, size - 93]
    places += [rng.randrange(size) for _ in range(30)]
    damaged = tmp_path / "x.pt"
    for place in places:
        shutil.copy(saved, damaged)
        flip(damaged, place, rng.randrange(8))
        with pytest.raises(InputError):
            load_checkpoint(damaged)
    for length in [0, 1, 70, 71, 72, size - 1, size - 22, *places[8:20]]:
        damaged.write_bytes(saved.read_bytes()[:length])
        with pytest.raises(InputError):
            load_checkpoint(damaged)


def test_torch_reads_a_checkpoint_and_the_checksum_finds_what_torch_does_not(saved, tmp_path):
    moved = tmp_path / "elsewhere.pt"
    shutil.copy(saved, moved)
    assert find_damage(moved) == "" and load_checkpoint(moved).step == 0
    assert torch.load(moved, weights_only=True, mmap=True)["format"] == FORMAT
    bias = load_checkpoint(moved).weights["heads.0.bias"].numpy().tobytes()
    flip(moved, moved.read_bytes().index(bias), 0)
    assert torch.load(moved, weights_only=True)["step"] == 0
    assert "checksum" in find_damage(moved)


def test_a_checkpoint_without_a_checksum_is_read_and_its_records_are_checked(saved, tmp_path):
    old = tmp_path / "old.pt"
    torch.save(torch.load(saved, weights_only=True), old)
    assert load_checkpoint(old).step == 0
    bias = load_checkpoint(old).weights["heads.0.bias"].numpy().tobytes()
    flip(old, old.read_bytes().index(bias) + 40, 3)
    with pytest.raises(InputError, match=r"record .*data/\d+ is damaged"):
        load_checkpoint(old)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + b"\0" * 60])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    torch.save({"format": FORMAT, "format_version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="99"):
        load_checkpoint(tmp_path / "new.pt")


def test_a_checkpoint_never_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"format": FORMAT, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_size_are_named_and_other_joints_start_fresh(tiny_shards, tmp_path):
    from configs.skeleton import unnamed
    from model.hourglass import StackedHourglass

    config = tiny_config(tiny_shards, model={"stacks": 2})
    make_trainer(config, tmp_path).save(["last.pt"])
    loaded = load_checkpoint(tmp_path / "last.pt")
    network = StackedHourglass(config.model, 5)
    heads = [f"heads.{stack}.{name}" for stack in (0, 1) for name in ("weight", "bias")]
    fresh = init_weights(network, unnamed(5), loaded)
    assert fresh == [*heads, "merge_heatmaps.0.weight"]
    assert torch.equal(network.stem.conv[0].weight, loaded.weights["stem.conv.0.weight"])
    wider = new_network(2, 32, 16, depth=2, stem=(8, 16, 16))
    with pytest.raises(InputError, match=r"stem\.residual3\.conv1\.weight is \(8, 16, 1, 1\)"):
        load_weights(wider, loaded.weights, loaded.path)


@pytest.mark.parametrize("damage", ["cut", "flip", "unreadable"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(
    damage, tiny_shards, tmp_path, monkeypatch
):
    config = tiny_config(tiny_shards)
    trainer = make_trainer(config, tmp_path)
    for _ in range(2):
        steps(trainer, 1)
        trainer.save(["last.pt"])
    last, opened = tmp_path / "last.pt", Path.open
    if damage == "cut":
        os.truncate(last, last.stat().st_size // 2)  # step_00000002.pt is the same file
    elif damage == "flip":
        flip(last, 4321, 6)

    def fail(path: Path, *rest, **options):
        if damage == "unreadable" and os.path.samefile(path, last):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(Path, "open", fail)
    start, remarks = find_start(tmp_path, "", False)
    assert Path(start).name == "step_00000001.pt" and len(remarks) == 2
    assert remarks[0].startswith(str(last))
    monkeypatch.undo()
    assert make_trainer(config, tmp_path, load_resumable(Path(start))).progress.step == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(saved, tmp_path):
    shutil.copy(saved, tmp_path / "last.pt")
    flip(tmp_path / "last.pt", 100, 1)
    with pytest.raises(InputError, match="none of them usable"):
        find_start(tmp_path, "auto", False)


def test_a_bug_or_lack_of_memory_while_restoring_is_not_called_damage(
    saved, tiny_shards, tmp_path, monkeypatch
):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", fail)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(tiny_config(tiny_shards), tmp_path, saved)


def test_a_checkpoint_is_whole_and_on_the_disk_before_it_has_its_name(saved, tmp_path, monkeypatch):
    done, fsync, replace = list[tuple[str, str]](), os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.is_dir() or find_damage(path) == "", "what is synced is not all of it"
        done.append(("sync", path.name))
        fsync(descriptor)

    def recorded_replace(path: Path, target: Path) -> Path:
        done.append(("rename", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    checkpoints = CheckpointManager(tmp_path, 2, print)
    checkpoints.save(load_checkpoint(saved), ["last.pt", "best.pt"])
    checkpoints.wait()
    written = [("sync", "step_00000000.pt.tmp"), ("rename", "step_00000000.pt")]
    synced = ("sync", tmp_path.name)
    assert done == [*written, synced, ("rename", "last.pt"), ("rename", "best.pt"), synced]


def test_on_a_disk_without_links_names_are_copies(saved, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = CheckpointManager(tmp_path, 2, print)
    checkpoints.save(load_checkpoint(saved), ["last.pt", "best.pt"])
    checkpoints.wait()
    assert find_damage(tmp_path / "best.pt") == ""
    assert not os.path.samefile(tmp_path / "last.pt", tmp_path / "best.pt")


# Full disks


@FULL_DISK
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_alive(
    tiny_shards, tmp_path, capsys, monkeypatch
):
    trainer = make_trainer(tiny_config(tiny_shards, train={"steps_per_epoch": 2}), tmp_path)
    monkeypatch.setattr(MetricsLogger, "log_pictures", lambda *_: None)
    real, seen = trainer.start_saving, {}

    def start_saving(names: list[str]) -> None:
        if trainer.progress.step == 4:
            (tmp_path / "step_00000004.pt.tmp").symlink_to("/dev/full")
        real(names)
        trainer.checkpoints.wait()
        seen[trainer.progress.step] = load_checkpoint(tmp_path / "last.pt").step

    monkeypatch.setattr(trainer, "start_saving", start_saving)
    trainer.train()
    assert seen == {2: 2, 4: 2, 6: 6} and not list(tmp_path.glob("*.tmp"))
    text = " ".join(capsys.readouterr().err.split())
    assert "WARNING: no checkpoint of step 4 could be written" in text
    assert "No space left on device: " in text and "step_00000004.pt'; training continues" in text


@FULL_DISK
def test_a_write_that_failed_is_reported_once_when_it_has_ended(tiny_shards, tmp_path, capsys):
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path)
    trainer.log = trainer.open_log()
    (tmp_path / "step_00000001.pt.tmp").symlink_to("/dev/full")
    totals = step(trainer)
    trainer.start_saving(["last.pt"])
    trainer.checkpoints._thread.shutdown()  # the write has ended, and nobody waited for it
    assert capsys.readouterr().err.count("WARNING: no checkpoint of step 1 could be") == 1
    trainer.report(totals)
    trainer.log.close()
    assert "WARNING" not in capsys.readouterr().err


@FULL_DISK
def test_a_full_disk_is_reported_with_the_files_name_and_nothing_stays(tmp_path):
    (tmp_path / "x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/x\.pt'"):
        write_archive(tmp_path / "x.pt", {"weights": torch.zeros(1_000_000)})
    assert list(tmp_path.iterdir()) == []


@FULL_DISK
def test_a_run_whose_end_could_not_be_written_ends_in_an_error(tiny_shards, tmp_path, monkeypatch):
    config = tiny_config(tiny_shards, train={"steps": 2, "steps_per_epoch": 2})
    trainer = make_trainer(config, tmp_path)
    monkeypatch.setattr(trainer, "_finish_epoch", dict)
    (tmp_path / "step_00000002.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="no checkpoint of step 2"):
        trainer.train()


@FULL_DISK
def test_a_log_that_cannot_be_written_is_reported_once_and_ends_no_run(
    tiny_shards, tmp_path, capsys, monkeypatch
):
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path)
    open_log = trainer.open_log

    def open_full_log():
        log = open_log()
        log._file.close()
        log._file = Path("/dev/full").open("a")  # noqa: SIM115
        return log

    monkeypatch.setattr(trainer, "open_log", open_full_log)
    trainer.train()
    assert capsys.readouterr().err.count("the log cannot be written") == 1
    assert load_checkpoint(tmp_path / "last.pt").step == 6


# Signals and processes


def start(shards: Path, out: Path, more: str) -> subprocess.Popen:
    """Start training in a process of its own, without an end."""
    options = f"--train.steps 100000 --data.workers 1 --train.steps_per_epoch 4 {more}"
    return subprocess.Popen(
        [sys.executable, "train.py", *train_options(shards, out, "r", options)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def last_step(folder: Path) -> int:
    """The step of the last line of metrics.jsonl; 0 without one."""
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while last_step(folder) < step:
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.05)


def test_a_run_ended_by_sigterm_continues_with_the_same_bytes(tiny_shards, tmp_path):
    run = tmp_path / "r"
    stopped = start(tiny_shards, tmp_path, "--optim.ema_decay 0.9 --resume auto")
    wait_for_step(run, 5, stopped)
    os.killpg(stopped.pid, signal.SIGTERM)  # as a job scheduler does: the worker gets it too
    _, text = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, text
    step = load_checkpoint(run / "last.pt").step
    assert f"STOPPED EARLY at step {step} of 100000: SIGTERM." in (run / "resume_me").read_text()
    assert "no checkpoint yet" in text and "Traceback" not in text
    more = f"--optim.ema_decay 0.9 --train.steps {step + 1} --train.steps_per_epoch 4"
    for out, resume in ((tmp_path, " --resume"), (tmp_path / "quiet", "")):
        assert train.main(train_options(tiny_shards, out, "r", more + resume)) == 0
    assert not (run / "resume_me").exists()
    found, expected = (
        leaves(torch.load(out / "r" / "last.pt", weights_only=True))
        for out in (tmp_path, tmp_path / "quiet")
    )
    differing = {name for name in expected if found.get(name) != expected[name]}
    assert differing <= {"seconds/", "config/train/out/", "config/data/workers/"}


@pytest.mark.slow
def test_a_start_that_overlaps_the_end_of_another_continues_from_its_last_step(
    tiny_shards, tmp_path
):
    first = start(tiny_shards, tmp_path, "")
    wait_for_step(tmp_path / "r", 3, first)
    second = start(tiny_shards, tmp_path, "--resume")
    while "waiting for the process that trains" not in (line := second.stderr.readline()):
        assert line, "the second start did not wait"
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(60) == 75
    step = load_checkpoint(tmp_path / "r" / "last.pt").step
    lines = (tmp_path / "r" / "metrics.jsonl").read_text()
    wait_for_step(tmp_path / "r", step + 1, second)
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait(60) == 75
    # Lines after the step that a start continues from are removed.
    assert (tmp_path / "r" / "metrics.jsonl").read_text().startswith(lines) and step > 3


@pytest.mark.parametrize("forwarded", [False, True])
def test_a_second_sigterm_ends_at_once_unless_torchrun_forwarded_it(forwarded):
    def work(pipe) -> None:
        if forwarded:
            os.environ["TORCHELASTIC_RUN_ID"] = "x"
        with stop_signals() as received:
            pipe.send("ready")
            while not received:
                time.sleep(0.01)
            pipe.send(received[0])
            time.sleep(30)

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there,))
    process.start()
    assert here.recv() == "ready"
    os.kill(process.pid, signal.SIGUSR1)
    assert here.recv() == signal.SIGUSR1
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5 if forwarded else 10)
    assert process.exitcode == (None if forwarded else -signal.SIGTERM)
    process.kill()
    process.join(10)


def test_a_signal_in_the_last_step_of_an_epoch_leaves_the_validation_for_later(
    tiny_shards, tmp_path, monkeypatch
):
    config = tiny_config(tiny_shards, train={"steps": 2, "steps_per_epoch": 2})
    trainer = make_trainer(config, tmp_path)
    real = trainer.train_step.run

    def stopped(loader, number, totals) -> None:
        real(loader, number, totals)
        if number == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(trainer.train_step, "run", stopped)
    assert trainer.train() == {} and trainer.interrupted
    last = load_checkpoint(tmp_path / "last.pt")
    assert last.step == 2 and last.run.validation_due
    assert (tmp_path / "resume_me").read_text() == "STOPPED EARLY at step 2 of 2: SIGUSR1.\n"
    make_trainer(config, tmp_path, last).train()
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [2]


@pytest.mark.parametrize("first_write", ["succeeds", pytest.param("fails", marks=FULL_DISK)])
def test_a_signal_in_a_validation_leaves_it_for_later(
    tiny_shards, tmp_path, monkeypatch, first_write
):
    """It has three batches, of which one is predicted. Then a full disk has room again."""
    if first_write == "fails":
        (tmp_path / "step_00000002.pt.tmp").symlink_to("/dev/full")
    options = {"steps": 2, "steps_per_epoch": 2}
    config = tiny_config(tiny_shards, train=options, eval={"batch_size": 2, "flip": False})
    trainer, predicted = make_trainer(config, tmp_path), []
    real = trainer.evaluation_network

    def watched() -> torch.nn.Module:
        network = real()
        network.register_forward_hook(
            lambda *_: predicted.append(os.kill(os.getpid(), signal.SIGUSR1))
        )
        return network

    monkeypatch.setattr(trainer, "evaluation_network", watched)
    assert trainer.train() == {} and trainer.interrupted and len(predicted) == 1
    last = load_checkpoint(tmp_path / "last.pt")
    assert last.step == 2 and last.run.validation_due and last.run.best == -1
    assert make_trainer(config, tmp_path, last).train()["people"] == 5
    assert os.path.samefile(tmp_path / "best.pt", tmp_path / "last.pt")
    assert make_trainer(config, tmp_path, tmp_path / "last.pt").train() == {}, "it is done once"
    assert [line["step"] for line in metrics(tmp_path, "valid")] == [2]


def test_a_validation_that_fails_loses_no_step_of_its_epoch(tiny_shards, tmp_path, monkeypatch):
    trainer = make_trainer(
        tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 2}), tmp_path
    )

    def fail(*_: object) -> None:
        raise InputError("valid/00000.tar, key 000000001", "no picture", "a JPEG", "replace it")

    monkeypatch.setattr(trainer.validator, "run", fail)
    with pytest.raises(InputError, match="key 000000001"):
        trainer.train()
    assert load_checkpoint(tmp_path / "last.pt").step == 2


def test_a_rank_whose_torchrun_has_died_saves_and_ends(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path)
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: parent + (trainer.progress.step > 0))
    trainer.train()
    assert trainer.interrupted and load_checkpoint(tmp_path / "last.pt").step == 1
    assert "torchrun has ended" in (tmp_path / "resume_me").read_text()


def test_a_run_that_another_process_trains_is_refused(tmp_path):
    def hold(pipe) -> None:
        lock_run_folder(tmp_path)
        pipe.send("held")
        time.sleep(30)

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    other = context.Process(target=hold, args=(there,))
    other.start()
    assert here.recv() == "held"
    with pytest.raises(InputError, match=rf"\(process {other.pid} on "):
        lock_run_folder(tmp_path)
    other.kill()
    other.join(10)
    lock_run_folder(tmp_path)  # the lock ended with its process
