"""The worker processes of tools/make_shards.py."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import cv2

from common.system import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def crew(workers: int) -> Iterator[Executor | None]:
    """Worker processes, or None where this process does the work."""
    if workers <= 1:
        cv2.setNumThreads(1)
        keep_freed_memory()
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            _start_all(pool, workers)
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_all(pool: Executor, workers: int) -> None:
    """Start the processes deaf to Ctrl-C, which they inherit; it is for this process alone."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(workers):
            pool.submit(os.getpid)
    finally:
        signal.signal(signal.SIGINT, before)


def spread(
    pool: Executor | None, work: Callable[[T], R], tasks: list[T], chunk: int = 1
) -> Iterator[R]:
    """work(task) of each task, in order."""
    return map(work, tasks) if pool is None else pool.map(work, tasks, chunksize=chunk)


def _start_worker() -> None:
    """Let this process end with its parent, even where that is killed."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
