"""Where a run stands, on the screen: one line that is written over, or plain lines in a file."""

import shutil
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

from common.cli import SECONDS_BETWEEN_LINES

SECONDS_BETWEEN = 0.2
"""Between two states of the live line."""


class Unfailing:
    """A text stream that nothing fails on: what a closed pipe or a full disk does not take is lost.

    Whoever reads along may go, and a disk fill up; that is no reason to end a run.
    """

    def __init__(self, stream: TextIO):
        """stream: stdout or stderr."""
        self._stream = stream

    def write(self, text: str) -> int:
        """All of the text, if the stream takes it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As far as the stream lets it."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def let_output_fail() -> None:
    """Go on without a screen where stdout or stderr takes no more; the exit code stays, too."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)


class Screen:
    """On a terminal one live line at the bottom; elsewhere whole lines, without control codes."""

    def __init__(self, stream: TextIO | None = None):
        """stream: stderr if it is not given."""
        self._stream = Unfailing(stream or sys.stderr)
        self.is_live = self._stream.isatty()
        self._line = ""
        self._shown = -float("inf")

    def show(self, parts: list[str], at_once: bool = False) -> None:
        """Show where the run stands, unless that was shown a moment ago.

        parts: the most important first; on a terminal those for which there is no room are left
        out.
        """
        now = time.monotonic()
        wait = SECONDS_BETWEEN if self.is_live else SECONDS_BETWEEN_LINES
        if now - self._shown < wait and not at_once:
            return
        self._shown = now
        if not self.is_live:
            print("  ".join(parts), file=self._stream, flush=True)
            return
        self._line = fit(parts, shutil.get_terminal_size().columns - 1)
        self._overwrite()

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        start = "\r\x1b[K" if self._line else ""
        print(start + text, file=self._stream, flush=True)
        self._overwrite()

    def close(self) -> None:
        """Leave the last state of the live line where it is."""
        if self._line:
            print(file=self._stream, flush=True)
        self._line = ""

    def _overwrite(self) -> None:
        if self._line:
            print(f"\r{self._line}\x1b[K", end="", file=self._stream, flush=True)


def fit(parts: list[str], columns: int) -> str:
    """As many of the first parts as fit, cut where not even the first one does."""
    line = parts[0][: max(columns, 0)]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > columns:
            break
        line += "  " + part
    return line
