"""What a run tells: the screen, metrics.jsonl, TensorBoard, a tracker, and the sums behind them."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from common.cli import duration
from common.distributed import DistributedContext
from common.files import parse_json, write_atomic
from configs.schema import Config
from model.loss import pck, peak_height
from pipelines import heatmaps
from pipelines.loader import Batch, RawBatch
from training.curves import draw_curves
from training.screen import Screen
from training.tracker import Tracker

METRICS, BOARD = "metrics.jsonl", "tensorboard"
PEOPLE, CURVES = "validation.jpg", "curves.png"
"""Pictures of the last validation."""
TRAINING_PCK_RADIUS = 0.05
"""Radius of the training PCK as a share of the heatmap's side: about half a head in an MPII box."""


class Totals:
    """Sums on the device since the last line of the log."""

    NAMES = ("loss", "last_stack_loss", "peak", "pck")

    def __init__(self, device: torch.device):
        """All sums at zero."""
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.good_batches = torch.zeros((), device=device)
        self.bad_steps = torch.zeros((), device=device)
        self.batches = 0
        self.steps = 0
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.skipped: list[Tensor] = []
        self.waited = 0.0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, losses_S: Tensor, heat_NJHW: Tensor, batch: Batch, rule: heatmaps.Rule) -> None:
        """Take in one batch. heat_NJHW: of the last stack."""
        heat = heat_NJHW.detach().float()
        joints, _ = heatmaps.decode(heat, rule)
        values = [
            losses_S.detach().mean(),
            losses_S.detach()[-1],
            peak_height(heat, batch.drawn_NJ),
            pck(joints, batch.joints_NJ2, batch.drawn_NJ, TRAINING_PCK_RADIUS * heat.shape[-1]),
        ]
        numbers = torch.stack(values)
        good = torch.isfinite(numbers).all()
        self.sums += torch.where(good, numbers, torch.zeros_like(numbers))
        self.good_batches += good
        self.rows.append((batch.rows_N, torch.isfinite(values[0])))
        self.batches += 1

    def losses_were_finite(self, batches: int) -> Tensor:
        """Whether those of the last so many batches were, on this rank."""
        return torch.stack([finite for _, finite in self.rows[-batches:]]).all()

    def add_step(self, bad: Tensor) -> None:
        """Take in whether a step was skipped."""
        self.bad_steps += bad
        self.skipped.append(bad)
        self.steps += 1

    def skipped_batches(self) -> list[tuple[int, list[int], bool]]:
        """Of each batch of a skipped step: the step (from 0), its rows, is its own loss finite?"""
        each = len(self.rows) // max(1, len(self.skipped))
        return [
            (step, rows.tolist(), bool(finite))
            for step, bad in enumerate(self.skipped)
            if bad
            for rows, finite in self.rows[step * each : (step + 1) * each]
        ]


class Log:
    """The log of one process; silent unless it is the first rank."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        dist: DistributedContext,
        first_step: int,
        metric: str = "PCKh",
    ):
        """folder: the run's. first_step: where this start begins. metric: its name, PCKh or PCK."""
        self.enabled = dist.is_first
        if not self.enabled:
            return
        self._folder, self._train, self._device = folder, config.train, dist.device
        self._first_step = self._step = first_step
        self._ranks, self._metric = dist.world_size, metric
        self._writes = True
        cut(folder / METRICS, first_step)
        self._pckh = _last_pckh(folder / METRICS)
        self._started = time.perf_counter()
        self._file = (folder / METRICS).open("a")
        self._board: SummaryWriter | None = SummaryWriter(
            str(folder / BOARD), purge_step=first_step
        )
        self._tracker = Tracker(config, folder)
        self._screen = Screen()
        self._values: dict[str, float] = {}

    def advance(self) -> None:
        """One more step is done."""
        if self.enabled:
            self._step += 1
            if self._screen.is_live:
                self._screen.show(self._parts())

    def train(self, step: int, values: dict[str, float]) -> None:
        """Numbers of the steps since the last call."""
        if not self.enabled:
            return
        self._step = step
        memory, left_s = memory_mb(self._device), self._left()[0]
        self._values = {**values, "memory_mb": memory, "left_s": left_s}
        self._write("train", step, self._values)
        self._screen.show(self._parts())

    def validating(self, batches: Iterable[RawBatch], people: int) -> Iterator[RawBatch]:
        """The same batches; the line counts their people. people: on all ranks together."""
        done = 0
        for batch in batches:
            if self.enabled and (self._screen.is_live or done):
                part = f"validating: {done:,} of {people:,} people"
                self._screen.show([f"step {self._step:,}", part])
            if self.enabled:
                done = min(people, done + len(batch.records_NR) * self._ranks)
            yield batch

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a validation."""
        if self.enabled:
            self._pckh = values["pckh@0.5_pooled"]
            self._write("valid", step, values)
            if self._screen.is_live:
                self._screen.show(self._parts(), at_once=True)

    def pictures(self, step: int, people_HW3: npt.NDArray[np.uint8]) -> None:
        """Keep the sheet of validation people (BGR), and draw the curves up to now."""
        if not self.enabled:
            return
        with self._losses_allowed():
            curves = draw_curves(read_metrics(self._folder / METRICS), self._metric)
            self._keep_pictures(step, {PEOPLE: people_HW3, CURVES: curves})

    def _keep_pictures(self, step: int, images: dict[str, npt.NDArray[np.uint8]]) -> None:
        for name, image in images.items():
            data = _write_picture(self._folder / name, image)
            value = Summary.Value(
                tag=f"pictures/{Path(name).stem}",
                image=Summary.Image(
                    height=image.shape[0],
                    width=image.shape[1],
                    colorspace=3,
                    encoded_image_string=data,
                ),
            )
            self._on_board(
                lambda board: board._get_file_writer().add_summary(Summary(value=[value]), step)  # noqa: B023
            )
            self._tracker.picture(step, f"pictures/{Path(name).stem}", image[..., ::-1])

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.enabled:
            self._screen.say(text)

    def close(self) -> None:
        """Flush and close everything; a second time does nothing."""
        if self.enabled:
            self.enabled = False
            if self._screen.is_live and self._values:
                self._screen.show(self._parts(), at_once=True)
            self._screen.close()
            self._on_board(SummaryWriter.close)
            for each in (self._tracker, self._file):
                with self._losses_allowed():
                    each.close()

    def _parts(self) -> list[str]:
        """Where the run stands, the most important first."""
        train, values = self._train, self._values
        epochs = math.ceil(train.steps / train.steps_per_epoch)
        epoch = max(1, math.ceil(self._step / train.steps_per_epoch))
        pckh = "-" if self._pckh is None else f"{100 * self._pckh:.1f} %"
        seconds, end = self._left()
        parts = [f"step {self._step:,}/{train.steps:,}", f"{duration(seconds)} {end}"]
        if values:
            memory = "GPU peak" if self._device.type == "cuda" else "RSS"
            parts += [
                f"loss {values['loss']:.5f}",
                f"{self._metric} {pckh}",
                f"waiting {100 * values['wait_share']:.0f} %",
                f"{values['people_per_s']:,.0f} people/s",
                f"epoch {epoch}/{epochs}",
                f"{memory} {values['memory_mb']:,.0f} MB",
            ]
        return parts

    def _left(self) -> tuple[float, str]:
        """Seconds to the end, and to which one: the last step at the rate since the start, or the
        time limit if that comes first."""
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
        with self._losses_allowed():
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            # So there is room.
            self._board = self._board or SummaryWriter(str(self._folder / BOARD))
        for name, value in values.items():
            self._on_board(lambda board: board.add_scalar(f"{kind}/{name}", value, step))  # noqa: B023
        with self._losses_allowed():
            self._tracker.log(step, {f"{kind}/{name}": value for name, value in values.items()})

    def _on_board(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard, if it works.

        After a failure its thread is dead: it would write nothing more, and raise the same error at
        each call, whose traceback grows without end. So it is let go, and a new one begins later.
        """
        if self._board is None:
            return
        with self._losses_allowed():
            try:
                write(self._board)
            except OSError:
                self._board = None
                raise

    @contextmanager
    def _losses_allowed(self) -> Iterator[None]:
        """A log that cannot be written, on a full disk, is said once and ends no run."""
        try:
            yield
        except OSError as error:
            if self._writes:
                self.say(f"the log cannot be written: {error}; training goes on")
            self._writes = False


def cut(path: Path, step: int) -> None:
    """Drop the lines after a step: a run resumed from there writes them again."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines() if _entry(line, step)]
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def _entry(line: bytes, last_step: int = sys.maxsize) -> dict[str, Any]:
    """What a line says; nothing if it is of a later step, rotten, or half-written."""
    try:
        entry = parse_json(line)
    except ValueError:
        return {}
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if type(step) is int and 0 <= step <= last_step else {}


def memory_mb(device: torch.device) -> float:
    """The most that torch has held on the GPU, or what this process holds now; in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the most that it ever held, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return pages * resource.getpagesize() / 1e6


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; each has a `step`, and may lack anything else."""
    return [entry for line in path.read_bytes().splitlines() if (entry := _entry(line))]


def _write_picture(path: Path, image_HW3: npt.NDArray[np.uint8]) -> bytes:
    """Write a BGR picture whole or not at all, and return the file's bytes."""
    ok, encoded = cv2.imencode(path.suffix, image_HW3)
    assert ok, path
    write_atomic(path, encoded.tobytes())
    return encoded.tobytes()


def _last_pckh(path: Path) -> float | None:
    """The PCKh@0.5 of the last validation, if there was one."""
    lines = read_metrics(path) if path.exists() else []
    rates = [line.get("pckh@0.5_pooled") for line in lines if line.get("kind") == "valid"]
    return next((rate for rate in reversed(rates) if isinstance(rate, float)), None)
