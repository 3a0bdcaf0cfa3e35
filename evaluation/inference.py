"""The network on people: flip test, decoding, and back to the pixels of the original picture."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines import augment, heatmaps, opencv_crops, princeton, stored_crops
from pipelines.batches import Target, images_N3HW
from pipelines.geometry import STRIDE
from pipelines.opencv_crops import RawBatch
from pipelines.shards import ShardSet, unpack_records


class Predictions(NamedTuple):
    """N people's joints."""

    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    scores_NJ: npt.NDArray[np.float64]
    """Height of the heatmap's peak."""


def evaluation_batches(
    source: opencv_crops.Source,
    samples: npt.NDArray[np.int64],
    target: Target,
    batch_size: int,
    workers: int,
    pin: bool,
    decoder: Callable[[bytes, str], npt.NDArray[np.uint8]] = opencv_crops.decode,
) -> Iterable[RawBatch]:
    """Crops of these samples in this order, without augmentation, by OpenCV.

    The preset's crop rule stays. Raises InputError if that needs more than the shards hold.
    """
    still = augment.still(target.preset)
    if isinstance(source, ShardSet):
        stored_crops.require(source.manifest, still, source.folder)
    dataset = opencv_crops.CropDataset(source, still, target.input_px, 0, decoder)
    sampler = opencv_crops.ListSampler(samples, batch_size)
    return opencv_crops.CropLoader(dataset, sampler, workers, pin)


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


def last_heatmaps(model: nn.Module, images_N3HW: Tensor, target: Target, flip: bool) -> Tensor:
    """(N, J, H, W) float32 heatmaps of the last stack, with or without the flip test."""
    if not flip:
        return model(images_N3HW)[:, -1].float()
    both = torch.cat([images_N3HW, images_N3HW.flip(3)])
    plain, other = model(both)[:, -1].float().chunk(2)
    mirrored = torch.tensor(target.skeleton.mirrored, device=plain.device)
    mean = (plain + heatmaps.mirror_back(other, mirrored, target.rule)) / 2
    return mean.clamp_max(1) if target.rule == "princeton" else mean


def image_keypoints(joints_NJ2: Tensor, raw: RawBatch, target: Target) -> npt.NDArray[np.float64]:
    """Decoded joints, heatmap px -> image px, through the inverse of what made the crop."""
    records = unpack_records(raw.records_NR.numpy())
    joints = joints_NJ2.double().numpy()
    if target.preset.princeton_crop:
        return princeton.image_points(
            joints,
            records.center_N2.astype(np.float64),
            records.scale_N.astype(np.float64),
            target.input_px,
            target.input_px // STRIDE,
        )
    input_from_image = np.tile(np.eye(3), (len(joints), 1, 1))
    input_from_image[:, :2] = raw.input_from_image_N23.double().numpy()
    heat_from_image = heatmaps.heat_from_input(target.rule) @ input_from_image
    image_from_heat = np.linalg.inv(heat_from_image)
    return joints @ image_from_heat[:, :2, :2].transpose(0, 2, 1) + image_from_heat[:, None, :2, 2]
