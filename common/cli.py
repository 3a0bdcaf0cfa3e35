"""Command-line parsing, and progress shown on a terminal or in a log file."""

import argparse
import difflib
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

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


SYNONYMS = {"gpu": "cuda", "learning_rate": "lr"}
"""Names in other programs, and the names here."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that suggests the known name with the same last part (`optim.lr` for `lr`).

    Else the most similar one; empty if none is similar.
    """
    known, last = list(dict.fromkeys(known)), _last_part(name)
    near = [each for each in known if _last_part(each) == SYNONYMS.get(last, last)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _last_part(name: str) -> str:
    return name.lstrip("-").rsplit(".", 1)[-1]


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
"""Interval of progress in a log file; shorter work shows none there."""


def progress(
    items: Iterable | None, what: str, unit: str, total: int | None = None, shown: bool = True
) -> tqdm:
    """The items, with a bar that counts them; without items it counts calls of its `update`.

    unit: a plural. total: by default len(items); None if unknown. shown: False hides the bar.
    """
    # Leave room for the ^C that a terminal echoes: it must not wrap the bar into a second line.
    columns = shutil.get_terminal_size().columns - 3
    times = () if sys.stderr.isatty() else ("mininterval", "maxinterval", "delay")
    how: dict[str, Any] = dict.fromkeys(times, SECONDS_BETWEEN_LINES)
    return tqdm(items, what, total, unit=f" {unit}", ncols=columns, disable=not shown, **how)


def info(text: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
