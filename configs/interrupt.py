"""Imported by the programs before all else: Ctrl-C while they load torch leaves a sentence too.

It is the one module whose import does something, for nothing else runs before the other imports.
"""

import sys
from types import TracebackType

from configs.errors import say_interrupted


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show
