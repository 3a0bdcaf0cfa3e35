"""Signals that end a run early: the step is finished and a checkpoint is written."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.distributed import launched_by_torchrun
from pipelines.workers import STOP_SIGNALS

FORWARDING_S = 10.0
"""torchrun forwards signals that its ranks also receive, so repeats in this time are ignored."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list; a second SIGINT or SIGTERM ends the process.

    Must be entered in the main thread.
    """
    received: list[int] = []
    first_at = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first_at
        now = time.monotonic()
        if not received:
            first_at = now
        elif number != signal.SIGUSR1 and not (
            launched_by_torchrun() and now - first_at < FORWARDING_S
        ):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
