"""A list of measurements under a time limit; what is done is on the disk at once."""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from benchmarks.timing import Result, table, world
from common.cli import Parser
from common.errors import InputError
from common.files import write_atomic

Report = dict[str, Any]


class Deadline:
    """The end of the time that a program may take."""

    def __init__(self, minutes: float):
        """minutes: from now on."""
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self._end - time.monotonic()


class Piece(NamedTuple):
    """One measurement."""

    name: str
    run: Callable[[], Any]
    """Plain values for the report, or Results."""
    seconds: float = 0.0
    """That it is expected to take; with less time left it is not begun."""


def add_common_options(parser: Parser, minutes: float) -> None:
    """Where to measure, how long, and where the files go."""
    # fmt: off
    add = parser.add_argument_group("where and how long").add_argument
    add("--out", default="runs/gpu", help="folder of the JSON and PNG (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu tries the program out; its numbers say nothing (default: %(default)s)")
    add("--minutes", type=float, default=minutes,
        help="what does not fit is left out, and named (default: %(default)s)")
    add("--only", nargs="+", metavar="WORD",
        help="run what has one of these words in its name")
    add("--rounds", type=int, default=3, help="turns of each case (default: %(default)s)")
    # fmt: on


def require_device(name: str) -> torch.device:
    """The device. Raises InputError where it is a GPU and there is none."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            "this benchmark",
            f"no CUDA device that torch {torch.__version__} can use",
            "an NVIDIA GPU, its driver, and a CUDA build of torch",
            "look at nvidia-smi; --device cpu tries the program out without measuring anything",
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def run_pieces(
    pieces: list[Piece],
    report: Report,
    path: Path,
    device: torch.device,
    deadline: Deadline,
    panels: Callable[[Report], dict[str, list["Bar"]]] | None = None,
) -> int:
    """Run the pieces in order into the report, which is written after each. Returns an exit code.

    A piece that fails is named with its error, and the others run: time on a GPU is dear. report:
    entries of their own for the pieces; `world`, `seconds`, `failed` and `left_out` beside them.
    path: of the JSON; bars go beside it as a PNG. panels: makes them, by default of all Results.
    """
    report |= {"world": world(device), "seconds": {}, "failed": {}, "left_out": []}
    chosen = report["options"].get("only") or [""]
    for piece in pieces:
        if not any(word in piece.name for word in chosen):
            continue
        if deadline.left() < piece.seconds:
            report["left_out"].append(piece.name)
            continue
        print(f"{piece.name} ... ({deadline.left():.0f} s left)", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            found = piece.run()
        except Exception as error:
            traceback.print_exc()
            report["failed"][piece.name] = f"{type(error).__name__}: {str(error)[:500]}"
        else:
            report[piece.name] = _plain(piece.name, found)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report["seconds"][piece.name] = round(time.monotonic() - started, 1)
        keep(report, path, panels or panels_of)
    keep(report, path, panels or panels_of)
    for name, reason in report["failed"].items():
        print(f"FAILED {name}: {reason}")
    if report["left_out"]:
        print(f"not measured, for the time was over: {', '.join(report['left_out'])}")
    print(f"wrote {path} and {path.with_suffix('.png')}")
    return 1 if report["failed"] else 0


def _plain(name: str, found: Any) -> Any:
    """Results as a printed table and dicts; anything else printed as it is."""
    if isinstance(found, list) and found and isinstance(found[0], Result):
        print(table(name, "people", found), end="\n\n", flush=True)
        return [result._asdict() for result in found]
    print(f"{name}: {json.dumps(found)}\n", flush=True)
    return found


def keep(report: Report, path: Path, panels: Callable[[Report], dict[str, list["Bar"]]]) -> None:
    """Write a report, whole or not at all, and its bars."""
    write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    draw_bars(panels(report), path.with_suffix(".png"), report["world"]["device"])


class Bar(NamedTuple):
    """A value to draw, with its label."""

    name: str
    value: float
    label: str


def panels_of(report: Report) -> dict[str, list[Bar]]:
    """The bars of every list of Results in a report."""
    lists = {
        name: entry
        for name, entry in report.items()
        if isinstance(entry, list) and entry and isinstance(entry[0], dict) and "median" in entry[0]
    }
    return {
        f"{name}, people/s": [
            Bar(r["name"], r["median"], f"{r['median']:,.0f}  ({r['ratio']:.2f} x)") for r in entry
        ]
        for name, entry in lists.items()
    }


ROW_PX, NAME_PX, BAR_PX, LABEL_PX = 22, 430, 380, 190


def draw_bars(panels: dict[str, list[Bar]], path: Path, title: str) -> None:
    """Write a PNG: a panel a title, a bar a value, the longest of a panel at full width."""
    rows = 1 + sum(len(bars) + 2 for bars in panels.values())
    image = np.full(((rows + 1) * ROW_PX, NAME_PX + BAR_PX + LABEL_PX, 3), 255, dtype=np.uint8)
    row = 1
    _write(image, title, 10, row, bold=True)
    for panel, bars in panels.items():
        row += 2
        _write(image, panel, 10, row, bold=True)
        most = max((bar.value for bar in bars), default=0) or 1
        for bar in bars:
            row += 1
            _write(image, bar.name, 20, row)
            end = NAME_PX + round(BAR_PX * bar.value / most)
            top, bottom = row * ROW_PX - 14, row * ROW_PX + 2
            cv2.rectangle(image, (NAME_PX, top), (end, bottom), (168, 120, 72), cv2.FILLED)
            _write(image, bar.label, end + 6, row)
    done, data = cv2.imencode(".png", image)
    assert done
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def _write(image: np.ndarray, text: str, x: int, row: int, bold: bool = False) -> None:
    cv2.putText(image, text, (x, row * ROW_PX), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40),
                2 if bold else 1, cv2.LINE_AA)  # fmt: skip
