"""Crops + joints + heatmaps -> Batch. Picks the loader, and imports DALI only if it is the one."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.errors import InputError
from configs.schema import DataConfig, HeatmapsConfig
from configs.skeleton import Skeleton
from pipelines import color, heatmaps, princeton
from pipelines import opencv_loader as opencv_crops
from pipelines.augment import Preset, preset_of, still
from pipelines.constants import on_device
from pipelines.crop_packing import require_preset_fits
from pipelines.geometry import STRIDE
from pipelines.jpeg import BadSamplesError
from pipelines.opencv_loader import RawBatch
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

LoaderName = Literal["auto", "dali", "opencv"]


class Batch(NamedTuple):
    """One training batch on the device. Axes: docs/conventions.md."""

    images_N3HW: torch.Tensor
    """float32 RGB in 0..1, channels-last in memory."""
    heat_NJHW: torch.Tensor
    """float32 targets; empty (N, J, 0, 0) where the loss renders them."""
    joints_NJ2: torch.Tensor
    """float32, heatmap px."""
    drawn_NJ: torch.Tensor
    """bool, joints that have a target."""
    rows_N: torch.Tensor
    """int64 rows of the annotation."""


class Target(NamedTuple):
    """How joints become targets: everything that `finish` needs beside the crops."""

    preset: Preset
    rule: heatmaps.Rule
    sigma: float
    """Heatmap px."""
    input_px: int
    skeleton: Skeleton


def target_of(data: DataConfig, heat: HeatmapsConfig, skeleton: Skeleton) -> Target:
    """The Target that a config describes."""
    preset = preset_of(data.preset, data.mirror)
    return Target(preset, heat.rule, heat.sigma, data.input_px, skeleton)


class Loader(Protocol):
    """Endless RawBatches whose place in the sequence can be kept."""

    def next(self) -> RawBatch: ...

    def state(self) -> bytes:
        """What continues this sequence; empty where the step alone does."""


def finish(raw: RawBatch, target: Target, device: torch.device, *, renders: bool = True) -> Batch:
    """Move a RawBatch to the device, jitter its colours, transform joints, render the heatmaps.

    On a GPU the host waits for nothing here. renders: False leaves the heatmaps to the loss.
    """
    draws = raw.draws_ND.to(device, non_blocking=True)
    records = unpack_records(raw.records_NR.to(device, non_blocking=True))
    images = images_N3HW(raw, device)
    if target.preset.color != "none":
        images = color.jitter(images, draws)
    heat_px = target.input_px // STRIDE
    mirrored = on_device(target.skeleton.mirrored, torch.int64, device)
    if target.preset.princeton_crop and target.rule == "princeton":
        joints, drawn = princeton.heat_joints(
            records.joints_NJ2, records.center_N2, records.scale_N, draws, mirrored,
            target.input_px, heat_px,
        )  # fmt: skip
    else:
        matrices = raw.input_from_image_N23.to(device, non_blocking=True)
        joints, drawn = heat_joints(
            records.joints_NJ2, records.marked_NJ, matrices, draws[:, 2] > 0, mirrored, target.rule
        )
    if renders:
        heat = heatmaps.render(joints, drawn, heat_px, target.rule, target.sigma)
    else:
        heat = joints.new_empty((*drawn.shape, 0, 0))
    return Batch(images, heat, joints, drawn, records.row_N.long())


def images_N3HW(raw: RawBatch, device: torch.device) -> torch.Tensor:
    """Crops as the network takes them: float32 RGB in 0..1, a channels-last view without a copy."""
    return raw.images_NHW3.to(device, non_blocking=True).permute(0, 3, 1, 2) / 255


def heat_joints(
    joints_NJ2: torch.Tensor,
    marked_NJ: torch.Tensor,
    input_from_image_N23: torch.Tensor,
    flip_N: torch.Tensor,
    mirrored: torch.Tensor,
    rule: heatmaps.Rule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joints image px -> heatmap px (N, J, 2), through the matrix of the pixels; and marked (N, J).

    Where flip_N, left and right joints change places, and their marks with them.
    """
    linear, shift = input_from_image_N23[..., :2], input_from_image_N23[..., 2]
    in_input = joints_NJ2.to(linear) @ linear.transpose(1, 2) + shift[:, None]
    to_heat = heatmaps.heat_from_input(rule)
    heat = in_input * float(to_heat[0, 0]) + float(to_heat[0, 2])  # the same in x and y
    heat = torch.where(flip_N[:, None, None], heat[:, mirrored], heat)
    marked = torch.where(flip_N[:, None], marked_NJ[:, mirrored], marked_NJ)
    return heat, marked


class OpenCVLoader:
    """The OpenCV path as a Loader; the step says where it stands."""

    def __init__(
        self,
        shards: ShardSet,
        preset: Preset,
        *,
        input_px: int,
        batch_size: int,
        workers: int,
        pin: bool,
        seed: int,
        rank: int,
        ranks: int,
        first_step: int,
    ):
        """workers: processes. pin: page-locked batches for a GPU. first_step: batches to skip."""
        self.shards = shards
        dataset = opencv_crops.CropDataset(shards, preset, input_px, seed)
        sampler = opencv_crops.EndlessSampler(
            len(shards), batch_size, seed, rank, ranks, first_step
        )
        self._batches: Iterator[RawBatch] = iter(
            opencv_crops.CropLoader(dataset, sampler, workers, pin)
        )

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError; then this loader has come to its end."""
        try:
            return next(self._batches)
        except BadSamplesError as error:
            # A stand-in that is damaged itself goes by its own number.
            error.faults = {self.shards.origin(s): text for s, text in error.faults.items()}
            error.advise_to_skip()
            raise

    def state(self) -> bytes:
        """Empty: the step is enough."""
        return b""


def still_batches(
    source: opencv_crops.Source,
    samples: npt.NDArray[np.int64],
    target: Target,
    *,
    loader: Literal["opencv", "dali"],
    device: torch.device,
    batch_size: int,
    workers: int,
    decoder: Callable[[bytes, str], npt.NDArray[np.uint8]] = opencv_crops.decode,
) -> Iterable[RawBatch]:
    """Crops of these samples in this order, without augmentation; the last batch may be shorter.

    The preset's crop rule stays. Raises InputError if that needs more than the shards hold.
    workers: worker processes of OpenCV, threads of DALI. decoder: of OpenCV's path.
    """
    preset = still(target.preset)
    if isinstance(source, ShardSet):
        require_preset_fits(source.manifest, preset, source.folder)
    if loader == "opencv":
        dataset = opencv_crops.CropDataset(source, preset, target.input_px, 0, decoder)
        sampler = opencv_crops.ListSampler(samples, batch_size)
        return opencv_crops.CropLoader(dataset, sampler, workers, device.type == "cuda")
    choose_loader(loader, device)  # says how to install DALI where it is not
    from pipelines.dali_loader import DaliStills

    return DaliStills(
        source, samples, preset, input_px=target.input_px, batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu", device_id=device.index or 0,
        threads=max(workers, 1),
    )  # fmt: skip


def choose_loader(name: LoaderName, device: torch.device) -> Literal["dali", "opencv"]:
    """`auto` is DALI on a GPU and OpenCV on a CPU, where it is several times faster."""
    available = dali_is_installed()
    if name == "dali" and not available:
        raise InputError(
            "data.loader or --loader: dali",
            "NVIDIA DALI is not installed (it exists for Linux alone)",
            "the package nvidia-dali-cuda120, or nvidia-dali-cuda130 for CUDA 13",
            "pip install nvidia-dali-cuda120, or take opencv",
        )
    if name == "auto":
        return "dali" if device.type == "cuda" and available else "opencv"
    return name


def dali_is_installed() -> bool:
    """Whether DALI can be imported; other packages share its parent package."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def train_loader(
    shards: ShardSet,
    preset: Preset,
    *,
    loader: LoaderName,
    device: torch.device,
    input_px: int,
    batch_size: int,
    workers: int,
    shuffle_buffer: int,
    seed: int,
    rank: int,
    ranks: int,
    first_step: int,
    state: bytes,
    cache_mb: int = 0,
) -> Loader:
    """The chosen loader of augmented crops, standing at first_step (OpenCV) or at `state` (DALI).

    workers: worker processes of OpenCV, threads of DALI. cache_mb: of DALI's decoder on a GPU.
    Raises InputError if the preset needs more than the shards hold, or the cache has no place.
    """
    require_preset_fits(shards.manifest, preset, shards.folder)
    if choose_loader(loader, device) == "opencv":
        if cache_mb:
            raise InputError(
                "data.cache_mb", f"{cache_mb}, and the OpenCV loader", "0: the cache is DALI's",
                "set data.cache_mb to 0",
            )  # fmt: skip
        return OpenCVLoader(
            shards, preset, input_px=input_px, batch_size=batch_size, workers=workers,
            pin=device.type == "cuda", seed=seed, rank=rank, ranks=ranks, first_step=first_step,
        )  # fmt: skip
    from pipelines.dali_loader import DaliCrops

    return DaliCrops(
        shards, preset, input_px=input_px, batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu", device_id=device.index or 0,
        threads=max(workers, 1), seed=seed, rank=rank, ranks=ranks,
        shuffle_buffer=shuffle_buffer, state=state or None, cache_mb=cache_mb,
    )  # fmt: skip
