"""Runs a function over batches of keys in worker threads or processes, in the batches' order.

Threads share the process's memory and hand batches over without a copy. Processes do not share
Python's interpreter lock.
"""

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import InputError
from common.system import keep_freed_memory

THREADS_AHEAD = 2
"""Batches per thread that are being made or are ready."""
PREFETCH = 4
"""Batches that each worker process prefetches."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a program to stop. Worker processes leave them to the main process."""

_CAN_IDENTIFY_SENDERS = hasattr(signal, "sigwaitinfo")  # not on macOS

Keys = TypeVar("Keys")
Tensors = TypeVar("Tensors", bound=NamedTuple)
"""A named tuple of tensors."""


def in_threads(
    make: Callable[[Keys], Tensors], batches: Iterable[Keys], workers: int, pin: bool
) -> Iterator[Tensors]:
    """The results of `make`, run in threads. An error of `make` is raised instead of its batch.

    pin: page-locked memory. Sets OpenCV's own thread count to one.
    """
    cv2.setNumThreads(0)
    pool = ThreadPoolExecutor(workers)
    if pin:  # a new thread would use the first GPU, not this rank's
        device = (torch.cuda.current_device(),)
        pool = ThreadPoolExecutor(workers, initializer=torch.cuda.set_device, initargs=device)

    def task(keys: Keys) -> Tensors:
        batch = make(keys)
        return type(batch)(*(tensor.pin_memory() for tensor in batch)) if pin else batch

    waiting: deque[Future[Tensors]] = deque()
    try:
        for keys in batches:
            waiting.append(pool.submit(task, keys))
            if len(waiting) == THREADS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(
    make: Callable[[Keys], Tensors], batches: Iterable[Keys], workers: int, pin: bool
) -> Iterator[Tensors]:
    """The results of `make`, run in processes. Raises its InputErrors; other errors become text.

    pin: page-locked memory.
    """
    loader = DataLoader(
        _Batches(make),
        batch_size=None,  # a key of the sampler is a whole batch
        sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH,
        # Its own: by default it would draw from the generator that a resumed run restores.
        generator=torch.Generator(),
    )
    with _stop_signals_blocked():
        # A worker must not destroy garbage that it inherits: a DALI pipeline would wait for
        # threads that a forked process lacks. _start_worker freezes what is there.
        gc.disable()
        results = iter(loader)
        gc.enable()
    for result in results:
        if isinstance(result, InputError):
            break
        yield result
    else:
        return
    # End the workers now and leave no reference cycle of error, traceback and this frame, or the
    # garbage collector would wait five seconds for each worker.
    del results, loader
    try:
        raise result
    finally:
        del result


class _Batches(Dataset):
    """Maps keys to batches. Returns errors: a DataLoader turns raised ones into text."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, keys: Any) -> Any:
        try:
            batch = self.make(keys)
        except InputError as error:
            return error
        try:
            # Otherwise the queue's thread does it, and after its failure the batch never arrives.
            for tensor in batch:
                tensor.share_memory_()
        except RuntimeError as error:
            size = sum(tensor.nbytes for tensor in batch) / 1e6
            found = f"no room for a batch of {size:.1f} MB ({str(error).splitlines()[0]})"
            expected = f"room for {PREFETCH + 1} batches for each worker and rank"
            advice = "enlarge it (docker run --shm-size=2g), or use --data.worker_kind threads"
            return InputError("the workers' shared memory, /dev/shm", found, expected, advice)
        return batch


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals; processes started meanwhile inherit this and never receive them."""
    blocked = STOP_SIGNALS if _CAN_IDENTIFY_SENDERS else (signal.SIGINT, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Use one core, keep freed memory, and end when the main process asks for it."""
    gc.freeze()  # inherited garbage is never destroyed here (in_processes)
    gc.enable()
    cv2.setNumThreads(0)
    keep_freed_memory()
    if _CAN_IDENTIFY_SENDERS:
        threading.Thread(target=_exit_on_sigterm_from, args=[os.getppid()], daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    """Discard blocked signals; a SIGTERM of the parent (`Process.terminate`) ends the worker."""
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
