"""Workers of the OpenCV loader: threads, and signals, memory and garbage of processes."""

import gc
import itertools
import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, may_mount
from helpers import make_spec

from pipelines.loader import TrainLoader
from pipelines.shards import ShardSet
from pipelines.workers import STOP_SIGNALS, THREADS_AHEAD, in_threads


def test_threads_that_open_a_tar_at_once_share_one_file(tiny_shards, monkeypatch):
    split, opened, real_open = ShardSet(tiny_shards / "train"), [], Path.open
    expected = ShardSet(tiny_shards / "train").picture(0)

    def slow_open(path: Path, *args, **kwargs):
        opened.append(path)
        time.sleep(0.05)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", slow_open)
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(split.picture, [0] * 16))
    assert len(opened) == 4 and pictures == [expected] * 16


def test_an_error_in_a_thread_is_raised_instead_of_its_batch_and_ends_the_others():
    made = []

    def make(number: int) -> tuple[int]:
        if number == 3:
            raise ZeroDivisionError
        made.append(number)
        return (number,)

    results = in_threads(make, itertools.count(), 2, pin=False)
    assert [next(results) for _ in range(3)] == [(0,), (1,), (2,)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(made) <= 3 + 2 * THREADS_AHEAD
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_workers_ignore_stop_signals_but_for_a_sigterm_of_their_parent(tiny_shards):
    split = ShardSet(tiny_shards / "train")
    alone = TrainLoader(split, make_spec("hrnet", "opencv", workers=0))
    helped = TrainLoader(split, make_spec("hrnet", "opencv", workers=2, worker_kind="processes"))
    before = set(multiprocessing.active_children())
    assert all(map(torch.equal, alone.next(), helped.next()))
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        for number in STOP_SIGNALS:  # from another process than their parent
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    for _ in range(9):  # more than were made ahead
        assert all(map(torch.equal, alone.next(), helped.next()))
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not may_mount(), reason="no small disk can be mounted here")
def test_too_little_shared_memory_is_one_clear_error(tiny_shards):
    code = f"""
from pathlib import Path
from common.errors import run_main
from helpers import make_spec
from pipelines.loader import TrainLoader
from pipelines.shards import ShardSet
spec = make_spec("hrnet", "opencv", workers=2, worker_kind="processes", batch_size=32, input_px=256)
run_main(TrainLoader(ShardSet(Path("{tiny_shards}/train")), spec).next)
"""
    mount = "mount -t tmpfs -o size=2m x /dev/shm && exec"
    command = f"{mount} {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no room for a batch of" in done.stderr and "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_never_destroys_what_it_inherits(tiny_shards, tmp_path):
    """A dead pipeline of DALI would wait for its threads, which are not in the worker, for ever."""
    log, main_process, armed = tmp_path / "log", os.getpid(), [True]

    class Inherited:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            if os.getpid() != main_process:
                log.touch()

    spec = make_spec("hrnet", "opencv", workers=1, worker_kind="processes")
    loader = TrainLoader(ShardSet(tiny_shards / "train"), spec)
    thresholds = gc.get_threshold()
    os.register_at_fork(after_in_child=lambda: gc.set_threshold(1) if armed else None)
    gc.set_threshold(1_000_000)
    Inherited()
    try:
        loader.next()
    finally:
        gc.set_threshold(*thresholds)
        armed.clear()
    assert not log.exists() and gc.isenabled()
