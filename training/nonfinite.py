"""Steps whose loss or gradients are not finite.

The step itself was skipped on the device (training/train_step.py). Here, at each log step, skipped
steps are reported, their people are logged, and batch-norm statistics are restored.
"""

import json
from pathlib import Path
from typing import Any

import torch

from common.distributed import DistributedContext, gather
from common.errors import InputError
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet
from training.metrics import MetricsLogger, Totals
from training.train_step import TrainStep

SKIPPED = "skipped_batches.jsonl"


class NonFiniteMonitor:
    """Counts skipped steps, and stops the run at the limit."""

    def __init__(self, train_step: TrainStep, shards: ShardSet, folder: Path, limit: int):
        """shards: of training. folder: of the run. limit: train.max_bad_steps."""
        self.shards, self.folder, self.limit = shards, folder, limit
        self.in_a_row = 0
        averaged = [train_step.averaged.module] if train_step.averaged else []
        networks = [train_step.network, *averaged]
        self._statistics = [
            buffer for each in networks for buffer in each.buffers() if buffer.is_floating_point()
        ]
        self._good = [tensor.clone() for tensor in self._statistics]
        """Copies from the last log step without a skipped step."""

    def check(
        self, step: int, totals: Totals, log: MetricsLogger, dist: DistributedContext
    ) -> None:
        """Handle the skipped steps in `totals`, whose last step is `step`.

        Ranks skip the same steps, and every one must call it. Raises InputError at the limit.
        """
        skipped, longest = torch.stack(totals.skipped).tolist(), 0
        for bad in skipped:
            self.in_a_row = self.in_a_row + 1 if bad else 0
            longest = max(longest, self.in_a_row)
        if not any(skipped):
            self._good = [tensor.clone() for tensor in self._statistics]
            return
        log.info(
            f"step {step}: skipped {sum(skipped)} of the last {len(skipped)} steps, "
            "whose loss or gradients were not finite; if this continues, lower optim.lr or set "
            "optim.clip_norm 1"
        )
        self._write_people(step - len(skipped) + 1, totals, log, dist)
        if not all(torch.isfinite(tensor).all() for tensor in self._statistics):
            torch._foreach_copy_(self._statistics, self._good)
        if longest >= self.limit:
            found = f"{longest} steps in a row whose loss or gradients are not finite"
            expected = f"finite ones; {SKIPPED} lists their people"
            advice = "lower optim.lr, set optim.clip_norm 1.0 or train.precision fp32, and --resume"
            raise InputError(f"{self.folder}: step {step}", found, expected, advice)

    def _write_people(
        self, first_step: int, totals: Totals, log: MetricsLogger, dist: DistributedContext
    ) -> None:
        """A line in skipped_batches.jsonl for each batch of a skipped step, of all ranks."""
        own: list[dict[str, Any]] = [
            {"step": first_step + step, "rank": dist.rank, "loss_is_finite": finite, "rows": rows}
            for step, rows, finite in totals.skipped_batches()
        ]
        parts = gather(own, dist)
        if not dist.is_first:
            return
        batches = [batch for part in parts for batch in part]
        row_N = unpack_records(self.shards.records()).row_N
        sample_of_row = {int(row): sample for sample, row in enumerate(row_N)}
        for batch in batches:
            samples = [sample_of_row[row] for row in batch["rows"]]
            batch["people"] = [
                f"{self.shards.image_name(sample)} ({self.shards.where(sample)})"
                for sample in samples
            ]
        batches.sort(key=lambda batch: batch["step"])
        try:
            with (self.folder / SKIPPED).open("a") as file:
                file.writelines(json.dumps(batch) + "\n" for batch in batches)
        except OSError as error:
            log.info(f"{self.folder / SKIPPED} cannot be written: {error}")
