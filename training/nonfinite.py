"""What happens to a run whose loss or gradients are not finite.

The step was skipped on the device (training/trainer.py); here, once a line of the log, it is
said, its people are written down, and what it touched is mended.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import DistributedContext, gather_bytes
from common.errors import InputError
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet
from training.metrics import Log, Totals, cut
from training.optimizer import Average

SKIPPED = "skipped_batches.jsonl"


class Guard:
    """Counts skipped steps, and stops the run at the limit."""

    def __init__(self, network: nn.Module, shards: ShardSet, folder: Path, limit: int):
        """shards: of training. folder: of the run. limit: train.max_bad_steps."""
        self.network, self.shards, self.folder, self.limit = network, shards, folder, limit
        self.in_a_row = 0
        self.good = list[Tensor]()
        """The statistics as they were when last all was well."""

    def begin(self, step: int) -> None:
        """Drop what is written of the steps after this one; they come again."""
        cut(self.folder / SKIPPED, step)

    def check(
        self,
        step: int,
        bad: int,
        totals: Totals,
        average: Average | None,
        log: Log,
        dist: DistributedContext,
    ) -> None:
        """Look back on the steps of `totals`, the last of which is `step`; bad: how many failed.

        Every rank must call it. Raises InputError at the limit.
        """
        if not bad:
            self.in_a_row = 0
            self.remember(average)
            return
        longest = self._longest_row(totals)
        log.say(
            f"step {step}: skipped {bad} of the last {totals.steps} steps, "
            "whose loss or gradients were not finite"
        )
        self._write_people(step - totals.steps + 1, totals, log, dist)
        self._mend_statistics(average)
        if longest >= self.limit:
            raise InputError(
                f"{self.folder}: step {step}",
                f"{longest} steps in a row whose loss or gradients are not finite; "
                f"their people are in {self.folder / SKIPPED}",
                "a loss that is a number",
                "lower optim.lr, set optim.clip_norm 1.0 or train.precision fp32, and --resume",
            )

    def remember(self, average: Average | None) -> None:
        """Copy the statistics, to which a batch that spoils them goes back."""
        self.good = [tensor.clone() for tensor in self._statistics(average)]

    def _longest_row(self, totals: Totals) -> int:
        """Of skipped steps, the ones before these included."""
        longest = 0
        for bad in torch.stack(totals.skipped).tolist():
            self.in_a_row = self.in_a_row + 1 if bad else 0
            longest = max(longest, self.in_a_row)
        return longest

    def _write_people(
        self, first_step: int, totals: Totals, log: Log, dist: DistributedContext
    ) -> None:
        """A line for each batch of a skipped step, of all ranks, into skipped_batches.jsonl."""
        mine = [
            {"step": first_step + step, "rank": dist.rank, "loss_is_finite": finite, "rows": rows}
            for step, rows, finite in totals.skipped_batches()
        ]
        parts = gather_bytes(json.dumps(mine).encode(), dist)
        if not dist.is_first:
            return
        batches: list[dict[str, Any]] = [batch for part in parts for batch in json.loads(part)]
        batches.sort(key=lambda batch: batch["step"])
        names = self._names({row for batch in batches for row in batch["rows"]})
        lines = [{**b, "people": [names[row] for row in b["rows"]]} for b in batches]
        try:
            with (self.folder / SKIPPED).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            log.say(f"{self.folder / SKIPPED} cannot be written: {error}")

    def _names(self, rows: set[int]) -> dict[int, str]:
        """Picture and place in the shards of the people with these rows of the annotation."""
        samples = {row: self._sample_of_row[row] for row in rows}
        return {
            row: f"{self.shards.facts(sample)['image']} ({self.shards.where(sample)})"
            for row, sample in samples.items()
        }

    @functools.cached_property
    def _sample_of_row(self) -> dict[int, int]:
        row_N = unpack_records(self.shards.records()).row_N
        return {int(row): sample for sample, row in enumerate(row_N)}

    def _mend_statistics(self, average: Average | None) -> None:
        """Put back batch-norm statistics that a forward pass spoilt, in the average too."""
        statistics = self._statistics(average)
        if not all(torch.isfinite(tensor).all() for tensor in statistics):
            torch._foreach_copy_(statistics, self.good)

    def _statistics(self, average: Average | None) -> list[Tensor]:
        """The running means and variances of the network, and of its average."""
        buffers = {n: b for n, b in self.network.named_buffers() if b.is_floating_point()}
        averages = average.tensors if average else {}
        return [*buffers.values(), *(averages[name] for name in buffers if name in averages)]
