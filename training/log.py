"""What a run tells: one live line, metrics.jsonl and TensorBoard, and the sums behind them."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.loss import pck, peak_height
from pipelines import heatmaps
from pipelines.batches import Batch

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

    def __init__(self, folder: Path, enabled: bool, steps: int, first_step: int):
        """folder: the run's. steps: length of the run. first_step: where this start begins."""
        self.enabled = enabled
        if not enabled:
            return
        self._writes = True
        cut(folder / "metrics.jsonl", first_step)
        self._file = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            file=sys.stderr,
        )

    def advance(self) -> None:
        """One more step is done."""
        if self.enabled:
            self._bar.update()

    def train(self, step: int, values: dict[str, float]) -> None:
        """Numbers of the steps since the last call."""
        if not self.enabled:
            return
        self._write("train", step, values)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.5f}, {values['people_per_s']:.0f} people/s, "
            f"waiting for data {100 * values['wait_share']:.0f} %",
            refresh=False,
        )

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a validation."""
        if self.enabled:
            self._write("valid", step, values)

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        if self.enabled:
            self._bar.close()
            for file in (self._board, self._file):
                with self._losses_allowed():
                    file.close()

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        entry: dict[str, Any] = {
            "kind": kind,
            "step": step,
            "time": round(time.time(), 3),
            **values,
        }
        with self._losses_allowed():
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        with self._losses_allowed():
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

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
    kept = [line for line in path.read_text().splitlines() if _is_up_to(line, step)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # a line that a killed run did not end
        return False
