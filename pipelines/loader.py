"""The interface of both loaders: LoaderSpec -> Loader -> RawBatch -> Batch on the device.

DALI is imported only if it is used.
"""

import functools
import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.errors import InputError
from configs.schema import LoaderName
from pipelines.augment import jitter, without_augmentation
from pipelines.codec import Codec
from pipelines.crop_packing import require_preset_fits
from pipelines.jpeg import BadSamplesError
from pipelines.opencv_loader import (
    CropDataset,
    JitteredBatch,
    LoaderSpec,
    RawBatch,
    Source,
    batches_in_order,
    endless_batches,
    load_crops,
    shuffled_keys,
)
from pipelines.shard_cache import Key
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet


class Batch(NamedTuple):
    """One training batch on the device. Axes: docs/conventions.md."""

    images_N3HW: torch.Tensor  # float32 RGB in 0..1, channels-last in memory
    heat_NJHW: torch.Tensor  # float32 targets
    joints_NJ2: torch.Tensor  # float32, heatmap px
    has_target_NJ: torch.Tensor  # bool, joints that have a target
    ignored_NJ: torch.Tensor  # bool, joints that the loss leaves out, whatever loss.unmarked says
    rows_N: torch.Tensor  # int64 rows of the annotation


class Loader(Protocol):
    """An endless sequence of RawBatches."""

    def next(self) -> RawBatch:
        """The next batch of this rank."""


class TrainLoader:
    """Augmented batches of one rank, starting at any step.

    The people, their order and their draws are the same with OpenCV and DALI.
    """

    def __init__(self, shards: ShardSet, spec: LoaderSpec, first_step: int = 0):
        """first_step: number of batches to skip. Raises InputError if the preset needs more than
        the shards hold, or the cache is too small for the order."""
        require_preset_fits(shards.manifest, spec.preset, shards.folder)
        if shards.cache:
            tars = spec.shard_window + 1 if spec.shard_window else len(shards.tars)
            why = f"data.shard_window {spec.shard_window} (0: all) says how many tars are mixed"
            shards.cache.require_capacity(tars, why)
        self.shards = shards
        keys_of_epoch = functools.partial(shuffled_keys, shards, spec.seed, spec.shard_window)
        batches = endless_batches(
            keys_of_epoch, spec.batch_size, spec.rank, spec.world_size, first_step
        )
        self._crops = _crops(shards, batches, spec, range(len(shards)))

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError, after which this loader cannot be used."""
        try:
            return next(self._crops)
        except BadSamplesError as error:
            # A damaged replacement is reported under its own number.
            error.faults = {self.shards.origin(s): text for s, text in error.faults.items()}
            raise


def _crops(
    source: Source, batches: Iterable[list[Key]], spec: LoaderSpec, people: Iterable[int]
) -> Iterator[RawBatch]:
    """The batches, cropped by the loader of the spec. people: all that the keys may name."""
    if choose_loader(spec.loader, spec.device) == "dali":
        from pipelines.dali_loader import DaliCrops

        return DaliCrops(source, batches, spec, people)
    dataset = CropDataset(source, spec.preset, spec.input_px, spec.seed, spec.jitter_in_workers)
    pin = spec.device.type == "cuda"
    return load_crops(dataset, batches, spec.workers, pin, spec.worker_kind)


def evaluation_batches(
    source: Source,
    samples: npt.NDArray[np.int64],
    codec: Codec,
    *,
    loader: LoaderName,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Iterable[RawBatch]:
    """Crops of these samples in this order, without augmentation; the last batch may be shorter.

    workers: threads of OpenCV, CPU threads of DALI. Raises InputError if the codec
    needs larger crops than the shards have.
    """
    preset = without_augmentation(codec.preset)
    if isinstance(source, ShardSet):
        require_preset_fits(source.manifest, preset, source.folder)
        if source.cache:
            why = "evaluation reads all tars, in the annotation's order"
            source.cache.require_capacity(len(source.cache.shards), why)
    spec = LoaderSpec(
        loader=loader,
        device=device,
        preset=preset,
        input_px=codec.input_px,
        batch_size=batch_size,
        workers=workers,
    )
    return _crops(source, batches_in_order(samples, batch_size), spec, samples.tolist())


def choose_loader(name: LoaderName, device: torch.device) -> LoaderName:
    """`auto` is DALI on a GPU and OpenCV on a CPU, where it is several times faster."""
    available = dali_is_installed()
    if name == "dali" and not available:
        expected = "the package nvidia-dali-cuda120 (cuda130 for CUDA 13); it exists for Linux only"
        advice = "pip install it, or choose opencv"
        raise InputError("data.loader or --loader: dali", "not installed", expected, advice)
    if name == "auto":
        return "dali" if device.type == "cuda" and available else "opencv"
    return name


def dali_is_installed() -> bool:
    """Whether DALI can be imported; other packages share its parent package."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def make_batch(raw: RawBatch, codec: Codec, device: torch.device) -> Batch:
    """Move a RawBatch to the device, jitter its colours, transform joints, render the heatmaps.

    Does not wait for a GPU.
    """
    draws = raw.draws_ND.to(device, non_blocking=True)
    records = unpack_records(raw.records_NR.to(device, non_blocking=True))
    images = images_on_device(raw, device)
    if codec.preset.color != "none" and not isinstance(raw, JitteredBatch):
        images = jitter(images, draws)
    matrices = raw.input_from_image_N23.to(device, non_blocking=True)
    joints, has_target = codec.heat_joints(records, matrices, draws)
    heat = codec.render(joints, has_target)
    ignored = codec.ignored_joints(records, draws)
    return Batch(images, heat, joints, has_target, ignored, records.row_N.long())


def images_on_device(raw: RawBatch, device: torch.device) -> torch.Tensor:
    """(N, 3, H, W) crops as the network takes them: float32 RGB in 0..1, channels-last."""
    images_N3HW = raw.images_NHW3.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images_N3HW if isinstance(raw, JitteredBatch) else images_N3HW / 255
