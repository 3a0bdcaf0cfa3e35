"""The log of a run: sums over steps, metrics.jsonl, TensorBoard, a tracker, learning curves."""

import json
import math
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.cli import SECONDS_BETWEEN_LINES
from common.distributed import DistributedContext
from common.files import write_atomic
from common.system import optional_module
from configs.schema import Config, as_dict
from model.loss import pck, peak_height
from pipelines.codec import Codec
from pipelines.loader import Batch

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
PEOPLE, CURVES = "validation.jpg", "curves.png"
"""Pictures of the last validation."""
TRAINING_PCK_RADIUS = 0.05
"""Radius of the training PCK as a share of the heatmap's side: about half a head in an MPII box."""

SECONDS_BETWEEN_UPDATES = 0.2
"""Minimum time between updates of the live line on a terminal."""


class Totals:
    """Sums on the device since the last line of the log."""

    NAMES = ("loss", "last_stack_loss", "peak", "pck")

    def __init__(self, device: torch.device):
        """All sums at zero."""
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.good_batches = torch.zeros((), device=device)
        self.rows: list[Tensor] = []
        """Annotation rows of each batch."""
        self.finite: list[Tensor] = []
        """Whether the loss of each batch was finite."""
        self.skipped: list[Tensor] = []
        """Whether each step was skipped."""
        self._waits: list[tuple[Any, Any]] = []
        """Begin and end of each."""
        self.started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in this context; on a GPU, only that in which no earlier step runs."""
        before = self._now()
        yield
        self._waits.append((before, self._now()))

    def _now(self) -> Any:
        if self.sums.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_waited(self) -> float:
        """Sum of what `waiting` counted. On a GPU, its work must have ended."""
        if self.sums.device.type == "cuda":
            return sum(before.elapsed_time(after) for before, after in self._waits) / 1000
        return sum(after - before for before, after in self._waits)

    @torch.no_grad()
    def add(self, losses_S: Tensor, heat_NJHW: Tensor, batch: Batch, codec: Codec) -> None:
        """Add one batch. heat_NJHW: of the last stack."""
        heat = heat_NJHW.detach().float()
        joints, _ = codec.decode(heat)
        radius = TRAINING_PCK_RADIUS * heat.shape[-1]
        values = [
            losses_S.detach().mean(),
            losses_S.detach()[-1],
            peak_height(heat, batch.has_target_NJ),
            pck(joints, batch.joints_NJ2, batch.has_target_NJ, radius),
        ]
        numbers = torch.stack(values)
        good = torch.isfinite(numbers).all()
        self.sums += torch.where(good, numbers, torch.zeros_like(numbers))
        self.good_batches += good
        self.rows.append(batch.rows_N)
        self.finite.append(torch.isfinite(values[0]))

    def merge(self, other: "Totals") -> None:
        """Add copies of the results of `other`."""
        self.sums += other.sums
        self.good_batches += other.good_batches
        for name in ("rows", "finite", "skipped"):
            getattr(self, name).extend(tensor.clone() for tensor in getattr(other, name))

    def skipped_batches(self) -> list[tuple[int, list[int], bool]]:
        """For each batch of a skipped step: step (from 0), rows, whether its loss is finite."""
        accumulate = len(self.rows) // max(1, len(self.skipped))
        return [
            (batch // accumulate, rows.tolist(), bool(finite))
            for batch, (rows, finite) in enumerate(zip(self.rows, self.finite, strict=True))
            if self.skipped[batch // accumulate]
        ]


class TimeShares:
    """Measures which shares of the time since its creation validation and saving take."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._seconds = {"validation_share": 0.0, "save_share": 0.0}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent in this context to the part `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """The share of each part, by its name in metrics.jsonl."""
        total = time.perf_counter() - self.started
        return {name: seconds / total for name, seconds in self._seconds.items()}


class MetricsLogger:
    """Writes the log on rank 0; on other ranks it does nothing."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        dist: DistributedContext,
        first_step: int,
        metric: str,
    ):
        """folder: of the run. first_step: where this start begins. metric: PCKh or PCK."""
        self.enabled = dist.is_first
        if not self.enabled:
            return
        self._folder, self._train, self._device = folder, config.train, dist.device
        self._first_step = self._step = first_step
        self._metric, self._write_error_shown = metric, False
        keep_lines_until(folder / METRICS, first_step)
        validations = [x for x in read_metrics(folder / METRICS) if x["kind"] == "valid"]
        self._pckh = validations[-1]["pckh@0.5_pooled"] if validations else None
        self._started = time.perf_counter()
        self._file = (folder / METRICS).open("a")
        self._board: SummaryWriter | None = SummaryWriter(
            folder / TENSORBOARD, purge_step=first_step
        )
        self._tracker = open_tracker(config, folder)
        self._console = Console()
        self._values: dict[str, float] = {}

    def advance(self) -> None:
        """Count a step."""
        if self.enabled:
            self._step += 1
            if self._console.is_live:
                self._console.show(self._parts())

    def log_training(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of the steps since the last call."""
        if self.enabled:
            self._step = step
            memory, left_s = memory_mb(self._device), self._time_left()[0]
            self._values = {**values, "memory_mb": memory, "left_s": left_s}
            self._write("train", step, self._values)
            self._console.show(self._parts())

    def show_validation(self, done: int, people: int) -> None:
        """Show how many people a validation has predicted, on all ranks together."""
        if self.enabled and done:
            part = f"validating: {done:,} of {people:,} people"
            self._console.show([f"step {self._step:,}", part])

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of a validation."""
        if self.enabled:
            self._pckh = values["pckh@0.5_pooled"]
            self._write("valid", step, values)
            self._values |= {"validation_share": values["validation_share"]}
            if self._console.is_live:
                self._console.show(self._parts(), at_once=True)

    def log_pictures(self, step: int, people_HW3: npt.NDArray[np.uint8]) -> None:
        """Keep the contact sheet of a validation (RGB), and draw the learning curves."""
        if not self.enabled:
            return
        with self._disk_may_fail():
            curves = draw_curves(read_metrics(self._folder / METRICS), self._metric)
            for name, image in {PEOPLE: people_HW3, CURVES: curves}.items():
                tag, path = f"pictures/{Path(name).stem}", self._folder / name
                _, encoded = cv2.imencode(path.suffix, image[..., ::-1])
                write_atomic(path, encoded.tobytes())
                if self._board:
                    self._board.add_image(tag, image, step, dataformats="HWC")
                if self._tracker:
                    self._tracker.log({tag: self._tracker.Image(image)}, step=step)

    def info(self, text: str) -> None:
        """Print a line on the console."""
        if self.enabled:
            self._console.info(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self.enabled:
            if self._console.is_live and self._values:
                self._console.show(self._parts(), at_once=True)
            self._console.close()
            with self._disk_may_fail():
                self._file.close()
                if self._board:
                    self._board.close()
            if self._tracker:
                self._tracker.finish()

    def _parts(self) -> list[str]:
        """The progress, the most important first."""
        train, values = self._train, self._values
        epochs = math.ceil(train.steps / train.steps_per_epoch)
        epoch = max(1, math.ceil(self._step / train.steps_per_epoch))
        pckh = "-" if self._pckh is None else f"{100 * self._pckh:.1f} %"
        seconds, end = self._time_left()
        parts = [f"step {self._step:,}/{train.steps:,}", f"{tqdm.format_interval(seconds)} {end}"]
        if "loss" not in values:
            return parts
        memory = "GPU peak" if self._device.type == "cuda" else "RSS peak"
        return [
            *parts,
            f"loss {values['loss']:.5f}",
            f"{self._metric} {pckh}",
            f"waiting {100 * values['wait_share']:.0f} %",
            f"{values['people_per_s']:,.0f} people/s",
            f"epoch {epoch}/{epochs}",
            f"validating {100 * values['validation_share']:.0f} %",
            f"saving {100 * values['save_share']:.1f} %",
            f"{memory} {values['memory_mb']:,.0f} MB",
        ]

    def _time_left(self) -> tuple[float, str]:
        """Seconds left and a label: to the last step at the average rate, or to the time limit."""
        spent = time.perf_counter() - self._started
        done = max(self._step - self._first_step, 1)
        left = spent / done * (self._train.steps - self._step)
        limit = 60 * self._train.max_minutes
        if limit and limit - spent < left:
            return max(0.0, limit - spent), "to its limit"
        return left, "left"

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        entry: dict[str, Any] = {
            "kind": kind,
            "step": step,
            "time": round(time.time(), 3),
            **{name: None if math.isnan(value) else value for name, value in values.items()},
        }
        named = {f"{kind}/{name}": value for name, value in values.items()}
        with self._disk_may_fail():
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            for name, value in named.items():
                if self._board:
                    self._board.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.log(named, step=step)

    @contextmanager
    def _disk_may_fail(self) -> Iterator[None]:
        """Report once that the log cannot be written, and continue the run.

        TensorBoard's writer does not recover from a failure, so it is dropped then.
        """
        try:
            yield
        except OSError as error:
            self._board = None
            if not self._write_error_shown:
                self._console.info(f"the log cannot be written: {error}; training continues")
            self._write_error_shown = True


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
        room = shutil.get_terminal_size().columns - 3  # an echoed ^C must not wrap the line
        while len("  ".join(parts)) > room and len(parts) > 1:
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


def open_tracker(config: Config, folder: Path) -> Any:
    """The module wandb or trackio, after starting or resuming the run in it; None without tracker.

    Both have the same functions.
    """
    name = config.train.tracker
    if name == "none":
        return None
    tracker = optional_module(name, "train.tracker")
    more = {}
    if name == "wandb":  # identifies a run by its id, trackio by its name
        path = folder / "tracker_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        more = {"id": path.read_text(), "dir": str(folder)}
    project, settings = "stacked-hourglass", as_dict(config)
    tracker.init(project=project, name=config.train.name, config=settings, resume="allow", **more)
    return tracker


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run repeats."""
    if path.exists():
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def logged_pck(folder: Path, step: int) -> float | None:
    """The pooled PCK@0.5 of a run's validation at a step; None if there was none."""
    lines = read_metrics(folder / METRICS)
    found = [x["pckh@0.5_pooled"] for x in lines if (x["kind"], x["step"]) == ("valid", step)]
    return found[-1] if found else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without those that a kill or a full disk cut short."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def memory_mb(device: torch.device) -> float:
    """The peak of torch's GPU memory, or of the resident memory; in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def draw_curves(entries: list[dict[str, Any]], metric: str) -> npt.NDArray[np.uint8]:
    """(380, 1240, 3) RGB: the loss, on a logarithmic axis, and PCK in per cent, over the steps.

    entries: lines of metrics.jsonl. metric: name of the validation's, PCKh or PCK.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 3.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, pck_axes = figure.subplots(1, 2)
    for axes, kind, key, factor, label in (
        (loss_axes, "train", "loss", 1, "loss of training"),
        (pck_axes, "valid", "pckh@0.5_pooled", 100, f"{metric}@0.5 of validation"),
        (pck_axes, "valid", "pckh@0.1_pooled", 100, f"{metric}@0.1 of validation"),
        (pck_axes, "train", "pck", 100, "PCK of training (augmented)"),
    ):
        lines = [x for x in entries if x["kind"] == kind and x.get(key) is not None]
        values = [factor * line[key] for line in lines]
        last = f" {values[-1]:.3g}" if values else ""
        axes.plot(
            [line["step"] for line in lines],
            values,
            label=label + last,
            marker="." if len(values) <= 25 else "",
        )
    loss_axes.set(yscale="log", ylabel="loss")
    pck_axes.set(ylim=(0, None), ylabel="%")
    for axes in (loss_axes, pck_axes):
        axes.set(xlabel="step", xlim=(0, max([entry["step"] for entry in entries], default=1)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
