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
"""How often a rank publishes its place within the time limit; at least once a second."""
ANSWER_TICKS = 4
"""A rank that publishes nothing for so many ticks does not answer."""


class Watchdog:
    """A thread of each rank that publishes its place and ends it after a time without progress.

    It counts ticks, not the clock, so that a process that was suspended as a whole continues.
    """

    def __init__(self, dist: DistributedContext, seconds: float):
        """seconds: without progress, after which the process ends with EXIT_RESUME; 0: never."""
        self._dist, self._seconds = dist, seconds
        self._tick_s = min(1.0, seconds / TICKS)
        self._place, self._ticks = "the start", 0
        self._stopped = threading.Event()

    def progress(self, place: str) -> None:
        """Record that the rank has reached a place, such as "step 12"."""
        self._place, self._ticks = place, 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block."""
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
                    store.set(f"place/{self._dist.rank}", f"{self._place} ({count})")
                except DistError:  # the node of the store is lost
                    store = None
            if self._ticks * self._tick_s >= self._seconds:
                self._end(store)

    def _end(self, store: Store | None) -> None:
        print(
            f"rank {self._dist.rank}: no progress for {self._seconds:g} s "
            f"(train.hang_minutes) since {self._place}. Its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if store:
            for line in self._other_ranks(store):
                print(line, file=sys.stderr, flush=True)
        os._exit(EXIT_RESUME)

    def _other_ranks(self, store: Store) -> list[str]:
        """The place of each other rank, and whether it still publishes it."""
        others = [rank for rank in range(self._dist.world_size) if rank != self._dist.rank]
        try:
            keys = [f"place/{rank}" for rank in others if store.check([f"place/{rank}"])]
            before = store.multi_get(keys)
            time.sleep(ANSWER_TICKS * self._tick_s)
            after = store.multi_get(keys)
        except DistError:
            return ["the other ranks: torchrun's store does not answer"]
        return [
            f"rank {key.removeprefix('place/')}: {place.decode().rpartition(' ')[0]}"
            + (", and its process does not answer" if place == later else "")
            for key, place, later in zip(keys, before, after, strict=True)
        ]
