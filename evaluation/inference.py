"""The network on people: flip test, decoding, and back to the pixels of the original picture."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines import heatmaps, princeton
from pipelines.batches import Target, images_N3HW
from pipelines.geometry import STRIDE
from pipelines.opencv_crops import RawBatch
from pipelines.records import unpack_records


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
    target: Target,
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
        images = images_N3HW(raw, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heat = last_heatmaps(model, images, target, flip)
        joints, score = heatmaps.decode(heat, target.rule)
        keypoints.append(image_keypoints(joints.cpu(), raw, target))
        scores.append(score.double().cpu().numpy())
    return Predictions(np.concatenate(keypoints), np.concatenate(scores))


_LARGEST_BATCH = 128
_SECONDS_TO_CHOOSE = 4.0
_WORTH_DOUBLING = 1.05
"""A batch of twice the size must be faster by this factor, or it only costs memory."""


@torch.no_grad()
def choose_batch_size(
    model: nn.Module, target: Target, *, flip: bool, device: torch.device, dtype: torch.dtype
) -> tuple[int, dict[int, float]]:
    """The fastest batch size of 1, 2, 4, ..., and the people/s measured for each size tried.

    On a CPU a small network can be slower in large batches, when its tensors leave the cache. The
    search stops after two sizes in a row that were no faster, or after some seconds.
    """
    rates: dict[int, float] = {}
    began, size, best = time.perf_counter(), 1, 1
    while size <= min(_LARGEST_BATCH, 4 * best) and (
        time.perf_counter() - began < _SECONDS_TO_CHOOSE or not rates
    ):
        try:
            rates[size] = _people_per_second(model, size, target, flip, device, dtype)
        except torch.OutOfMemoryError:
            break
        if rates[size] > _WORTH_DOUBLING * rates[best]:
            best = size
        size *= 2
    return best, rates


def _people_per_second(
    model: nn.Module,
    size: int,
    target: Target,
    flip: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    shape = (size, 3, target.input_px, target.input_px)
    images = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heat = last_heatmaps(model, images, target, flip)
        heatmaps.decode(heat, target.rule)[0].cpu()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds[1:])


def last_heatmaps(model: nn.Module, images_N3HW: Tensor, target: Target, flip: bool) -> Tensor:
    """(N, J, H, W) float32 heatmaps of the last stack, with or without the flip test."""
    if not flip:
        return model(images_N3HW)[:, -1].float()
    heat = model(torch.cat([images_N3HW, images_N3HW.flip(3)]))[:, -1].float()
    people = images_N3HW.shape[0]
    plain, other = heat[:people], heat[people:]
    mirrored = torch.tensor(target.skeleton.mirrored, device=plain.device)
    mean = (plain + heatmaps.mirror_back(other, mirrored, target.rule)) / 2
    return mean.clamp_max(1) if target.rule == "princeton" else mean


def image_keypoints(joints_NJ2: Tensor, raw: RawBatch, target: Target) -> npt.NDArray[np.float64]:
    """Decoded joints, heatmap px -> image px, through the inverse of what made the crop."""
    records = unpack_records(raw.records_NR.numpy())
    joints = joints_NJ2.double().numpy()
    if target.preset.princeton_crop and target.rule == "princeton":
        return princeton.image_points(
            joints,
            records.center_N2.astype(np.float64),
            records.scale_N.astype(np.float64),
            target.input_px,
            target.input_px // STRIDE,
        )
    input_from_image = np.tile(np.eye(3), (len(joints), 1, 1))
    input_from_image[:, :2] = raw.input_from_image_N23.double().cpu().numpy()
    heat_from_image = heatmaps.heat_from_input(target.rule) @ input_from_image
    image_from_heat = np.linalg.inv(heat_from_image)
    return joints @ image_from_heat[:, :2, :2].transpose(0, 2, 1) + image_from_heat[:, None, :2, 2]
