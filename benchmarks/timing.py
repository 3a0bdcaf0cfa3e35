"""Timing to be trusted on a noisy machine: warm up, synchronise, take turns, give the spread."""

import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from common.cli import counting
from common.system import usable_cores

ROOT = Path(__file__).resolve().parents[1]


class Case(NamedTuple):
    """Something to time."""

    name: str
    run: Callable[[], int]
    """Does a piece of work and returns how many units (people, ...) it was."""
    prepare: Callable[[], object] = lambda: None
    """Runs before each turn, untimed: starts what works ahead, and uses up its first results."""
    finish: Callable[[], object] = lambda: None
    """Runs after each turn, untimed: stops it, or it would work on in the others' turns."""


class Result(NamedTuple):
    """Rates of one case over the rounds."""

    name: str
    median: float
    """Units per second."""
    low: float
    high: float
    ratio: float
    """Median over the rounds of this case's rate over that of the first case in the same round."""
    ratio_low: float
    ratio_high: float
    cpu_ms: float = 0.0
    """CPU time of this process and its children for a unit, median; 0 where it is unknown."""


def take_turns(cases: list[Case], rounds: int, device: torch.device) -> list[Result]:
    """Run every case once per round, one after the other, so that a slow spell hits them all.

    A first round warms up and does not count. The first case is what the ratios divide by.
    """
    rates: list[list[float]] = [[] for _ in cases]
    costs: list[list[float]] = [[] for _ in cases]
    with counting("timing", (rounds + 1) * len(cases), "turns") as advance:
        for number, (case, values, cost) in itertools.product(
            range(rounds + 1), zip(cases, rates, costs, strict=True)
        ):
            case.prepare()
            synchronize(device)
            busy, start = cpu_seconds(), time.perf_counter()
            units = case.run()
            synchronize(device)
            seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
            case.finish()
            if number:
                values.append(units / seconds)
                cost.append(1e3 * busy / units)
            advance(1)
    return [
        _result(case.name, values, [v / b for v, b in zip(values, rates[0], strict=True)], cost)
        for case, values, cost in zip(cases, rates, costs, strict=True)
    ]


def _result(name: str, rates: list[float], ratios: list[float], costs: list[float]) -> Result:
    return Result(
        name,
        statistics.median(rates), min(rates), max(rates),
        statistics.median(ratios), min(ratios), max(ratios), statistics.median(costs),
    )  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Wait for the GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(title: str, unit: str, results: list[Result]) -> str:
    """Lines: a case a line, its rate and its ratio to the first."""
    width = max(len(r.name) for r in results)
    lines = [
        f"{title}, {unit}/s: median (lowest to highest), ratio to the first line, CPU time of one"
    ]
    for r in results:
        spread = f"({_number(r.low)} to {_number(r.high)})"
        ratio = f"{r.ratio:.2f} x ({r.ratio_low:.2f} to {r.ratio_high:.2f})"
        cost = f"{r.cpu_ms:.2f} ms"
        lines.append(
            f"  {r.name:<{width}}  {_number(r.median):>10}  {spread:<22} {ratio:<24} {cost:>10}"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def world(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions, to be kept with the numbers."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "commit": _commit(),
        "device": gpu or "cpu",
        "processor": _processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cpu_seconds() -> float:
    """CPU time that this process and its children have used; 0 where it is unknown."""
    ticks = 0
    for pid in _processes():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes() -> list[int | None]:
    children = [child.pid for child in multiprocessing.active_children()]
    return [multiprocessing.current_process().pid, *children]


def memory_mib() -> float:
    """MiB that this process and its children hold, shared pages counted once; 0 where unknown."""
    total = 0
    for pid in _processes():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0.0
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
