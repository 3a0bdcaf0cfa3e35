"""The progress of a run on the console: one live line on a terminal, plain lines in a file."""

import shutil
import sys
import time

from common.cli import SECONDS_BETWEEN_LINES

SECONDS_BETWEEN_UPDATES = 0.2
"""Of the live line."""


class Console:
    """On a terminal one live line at the bottom; elsewhere whole lines, without control codes."""

    def __init__(self) -> None:
        """Write to stderr."""
        self._stream = sys.stderr
        self.is_live = self._stream.isatty()
        self._line = ""
        self._shown_at = -float("inf")

    def show(self, parts: list[str], at_once: bool = False) -> None:
        """Show the progress, unless that was done a moment ago.

        parts: the most important first; a terminal leaves out those that do not fit.
        """
        now = time.monotonic()
        wait = SECONDS_BETWEEN_UPDATES if self.is_live else SECONDS_BETWEEN_LINES
        if now - self._shown_at < wait and not at_once:
            return
        self._shown_at = now
        if not self.is_live:
            print("  ".join(parts), file=self._stream, flush=True)
            return
        while len("  ".join(parts)) >= shutil.get_terminal_size().columns and len(parts) > 1:
            parts = parts[:-1]
        self._line = "  ".join(parts)
        print(f"\r{self._line}\x1b[K", end="", file=self._stream, flush=True)

    def info(self, text: str) -> None:
        """Print a line above the live one."""
        start, end = ("\r\x1b[K", f"\n{self._line}") if self._line else ("", "\n")
        print(start + text, end=end, file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line, so that its last state stays."""
        if self._line:
            print(file=self._stream, flush=True)
        self._line = ""
