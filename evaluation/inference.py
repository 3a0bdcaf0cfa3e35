"""The network on people: flip test, decoding, and back to the pixels of the original picture."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.distributed import DistributedContext, any_rank, sum_over_ranks
from configs.skeleton import Skeleton
from pipelines import geometry, heatmaps, princeton
from pipelines.annotations import People
from pipelines.augment import Draw, draws_array
from pipelines.codec import Codec
from pipelines.geometry import STRIDE
from pipelines.loader import RawBatch, evaluation_batches, images_on_device
from pipelines.opencv_loader import Source
from pipelines.shard_format import unpack_records


class Predictions(NamedTuple):
    """N people's joints."""

    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    scores_NJ: npt.NDArray[np.float64]
    """Height of the heatmap's peak."""


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[RawBatch],
    codec: Codec,
    *,
    flip: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Predictions:
    """Predict everybody in the batches, in their order. model: in eval mode, on the device.

    flip: average with the prediction for the mirrored crop. dtype: of autocast.
    """
    assert not model.training, "batch norm would use the batch's own statistics"
    keypoints, scores = [], []
    for raw in batches:
        images = images_on_device(raw, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heat = last_heatmaps(model, images, codec, flip)
        joints, score = codec.decode(heat)
        records = unpack_records(raw.records_NR.numpy())
        keypoints.append(codec.image_joints(joints, records, raw.input_from_image_N23))
        scores.append(score.double().cpu().numpy())
    return Predictions(np.concatenate(keypoints), np.concatenate(scores))


_SMALL_BATCH, _LARGEST_BATCH = 8, 128
_BATCHES = 16
"""A size is tried if the people make so many batches of it, or trying would be much of the work."""
FEW = _SMALL_BATCH * _BATCHES
"""People for whom small batches do, and nothing is measured."""
_SECONDS_TO_CHOOSE = 4.0
_ROUNDS = 4
_WORTH_DOUBLING = 1.05
"""A larger batch must be faster by this factor, or it only costs memory."""


@torch.no_grad()
def choose_batch_size(
    model: nn.Module,
    codec: Codec,
    people: int,
    *,
    flip: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, dict[int, float]]:
    """The fastest batch size of 1, 2, 4, ..., and the people/s measured for each size tried.

    people: who are to be predicted. On a CPU a small network can be slower in large batches, when
    its tensors leave the cache.
    """
    if people <= FEW:
        return min(people, _SMALL_BATCH), {}
    side = codec.input_px

    def seconds(size: int) -> float:
        images = torch.rand(size, 3, side, side, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heat = last_heatmaps(model, images, codec, flip)
        codec.decode(heat)[0].cpu()
        return time.perf_counter() - start

    return fastest_size(seconds, min(people // _BATCHES, _LARGEST_BATCH))


def fastest_size(seconds: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """The size whose batch takes the fewest seconds a person, and the people/s of each size tried.

    seconds: runs a batch of a size. The least of some rounds counts, each over all sizes, so that a
    slow moment decides nothing. The first round may take half of the time, the others the rest;
    the very first batch, which starts things up, is not timed.
    """
    least: dict[int, float] = {}
    spent, size = 0.0, 1
    with suppress(torch.OutOfMemoryError):
        seconds(1)
        while size <= most and spent + size * _a_person(least) <= _SECONDS_TO_CHOOSE / 2:
            least[size] = seconds(size)
            spent += least[size]
            size *= 2
        for _ in range(_ROUNDS - 1):
            for size in least:
                if spent + least[size] <= _SECONDS_TO_CHOOSE:
                    took = seconds(size)
                    spent, least[size] = spent + took, min(took, least[size])
    rates = {size: size / took for size, took in least.items()}
    worth = max(rates.values(), default=0.0) / _WORTH_DOUBLING
    return min((size for size in rates if rates[size] >= worth), default=1), rates


def _a_person(least: dict[int, float]) -> float:
    """Seconds that one takes in the fastest size so far."""
    return min((took / size for size, took in least.items()), default=0.0)


def last_heatmaps(model: nn.Module, images_N3HW: Tensor, codec: Codec, flip: bool) -> Tensor:
    """(N, J, H, W) float32 heatmaps of the last stack, with or without the flip test."""
    if not flip:
        return model(images_N3HW)[:, -1].float()
    heat = model(torch.cat([images_N3HW, images_N3HW.flip(3)]))[:, -1].float()
    people = images_N3HW.shape[0]
    plain, other = heat[:people], heat[people:]
    mirrored = torch.tensor(codec.skeleton.mirrored, device=plain.device)
    mean = (plain + heatmaps.mirror_back(other, mirrored, codec.rule)) / 2
    return mean.clamp_max(1) if codec.rule == "princeton" else mean


class StoppedError(Exception):
    """A prediction was left between two batches, by all ranks at the same one."""


def predict_distributed(
    network: nn.Module,
    source: Source,
    samples: npt.NDArray[np.int64],
    codec: Codec,
    dist: DistributedContext,
    *,
    loader: Literal["opencv", "dali"] = "opencv",
    batch_size: int,
    workers: int,
    flip: bool,
    progress: Callable[[Iterable[RawBatch]], Iterable[RawBatch]] = iter,
    should_stop: Callable[[], bool] | None = None,
) -> Predictions:
    """Joints of these samples in this order, the same on every rank; each rank predicts its share.

    network: in eval mode, on the device. progress: wraps the batches, to show how far they are.
    should_stop: is asked before each batch; once it is true on some rank, all raise StoppedError.
    """
    mine = samples[dist.rank :: dist.world_size]
    rounds = math.ceil(
        len(samples) / (dist.world_size * batch_size)
    )  # of the first, which has most
    merged = torch.zeros(len(samples), codec.skeleton.joint_count, 3, dtype=torch.float64)
    if len(mine):
        batches = evaluation_batches(
            source, mine, codec, loader=loader, device=dist.device, batch_size=batch_size,
            workers=workers,
        )  # fmt: skip
        if should_stop:
            batches = _until(should_stop, batches, rounds, dist)
        found = predict(
            network, progress(batches), codec, flip=flip, device=dist.device, dtype=dist.dtype
        )
        merged[dist.rank :: dist.world_size, :, :2] = torch.from_numpy(found.keypoints_NJ2)
        merged[dist.rank :: dist.world_size, :, 2] = torch.from_numpy(found.scores_NJ)
    elif should_stop:
        list(_until(should_stop, (), rounds, dist))
    # Every row is zero but on one rank, so that the sum is exact.
    merged = sum_over_ranks(merged.to(dist.device), dist).cpu()
    return Predictions(merged[..., :2].numpy(), merged[..., 2].numpy())


def _until(
    should_stop: Callable[[], bool],
    batches: Iterable[RawBatch],
    rounds: int,
    dist: DistributedContext,
) -> Iterator[RawBatch]:
    """The batches, of which no rank has more than rounds; the ranks meet before each of these."""
    waiting = iter(batches)
    for _ in range(rounds):
        if any_rank(should_stop(), dist):
            raise StoppedError
        yield from itertools.islice(waiting, 1)


_PEOPLE_AT_A_TIME = 256


def oracle_keypoints(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    """(N, J, 2) image px: the annotation rendered as heatmaps and decoded again, without pictures.

    `princeton` crops, truncates and projects back by its own rules; the others by our affine.
    """
    way = _princeton_way if rule == "princeton" else _affine_way
    parts = [
        way(people.select(np.arange(start, min(start + _PEOPLE_AT_A_TIME, people.count))), skeleton,
            rule, input_px)
        for start in range(0, people.count, _PEOPLE_AT_A_TIME)
    ]  # fmt: skip
    return np.concatenate(parts)


def _affine_way(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    to_heat = heatmaps.heat_from_input(rule)
    heat_from_image = np.stack([
        to_heat @ geometry.input_from_image(center, float(scale), input_px)
        for center, scale in zip(people.center, people.scale, strict=True)
    ])  # fmt: skip
    joints = geometry.transform(heat_from_image, people.joints)
    decoded = _there_and_back(torch.from_numpy(joints), people, rule, input_px)
    return geometry.transform(np.linalg.inv(heat_from_image), decoded)


def _princeton_way(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    heat_px = input_px // STRIDE
    joints, _ = princeton.heat_joints(
        torch.from_numpy(people.joints),
        torch.from_numpy(people.center),
        torch.from_numpy(people.scale),
        torch.from_numpy(draws_array([Draw()] * people.count)),
        torch.tensor(skeleton.mirrored),
        input_px,
        heat_px,
    )
    decoded = _there_and_back(joints, people, rule, input_px)
    return princeton.image_joints(decoded, people.center, people.scale, input_px, heat_px)


def _there_and_back(
    joints_NJ2: torch.Tensor, people: People, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    """Rendered with the rule's usual sigma, and decoded."""
    sigma = 2.0 if rule == "hrnet" else 1.0
    marked = torch.from_numpy(people.marked)
    heat = heatmaps.render(joints_NJ2, marked, input_px // STRIDE, rule, sigma)
    return heatmaps.decode(heat, rule)[0].double().numpy()
