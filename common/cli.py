"""Command-line parsing, and progress shown on a terminal or in a log file."""

import argparse
import difflib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from common.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations; errors are InputErrors with a suggestion."""

    def __init__(self, **arguments: Any):
        super().__init__(allow_abbrev=False, **arguments)

    def parse_known_args(self, args=None, namespace=None):
        """Raises InputError; an unknown option is reported before any other mistake."""
        words = list(sys.argv[1:] if args is None else args)
        check_options(words, self._option_string_actions, f"{self.prog} --help")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage."""
        raise InputError("command line", message, "known options", f"see {self.prog} --help")


def check_options(words: Iterable[str], known: Iterable[str], help_command: str) -> None:
    """Raise InputError at the first unknown option, with the most similar known one."""
    known = [option for option in known if option.startswith("--")]
    for word in words:
        option = word.split("=", 1)[0]
        if option == "--":
            return
        if option.startswith("--") and option not in known:
            advice = did_you_mean(option, known) or f"see {help_command}"
            found = f"unknown option {option}"
            raise InputError("command line", found, "an option of this program", advice)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that suggests the most similar known name; empty if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else ""


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `least` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    number.__name__ = f"whole number ({least} or more)"  # argparse puts it into its message
    return number


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add `--device` and `--precision`, for programs that run a network."""
    devices, precisions = ("auto", "cuda", "cpu"), ("auto", "bf16", "fp16", "fp32")
    text = "auto: a GPU if there is one (default: %(default)s)"
    group.add_argument("--device", choices=devices, default="auto", help=text)
    text = "autocast type; fp32: no autocast (default: %(default)s)"
    group.add_argument("--precision", choices=precisions, default="fp32", help=text)


SECONDS_BETWEEN_LINES = 15.0
"""Interval of progress lines if stderr is not a terminal; shorter work prints none."""

T = TypeVar("T")


@contextmanager
def progress_bar(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """Yields a function that adds to the count. total: None if unknown. unit: a plural."""
    if not sys.stderr.isatty():
        yield _line_printer(what, total, unit)
        return
    # Leave room for the ^C that a terminal echoes: it must not wrap the bar into a second line.
    columns = shutil.get_terminal_size().columns - 3
    with tqdm(desc=what, total=total, unit=f" {unit}", ncols=columns) as bar:
        yield bar.update


def _line_printer(what: str, total: int | None, unit: str) -> Callable[[int], object]:
    """A function that adds to the count, and prints a line every SECONDS_BETWEEN_LINES."""
    done, began = 0, time.monotonic()
    printed = began

    def advance(more: int) -> None:
        nonlocal done, printed
        done, now = done + more, time.monotonic()
        if now - printed < SECONDS_BETWEEN_LINES:
            return
        printed, line = now, f"{what}: {done:,} {unit}"
        if total is not None:
            left = (now - began) * max(0, total - done) / max(1, done)
            line = f"{what}: {done:,} of {total:,} {unit}, {tqdm.format_interval(left)} left"
        print(line, file=sys.stderr, flush=True)

    return advance


def progress(
    items: Iterable[T], what: str, unit: str, total: int | None = None, shown: bool = True
) -> Iterator[T]:
    """Yield the items and show progress. total: by default len(items). shown: False hides it."""
    if not shown:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


def info(text: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
