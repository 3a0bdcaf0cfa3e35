"""Ends a rank that makes no progress: a stopped process, a lost file system, a stuck collective."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from torch.distributed import DistError, Store

from common.distributed import DistributedContext, torchrun_store
from common.errors import EXIT_RESUME

TICKS = 20
"""How often a rank reports its position within the time limit; at least once a second."""
ANSWER_TICKS = 4
"""A rank that reports nothing for this number of ticks does not answer."""


class Watchdog:
    """A thread of each rank that reports its position and ends it after a time without progress.

    It counts ticks instead of reading a clock, so that a process that was suspended continues.
    """

    def __init__(self, dist: DistributedContext, seconds: float):
        """seconds: time without progress before the process exits with EXIT_RESUME; 0: never."""
        self._dist, self._seconds = dist, seconds
        self._tick_s = min(1.0, seconds / TICKS)
        self._position, self._ticks = "the start", 0
        self._stopped = threading.Event()

    def progress(self, position: str) -> None:
        """Record that the rank has reached a position, such as "step 12"."""
        self._position, self._ticks = position, 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        if self._seconds:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            if self._seconds:
                thread.join()

    def _watch(self) -> None:
        store, count = torchrun_store(), 0
        while not self._stopped.wait(self._tick_s):
            count += 1
            self._ticks += 1
            if store:
                try:
                    store.set(f"position/{self._dist.rank}", f"{self._position} ({count})")
                except DistError:  # the node of the store is lost
                    store = None
            if self._ticks * self._tick_s >= self._seconds:
                self._end(store)

    def _end(self, store: Store | None) -> None:
        print(
            f"rank {self._dist.rank}: no progress for {self._seconds:g} s "
            f"(train.hang_minutes) since {self._position}. Its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if store:
            for line in self._other_ranks(store):
                print(line, file=sys.stderr, flush=True)
        os._exit(EXIT_RESUME)

    def _other_ranks(self, store: Store) -> list[str]:
        """The position of each other rank, and whether it still reports it."""
        others = [rank for rank in range(self._dist.world_size) if rank != self._dist.rank]
        try:
            keys = [f"position/{rank}" for rank in others if store.check([f"position/{rank}"])]
            before = store.multi_get(keys)
            time.sleep(ANSWER_TICKS * self._tick_s)
            after = store.multi_get(keys)
        except DistError:
            return ["the other ranks: torchrun's store does not answer"]
        return [
            f"rank {key.removeprefix('position/')}: {position.decode().rpartition(' ')[0]}"
            + (", and its process does not answer" if position == later else "")
            for key, position, later in zip(keys, before, after, strict=True)
        ]
