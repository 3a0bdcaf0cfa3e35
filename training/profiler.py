"""Where a few steps of a run spend their time: a trace for a browser, and a table of operators."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

TRACE = "trace.json"
"""In the run's folder, in Chrome's format: open it in ui.perfetto.dev or chrome://tracing."""
WARM_UP_STEPS = 5
"""Before the traced ones: they choose algorithms and compile."""
_ROWS = 15


class Tracer:
    """Traces so many steps after the first few, writes the file and says what took longest."""

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]):
        """steps: traced; 0 does nothing. folder: of the run. say: shows the table."""
        self.folder, self.say = folder, say
        self.column = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
        self.written = False
        self.profiler: profile | None = None
        if steps:
            gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *gpu],
                schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Self:
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.profiler:
            self.profiler.stop()
            if not self.written:
                self.say(f"no {TRACE}: the run ended within its first {WARM_UP_STEPS} steps")

    def advance(self) -> None:
        """One more step is done."""
        if self.profiler:
            self.profiler.step()

    def _write(self, done: profile) -> None:
        path = self.folder / TRACE
        temporary = path.with_name("writing_" + TRACE)
        self.written = True
        self.say(done.key_averages().table(sort_by=self.column, row_limit=_ROWS))
        try:
            done.export_chrome_trace(str(temporary))
            temporary.rename(path)
            self.say(f"wrote {path}")
        except OSError as error:
            self.say(f"{path} cannot be written: {error}; training goes on")
