"""Interleaved timing of cases, in this process or in a child process with a time limit."""

import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import torch

from common.system import usable_cores

ROOT = Path(__file__).resolve().parents[1]
H200_BF16_TFLOPS = 790
"""Published measurement with torch: bf16 matrix product of 8192 x 8192 on an NVIDIA H200."""


class Case(NamedTuple):
    """Something to time."""

    name: str
    run: Callable[[], int]
    """Does some work and returns the number of people."""
    prepare: Callable[[], object] = lambda: None
    """Runs before each timed run: starts a loader, and consumes its prefetched batches."""
    finish: Callable[[], object] = lambda: None
    """Runs after each timed run: stops the loader, which would slow down the other cases."""
    tflop: float = 0.0
    """10^12 floating-point operations per person; 0 if they are not counted."""


class Turn(NamedTuple):
    """One timed run of a case. Round 0 warms up and does not count."""

    case: Any
    """Its name."""
    round: int
    per_s: float
    cpu_ms: float
    """CPU time of this process and its children per person; 0 if unknown."""
    peak_mb: float
    """Peak GPU memory added by this run, 10^6 bytes; in round 0 including the network."""
    tflop: float


Rows = list[dict[str, Any]]
Group = Callable[[], list[Case] | dict[str, Any]]
"""Builds cases that are timed against each other, or measures by itself and returns facts."""


def take_turns(cases: list[Case], rounds: int, device: torch.device) -> Iterator[str | Turn]:
    """Run all cases once per round, so that a slow phase of the machine affects all of them.

    Yields the name of a case before it runs, and its Turn afterwards.
    """
    on_gpu = device.type == "cuda"
    for number in range(rounds + 1):
        for case in cases:
            yield case.name
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if on_gpu else 0
            case.prepare()
            synchronize(device)
            busy, start = cpu_seconds(), time.perf_counter()
            people = case.run()
            synchronize(device)
            seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
            case.finish()
            peak_mb = (torch.cuda.max_memory_allocated() - held) / 1e6 if on_gpu else 0.0
            cpu_ms = 1e3 * busy / people
            yield Turn(case.name, number, people / seconds, cpu_ms, peak_mb, case.tflop)


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(turns: list[Turn]) -> Rows:
    """One row per case: people/s over the rounds, and ratios to the first case of each round."""
    rows, names = [], list(dict.fromkeys(turn.case for turn in turns if turn.round))
    base = {turn.round: turn.per_s for turn in turns if turn.case == names[0]} if names else {}
    for name in names:
        first, *timed = (turn for turn in turns if turn.case == name)
        row: dict[str, Any] = {"name": name}
        ratios = [turn.per_s / base[turn.round] for turn in timed]
        for prefix, values in (("", [turn.per_s for turn in timed]), ("ratio_", ratios)):
            row |= {f"{prefix}low": min(values), f"{prefix}high": max(values)}
            row[prefix.rstrip("_") or "median"] = statistics.median(values)
        row["cpu_ms"] = statistics.median(turn.cpu_ms for turn in timed)
        if first.tflop:
            row["tflops"] = first.tflop * row["median"]
            row["share_of_790_tflops"] = row["tflops"] / H200_BF16_TFLOPS
        if first.peak_mb:
            row["peak_mb"] = first.peak_mb
        rows.append(row)
    return rows


def run_here(group: Group, rounds: int, device: torch.device) -> Rows | dict[str, Any]:
    """Run a group in this process; an error ends the program."""
    found = group()
    if isinstance(found, dict):
        return found
    messages = take_turns(found, rounds, device)
    return summarize([message for message in messages if isinstance(message, Turn)])


def run_isolated(
    group: Group, rounds: int, device: torch.device, limit_s: float, method: str = "spawn"
) -> tuple[Rows | dict[str, Any], dict[str, str]]:
    """Run a group in a child process. Returns what was found, and failed cases with a reason.

    What was measured before a failure is kept; without a complete round the group runs again
    without the case that failed. limit_s: of each try, s. method: how the child is started.
    """
    failed: dict[str, str] = {}
    while True:
        messages, error = _run_child(group, rounds, device, list(failed), limit_s, method)
        case = ([m for m in messages if isinstance(m, str)] or ["setup"])[-1]
        facts = [message for message in messages if isinstance(message, dict)]
        rows = summarize([message for message in messages if isinstance(message, Turn)])
        if error:
            failed[case] = error
        if not error or rows or case == "setup":
            return (facts[0] if facts else rows), failed


def _run_child(
    group: Group, rounds: int, device: torch.device, skip: list[str], limit_s: float, method: str
) -> tuple[list[Any], str]:
    """What the child sends until it ends, and why it failed, or ""."""
    messages, context = list[Any](), cast(Any, multiprocessing.get_context(method))
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, group, rounds, device, skip)
    child = context.Process(target=_child, args=arguments)
    child.start()
    sender.close()
    error, deadline = "the time limit was reached", time.monotonic() + limit_s
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            messages.append(receiver.recv())
    except EOFError:
        child.join()
        code = child.exitcode
        error = f"the process ended with exit code {code}; see its stderr" if code else ""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the workers of its loaders
        child.kill()  # if it had not yet its own group
    child.join()
    return messages, error


def _child(
    sender: Connection, group: Group, rounds: int, device: torch.device, skip: list[str]
) -> None:
    os.setsid()
    found = group()
    if isinstance(found, dict):
        sender.send(found)
        return
    for message in take_turns([case for case in found if case.name not in skip], rounds, device):
        sender.send(message)


def table(title: str, rows: Rows) -> str:
    """One line per case: its rate, and its ratio to the first."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{title}, people/s: median (range), ratio to the first line (range), CPU time of one"]
    for row in rows:
        spread = f"{row['median']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})"
        ratio = f"{row['ratio']:.2f} x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        line = f"  {row['name']:<{width}}  {spread:<30} {ratio:<24} {row['cpu_ms']:.2f} ms"
        if "tflops" in row:
            line += f"  {row['share_of_790_tflops']:.2%} of 790 TFLOP/s"
        if "peak_mb" in row:
            line += f"  {row['peak_mb']:,.0f} MB"
        lines.append(line)
    return "\n".join(lines)


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions, stored with the numbers."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {module.__name__: module.__version__ for module in (torch, cv2, np)}
    return versions | {
        "python": platform.python_version(),
        "commit": done.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": usable_cores(),
    }


def cpu_seconds() -> float:
    """CPU time that this process and its children have used; 0 if it is unknown."""
    children = [child.pid for child in multiprocessing.active_children()]
    paths = [Path(f"/proc/{pid}/stat") for pid in (os.getpid(), *children)]
    texts = [path.read_text() for path in paths if path.exists()]
    fields = [text.rsplit(")", 1)[1].split() for text in texts]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")
