"""Everybody of a split predicted by all ranks together."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common import distributed as runtime
from common.distributed import Runtime
from evaluation.inference import Predictions, predict
from pipelines.loader import Target, still_batches
from pipelines.opencv_loader import RawBatch, Source


class StoppedError(Exception):
    """A prediction was left between two batches, by all ranks at the same one."""


def predict_together(
    network: nn.Module,
    source: Source,
    samples: npt.NDArray[np.int64],
    target: Target,
    place: Runtime,
    *,
    loader: Literal["opencv", "dali"] = "opencv",
    batch_size: int,
    workers: int,
    flip: bool,
    progress: Callable[[Iterable[RawBatch]], Iterable[RawBatch]] = iter,
    stop: Callable[[], bool] | None = None,
) -> Predictions:
    """Joints of these samples in this order, the same on every rank; each rank predicts its share.

    network: in eval mode, on the device. progress: wraps the batches, to show how far they are.
    stop: is asked before each batch; once it is true on some rank, all raise StoppedError.
    """
    mine = samples[place.rank :: place.ranks]
    rounds = math.ceil(len(samples) / (place.ranks * batch_size))  # of the first, which has most
    merged = torch.zeros(len(samples), target.skeleton.joint_count, 3, dtype=torch.float64)
    if len(mine):
        batches = still_batches(
            source, mine, target, loader=loader, device=place.device, batch_size=batch_size,
            workers=workers,
        )  # fmt: skip
        if stop:
            batches = _until(stop, batches, rounds, place)
        found = predict(
            network, progress(batches), target, flip=flip, device=place.device, dtype=place.dtype
        )
        merged[place.rank :: place.ranks, :, :2] = torch.from_numpy(found.keypoints_NJ2)
        merged[place.rank :: place.ranks, :, 2] = torch.from_numpy(found.scores_NJ)
    elif stop:
        list(_until(stop, (), rounds, place))
    # Every row is zero but on one rank, so that the sum is exact.
    merged = runtime.sum_over_ranks(merged.to(place.device), place).cpu()
    return Predictions(merged[..., :2].numpy(), merged[..., 2].numpy())


def _until(
    stop: Callable[[], bool], batches: Iterable[RawBatch], rounds: int, place: Runtime
) -> Iterator[RawBatch]:
    """The batches, of which no rank has more than rounds; the ranks meet before each of these."""
    waiting = iter(batches)
    for _ in range(rounds):
        if runtime.any_rank(stop(), place):
            raise StoppedError
        yield from itertools.islice(waiting, 1)
