"""Signals that end a run kindly: the step is finished, a checkpoint is written."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.distributed import launched_by_torchrun
from pipelines.opencv_loader import STOP_SIGNALS

PATIENCE_S = 10.0
"""Under torchrun, signals within this time of the first are the same one, forwarded."""


@contextmanager
def noted() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in the list instead of ending; a second one ends at once.

    torchrun forwards what it gets, and what is sent to a whole job reaches a rank twice; so there a
    second one counts only after PATIENCE_S.
    """
    numbers: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield numbers  # signals can be handled in the main thread alone
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    first_at = 0.0
    arrivals, announced = os.pipe()
    os.set_blocking(announced, False)

    def note(number: int, frame: object) -> None:
        """Keep the signal's number; let the next one, or one that came with it, end the process."""
        nonlocal first_at
        first_at = first_at or time.monotonic()
        numbers.append(number)
        late = time.monotonic() - first_at > PATIENCE_S
        if late or not launched_by_torchrun():
            # The kernel deals with the next one, even while an operation of torch goes on.
            for each in STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            # What came twice during one such operation Python notes once.
            came = [each for each in os.read(arrivals, 1 << 16) if each in STOP_SIGNALS]
            if late or len(came) > 1:
                os.kill(os.getpid(), (came or [number])[-1])

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    woken_before = signal.set_wakeup_fd(announced, warn_on_full_buffer=False)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield numbers
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(arrivals)
        os.close(announced)
