"""Imported by the programs before all else: Ctrl-C while they load torch leaves a sentence too.

It is the one module whose import does something, for nothing else runs before the other imports.
"""

import os
import signal
import sys
from types import TracebackType

from common.errors import say_interrupted


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show


def hold_signals_of_a_resumed_run() -> None:
    """Keep SIGTERM and SIGUSR1 for `training/preemption.py` while a run that goes on is started.

    The kernel keeps them, whatever is imported meanwhile. A run that begins has nothing to lose
    yet, and Ctrl-C is somebody who waits: these end the start at once.
    """
    is_asked = any(word.split("=")[0] == "--resume" for word in sys.argv)
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if (is_asked or is_restart) and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
