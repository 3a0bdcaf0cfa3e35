"""Profiles a few steps of a run: a trace for a browser, and a table of operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

TRACE = "trace.json"
"""In the run's folder, in Chrome's format: open it in ui.perfetto.dev or chrome://tracing."""
WARM_UP_STEPS = 5
"""Steps before the profiled ones; they choose algorithms and compile."""
TABLE_ROWS = 15


@contextmanager
def profiled_steps(
    folder: Path, steps: int, device: torch.device, info: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Profile `steps` steps after the warm-up; yields a function to call after each step.

    steps: 0 disables it. folder: of the run. info: prints the table.
    """
    if not steps:
        yield lambda: None
        return
    written = []
    column = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"

    def write(profiler: profile) -> None:
        written.append(TRACE)
        info(profiler.key_averages().table(sort_by=column, row_limit=TABLE_ROWS))
        try:
            profiler.export_chrome_trace(str(folder / TRACE))
            info(f"wrote {folder / TRACE}")
        except OSError as error:
            info(f"{folder / TRACE} cannot be written: {error}; training continues")

    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"),
        schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
    if not written:
        info(f"no {TRACE}: the run ended within its first {WARM_UP_STEPS} steps")
