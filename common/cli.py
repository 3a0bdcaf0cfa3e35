"""Command lines that name mistakes, and progress shown on a terminal or in a log file."""

import argparse
import difflib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from common.errors import InputError

_KINDS: dict[Any, str] = {int: "whole number", float: "number"}
_OTHER_NAMES = {"gpu": "cuda", "bfloat16": "bf16", "float16": "fp16", "half": "fp16",
                "float32": "fp32", "float": "fp32"}  # fmt: skip
"""What others call a choice, where no letters in common would lead to it."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown option is answered with the nearest known one."""

    def __init__(self, **arguments: Any):
        """arguments: as argparse.ArgumentParser takes them."""
        super().__init__(allow_abbrev=False, **arguments)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Raises InputError for an unknown option before anything else is looked at."""
        words = list(sys.argv[1:] if args is None else args)
        check_options(words, self._option_string_actions, f"{self.prog} --help")
        return super().parse_known_args(words, namespace)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            kind = _KINDS.get(action.type) or getattr(action.type, "__name__", "value")
            advice = f"see {self.prog} --help"
            raise InputError(_name(action), repr(text), f"a {kind}", advice) from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise wrong_choice(_name(action), value, action.choices)

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage."""
        raise InputError(
            "command line", message, "options of this program", f"see {self.prog} --help"
        )


def _name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or action.dest


def wrong_choice(option: str, value: object, choices: Iterable[object]) -> InputError:
    """The error for a value that is none of the choices; it names the nearest."""
    names, word = [str(choice) for choice in choices], str(value)
    near = difflib.get_close_matches(_OTHER_NAMES.get(word.lower(), word.lower()), names, n=1)
    advice = f"did you mean {near[0]}?" if near else "give one of them"
    if "," in word and set(word.split(",")) <= set(names):
        advice = f"put spaces between them: {option} {word.replace(',', ' ')}"
    return InputError(option, repr(value), f"one of {', '.join(names)}", advice)


def check_options(words: Iterable[str], known: Iterable[str], listing: str) -> None:
    """Raise InputError at the first unknown option, naming the nearest. listing: shows them all."""
    known = [option for option in known if option.startswith("--")]
    for word in words:
        option = word.split("=", 1)[0]
        if word == "--":
            return
        if option.startswith("--") and option not in known:
            raise unknown(option, known, listing)


def unknown(name: str, known: list[str], listing: str) -> InputError:
    """The error for a setting that does not exist."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    beside = [option for option in known if option.startswith(name.split(".")[0] + ".")]
    advice = f"known are {', '.join(beside)}" if beside else f"see {listing}"
    advice = f"did you mean {near[0]}?" if near else advice
    return InputError("command line", f"unknown option {name}", "one of this program", advice)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    number.__name__ = f"whole number from {least} on"  # which the parser's message says
    return number


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add `--device` and `--precision`, as the programs that run a network take them."""
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: a GPU where there is one (default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="fp32",
        help="arithmetic (default: %(default)s)",
    )


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


def info(text: str) -> None:
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
