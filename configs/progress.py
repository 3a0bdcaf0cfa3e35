"""How far long work is: a bar on a terminal, elsewhere a plain line every 15 seconds at most."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
"""Between two lines where nobody watches; work that takes less has none."""

T = TypeVar("T")


@contextmanager
def counting(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A function to call with how many more are done. total: None if unknown. unit: in plural."""
    if not sys.stderr.isatty():
        yield _Lines(what, total, unit).update
        return
    # The ^C that a terminal echoes has room: it must not push the bar into a second line.
    columns = shutil.get_terminal_size().columns - 3
    with tqdm(desc=what, total=total, unit=f" {unit}", ncols=columns) as bar:
        yield bar.update


def progress(
    items: Iterable[T], what: str, unit: str, total: int | None = None, shown: bool = True
) -> Iterator[T]:
    """The items; each counts when the next is asked for. total: len(items) where there is one.

    shown: False for a process that is to be silent.
    """
    if not shown:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counting(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


def say(text: str) -> None:
    """A line that stays, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:34, 5:06:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _Lines:
    """The plain lines of one piece of work."""

    def __init__(self, what: str, total: int | None, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._began = self._shown = time.monotonic()

    def update(self, more: int) -> None:
        """So many more are done; prints a line if it is time for one."""
        self._done += more
        now = time.monotonic()
        if now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        line = f"{self._what}: {self._done:,}"
        if self._total is None:
            line += f" {self._unit}"
        else:
            rest = max(0, self._total - self._done) / max(1, self._done)
            line += f" of {self._total:,} {self._unit}, {duration(rest * (now - self._began))} left"
        print(line, file=sys.stderr, flush=True)
