"""Runs of several processes are killed, stopped and started again."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, may_mount
from helpers import ENVIRONMENT, leaves, metrics, train_options

from model.checkpoint import load_checkpoint
from training.metrics import read_metrics

pytestmark = pytest.mark.slow
PATIENCE_S = 180
AGAIN = "torchrun restarted the ranks"


@contextlib.contextmanager
def started(log: Path, *words: object) -> Iterator[subprocess.Popen]:
    """A Python program whose output goes to a file; it and its children are killed at the end."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=ENVIRONMENT,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.wait(30)


def run_to_end(log: Path, *words: object, code: int = 0) -> None:
    with started(log, *words) as process:
        assert process.wait(PATIENCE_S) == code, log.read_text()[-4000:]


def children(pid: int) -> list[int]:
    """Processes that a process started, oldest first; a rank leads a session of its own."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def wait_until(true: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 without one."""
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def saved_step(folder: Path) -> int:
    return load_checkpoint(folder / "last.pt").step


def has_saved_after(folder: Path, step: int) -> bool:
    """Whether last.pt is of a later step. It is opened once, because a run may replace it."""
    last = folder / "last.pt"
    return last.exists() and torch.load(last, weights_only=True)["step"] > step


def words(shards: Path, out: Path, name: str, steps: int, more: str = "") -> list[str]:
    options = f"--train.steps {steps} --optim.schedule constant --eval.people 2 {more}"
    return ["train.py", *train_options(shards, out, name, options)]


def torchrun(options: str) -> list[str]:
    return f"-m torch.distributed.run --max-restarts 3 {options}".split()


TWO_RANKS = torchrun("--standalone --nproc-per-node 2")


def assert_same_weights(one: Path, other: Path, *more: str) -> None:
    """Step, weights, optimizer and more parts of two checkpoints, bit for bit."""
    names = ("step", "model", "optimizer", *more)
    raw = [torch.load(path, weights_only=True) for path in (one, other)]
    found, expected = (leaves({name: each[name] for name in names}) for each in raw)
    assert found.keys() == expected.keys() and len(found) > 150
    assert [name for name in found if found[name] != expected[name]] == []


ALL = ("ema", "scaler", "rng", "best")
"""What a checkpoint has beside weights and optimizer that a stop must not change."""


@pytest.mark.parametrize(
    "when",
    ["--train.steps_per_epoch 2", "--train.steps_per_epoch 100000 --train.save_minutes 0.005"],
)
def test_a_run_killed_ten_times_goes_on_each_time_and_ends_with_the_same_bytes(
    when, tiny_shards, tmp_path
):
    """Checkpoints are written at the end of each epoch, or in mid-epoch every 0.3 s."""
    log, run, moments = tmp_path / "log", tmp_path / "run", random.Random(1)
    more = f"--resume auto --data.workers 1 {when}"
    stood = 0
    for _ in range(10):
        with started(log, *words(tiny_shards, tmp_path, "run", 100_000, more)) as process:
            wait_until(
                lambda: has_saved_after(run, stood),  # noqa: B023
                process,
                log,
            )
            time.sleep(moments.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGKILL)  # its worker too
        assert saved_step(run) > stood
        stood = saved_step(run)
    assert log.read_text().count("continuing from") == 9
    assert "is damaged" not in log.read_text() and "Traceback" not in log.read_text()
    for name in ("run", "unstopped"):
        run_to_end(log, *words(tiny_shards, tmp_path, name, stood + 3, more))
    assert_same_weights(run / "last.pt", tmp_path / "unstopped" / "last.pt", *ALL)


def test_ranks_stopped_by_torchrun_and_killed_end_with_the_bytes_of_an_undisturbed_run(
    tiny_shards, tmp_path
):
    log, run = tmp_path / "log", tmp_path / "run"
    command = [*TWO_RANKS, *words(tiny_shards, tmp_path, "run", 60, "--train.steps_per_epoch 5")]
    with started(log, *command) as process:
        wait_until(lambda: last_step(run) >= 7, process, log)
        process.send_signal(signal.SIGTERM)  # which it forwards
        process.wait(PATIENCE_S)
    stopped = saved_step(run)
    assert f"STOPPED EARLY at step {stopped} of 60: SIGTERM." in (run / "resume_me").read_text()
    with started(log, *command, "--resume", "auto") as process:
        wait_until(lambda: last_step(run) > stopped + 5, process, log)
        assert not (run / "resume_me").exists()
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 0, log.read_text()[-4000:]
    assert f"{AGAIN}: continuing from" in log.read_text()
    quiet = words(tiny_shards, tmp_path, "quiet", 60, "--train.steps_per_epoch 5")
    run_to_end(log, *TWO_RANKS, *quiet)
    assert_same_weights(run / "last.pt", tmp_path / "quiet" / "last.pt", *ALL)


def test_a_restart_does_not_continue_a_run_that_the_first_start_refused(tiny_shards, tmp_path):
    log, command = tmp_path / "log", words(tiny_shards, tmp_path, "run", 2)
    run_to_end(log, *command)
    launch = torchrun("--standalone --nproc-per-node 2 --max-restarts 1")
    run_to_end(log, *launch, *command, code=1)
    assert log.read_text().count(f"error: {tmp_path / 'run'}\n") == 2  # once for each start
    assert AGAIN not in log.read_text() and saved_step(tmp_path / "run") == 2


def test_two_nodes_lose_a_rank_go_on_and_stop_at_a_signal_to_one_of_them(tiny_shards, tmp_path):
    logs, run = [tmp_path / "log0", tmp_path / "log1"], tmp_path / "run"
    options = words(tiny_shards, tmp_path, "run", 100_000, "--train.steps_per_epoch 5")
    command = [*nodes("2", free_port()), *options]
    with started(logs[0], *command) as first, started(logs[1], *command) as second:
        wait_until(lambda: last_step(run) >= 7, first, logs[0])
        os.kill(children(second.pid)[0], signal.SIGKILL)
        wait_until(lambda: any(AGAIN in log.read_text() for log in logs), first, logs[0])
        wait_until(lambda: last_step(run) >= 20, first, logs[0])
        os.kill(children(second.pid)[0], signal.SIGUSR1)
        assert [first.wait(PATIENCE_S), second.wait(PATIENCE_S)] == [0, 0]
    assert (run / "resume_me").exists() and saved_step(run) == last_step(run)


def nodes(count: str, port: int) -> list[str]:
    """torchrun of one node of `count`, all on this machine, with a rank each."""
    return torchrun(
        f"--nnodes {count} --nproc-per-node 1 --rdzv-backend c10d --rdzv-id x "
        f"--rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1"
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_run_continues_in_mid_epoch_with_the_same_global_batch_after_losing_one_of_two_nodes(
    tiny_shards, tmp_path
):
    logs, run, port = [tmp_path / "log0", tmp_path / "log1"], tmp_path / "run", free_port()
    more = "--train.steps_per_epoch 100000 --train.save_minutes 0.01"
    options = words(tiny_shards, tmp_path, "run", 100_000, more)
    command = [*nodes("1:2", port), *options]
    with started(logs[0], *command) as first:
        wait_until(lambda: listens(port), first, logs[0])  # the nodes meet at the one that stays
        with started(logs[1], *command) as second:
            wait_until(lambda: (run / "last.pt").exists(), first, logs[0])
            assert children(second.pid), "two nodes work"
        alone = "the run had 2 rank(s) and has 1; a step takes 8 people as before"
        wait_until(lambda: alone in " ".join(logs[0].read_text().split()), first, logs[0])
        stood = saved_step(run)
        wait_until(lambda: last_step(run) >= stood + 7, first, logs[0])
        os.kill(children(first.pid)[0], signal.SIGUSR1)
        assert first.wait(PATIENCE_S) == 0
    assert load_checkpoint(run / "last.pt").run.ranks == 1 and (run / "resume_me").exists()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def test_a_stopped_rank_is_named_and_the_run_restarts_from_its_last_checkpoint(
    tiny_shards, tmp_path
):
    log, run = tmp_path / "log", tmp_path / "run"
    more = "--train.steps_per_epoch 5 --train.hang_minutes 0.1"
    with started(log, *TWO_RANKS, *words(tiny_shards, tmp_path, "run", 100_000, more)) as process:
        wait_until(lambda: last_step(run) >= 7, process, log)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        wait_until(lambda: AGAIN in log.read_text(), process, log)
        stood = saved_step(run)
        wait_until(lambda: last_step(run) >= stood + 7, process, log)
        os.kill(children(process.pid)[0], signal.SIGUSR1)
        assert process.wait(PATIENCE_S) == 0
    text = log.read_text()
    assert "rank 0: no progress for 6 s (train.hang_minutes) since step" in text
    assert "trainer.py" in text.partition("Its threads:")[2], "the stack of the rank that waits"
    assert re.search(r"rank 1: (step|the checkpoint of step) \d+, and its process does not", text)


@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_a_run_continues_in_mid_epoch_with_two_four_and_one_ranks(loader, tiny_shards, tmp_path):
    """Batches of one size, accumulated or on several ranks, put the same people through batch norm
    together, so losses differ by rounding alone."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    log, more = (
        tmp_path / "log",
        "--optim.accumulate 4 --data.batch_size 2 --train.steps_per_epoch 4 "
        f"--data.loader {loader}",
    )
    run_to_end(log, *words(tiny_shards, tmp_path, "quiet", 9, more))
    run_to_end(log, *words(tiny_shards, tmp_path, "run", 3, more))
    for ranks, steps in ((2, 5), (4, 7)):
        launch = torchrun(f"--standalone --nproc-per-node {ranks}")
        run_to_end(log, *launch, *words(tiny_shards, tmp_path, "run", steps, more), "--resume")
    run_to_end(log, *words(tiny_shards, tmp_path, "run", 9, more), "--resume")
    text = " ".join(log.read_text().split())
    for before, now, parts in ((1, 2, 2), (2, 4, 1), (4, 1, 4)):
        shared = f"2 per rank x {now} rank(s) x {parts}"
        changed = f"the run had {before} rank(s) and has {now}; a step takes 8 people as before"
        assert f"{changed}, {shared}" in text
    losses = [
        [line["loss"] for line in metrics(tmp_path / name, "train")] for name in ("run", "quiet")
    ]
    assert len(losses[0]) == 9 and losses[0][:3] == losses[1][:3]
    assert losses[0] != losses[1]  # sums over ranks are rounded otherwise
    # The first steps of Adam enlarge this; 2e-4 was measured.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


STOPPED = """
import os, signal, sys, train
from training.trainer import Trainer

real = Trainer.evaluation_network
def network(trainer):
    made = real(trainer)
    if trainer.dist.rank == 1 and trainer.progress.step == 4:
        made.register_forward_hook(ask_to_stop)
    return made
def ask_to_stop(*_):
    if not asked:
        asked.append(os.kill(os.getpid(), signal.SIGUSR1))
asked = []
Trainer.evaluation_network = network
sys.exit(train.main())
"""


def test_a_signal_to_one_of_two_ranks_in_a_validation_stops_both_and_the_bytes_are_those_without(
    tiny_shards, tmp_path
):
    """Of three people, one a batch, the second rank has one, and is told to stop in that."""
    log, run = tmp_path / "log", tmp_path / "run"
    (tmp_path / "stopped.py").write_text(STOPPED)
    more = "--train.steps_per_epoch 4 --eval.people 3 --eval.batch_size 1"
    program, *options = words(tiny_shards, tmp_path, "run", 8, more)
    run_to_end(log, *TWO_RANKS, tmp_path / "stopped.py", *options)
    assert "STOPPED EARLY at step 4 of 8" in (run / "resume_me").read_text()
    stopped = load_checkpoint(run / "last.pt")
    assert stopped.step == 4 and stopped.run.validation_due and metrics(run, "valid") == []
    run_to_end(log, *TWO_RANKS, program, *options, "--resume")
    run_to_end(log, *TWO_RANKS, *words(tiny_shards, tmp_path, "quiet", 8, more))
    assert metrics(run, "valid")[0]["step"] == 4 and not (run / "resume_me").exists()
    assert_same_weights(run / "last.pt", tmp_path / "quiet" / "last.pt", *ALL)


def test_the_shell_lines_for_kubernetes_end_with_75_at_sigterm_and_go_on_when_run_again(
    tiny_shards, tmp_path
):
    """The container's command of docs/multi-node.md, with a tiny run on CPUs in place of 8hg."""
    log, run = tmp_path / "log", tmp_path / "8hg"
    text = (ROOT / "docs" / "multi-node.md").read_text()
    job = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"] and worker["restartPolicy"] == "OnFailure"
    (script,) = container["args"]
    tiny = " ".join(map(str, words(tiny_shards, tmp_path, "8hg", 100_000, "--resume auto")))
    for pattern, new in {
        r"torchrun --nproc-per-node 4": f"{sys.executable} -m torch.distributed.run "
        "--standalone --nproc-per-node 2",
        r"train\.py .* --resume auto": tiny.replace("[8,16,16]", "'[8,16,16]'"),
        "/runs/": f"{tmp_path}/",
    }.items():
        script, count = re.subn(f"(?s){pattern}", lambda _: new, script)  # noqa: B023
        assert count == 1, pattern
    for _ in range(2):
        stood = last_step(run)
        with log.open("a") as file:
            shell = subprocess.Popen(
                ["bash", "-c", script],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            wait_until(lambda: last_step(run) >= stood + 3, shell, log)  # noqa: B023
            shell.send_signal(signal.SIGTERM)
            assert shell.wait(PATIENCE_S) == 75, log.read_text()[-4000:]
        finally:
            kill(shell)
    assert "continuing from" in log.read_text() and saved_step(run) > stood


def test_a_message_that_all_ranks_have_is_shown_once_and_in_torchruns_summary(tmp_path):
    log = tmp_path / "log"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    run_to_end(log, *command, *words(tmp_path, tmp_path, "run", 0), code=1)
    text = log.read_text()
    assert text.count("error: train.steps\n  found:    0") == 1
    assert "traceback : common.errors.InputError: train.steps\n" in text.split("Root Cause", 1)[1]


@pytest.mark.skipif(not may_mount(), reason="no small disk can be mounted here")
def test_on_a_disk_that_fills_up_the_run_goes_on_and_its_last_checkpoint_is_whole(
    tiny_shards, tmp_path
):
    """A disk of 3 MiB fills up after the first checkpoint, and has room again a little later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = [sys.executable, *words(tiny_shards, disk, "run", 60, "--train.steps_per_epoch 10")]
    script = f"""
        mount -t tmpfs -o size=3m x {disk}
        {" ".join(map(str, train))} & run=$!
        until [ -e {disk}/run/last.pt ]; do sleep 0.05; done
        cat /dev/zero > {disk}/full 2> /dev/null
        until grep -q "could be written" {tmp_path}/log; do
            kill -0 $run || exit 9; sleep 0.05; done
        cp {disk}/run/last.pt {tmp_path}/while_full.pt
        rm {disk}/full
        wait $run; code=$?
        cp {disk}/run/last.pt {disk}/run/metrics.jsonl {tmp_path}
        exit $code
    """
    with (tmp_path / "log").open("w") as file:
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", script],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            timeout=PATIENCE_S,
            check=False,
        )
    text = (tmp_path / "log").read_text()
    assert done.returncode == 0, text[-4000:]
    assert re.search(
        r"No space left on device(: '\S+')?; training continues", " ".join(text.split())
    )
    assert 0 < load_checkpoint(tmp_path / "while_full.pt").step < 60
    assert load_checkpoint(tmp_path / "last.pt").step == 60
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 61))
