"""A network's predictions for people: flip test, decoding, and joints in the original picture."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.distributed import DistributedContext, sum_over_ranks
from configs.schema import LoaderName, RuleName
from configs.skeleton import Skeleton
from pipelines import heatmaps
from pipelines.annotations import People
from pipelines.augment import Draw, preset_of
from pipelines.codec import Codec
from pipelines.loader import RawBatch, evaluation_batches, images_on_device
from pipelines.opencv_loader import Source, crop_affines
from pipelines.shard_format import record_of, unpack_records


class Predictions(NamedTuple):
    """Joints of N people."""

    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    scores_NJ: npt.NDArray[np.float64]
    """Heights of the heatmaps' peaks."""


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
    """Predict all people of the batches, in their order. model: in eval mode, on the device.

    flip: average with the prediction for the mirrored crop. dtype: of autocast.
    """
    assert not model.training, "batch norm would use the batch's own statistics"
    joint_count = codec.skeleton.joint_count
    keypoints, scores = [np.empty((0, joint_count, 2))], [np.empty((0, joint_count))]
    found = []
    for raw in batches:
        images = images_on_device(raw, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heat = last_heatmaps(model, images, codec, flip)
        found.append((*codec.decode(heat), raw.records_NR, raw.input_from_image_N23))
    # Copied to the CPU only here, because this waits for the GPU.
    for joints, score, records, matrices in found:
        keypoints.append(codec.image_joints(joints, unpack_records(records.numpy()), matrices))
        scores.append(score.double().cpu().numpy())
    return Predictions(np.concatenate(keypoints), np.concatenate(scores))


def last_heatmaps(model: nn.Module, images_N3HW: Tensor, codec: Codec, flip: bool) -> Tensor:
    """(N, J, H, W) float32 heatmaps of the last stack, with or without the flip test."""
    if not flip:
        return model(images_N3HW)[:, -1].float()
    heat = model(torch.cat([images_N3HW, images_N3HW.flip(3)]))[:, -1].float()
    people = images_N3HW.shape[0]  # chunk() would fix the batch size of an exported graph
    plain, flipped = heat[:people], heat[people:]
    flip_indices = torch.tensor(codec.skeleton.flip_indices, device=heat.device)
    mean = (plain + heatmaps.flip_back(flipped, flip_indices, codec.rule)) / 2
    return mean.clamp_max(1) if codec.rule == "princeton" else mean


def predict_distributed(
    network: nn.Module,
    source: Source,
    samples: npt.NDArray[np.int64],
    codec: Codec,
    dist: DistributedContext,
    *,
    loader: LoaderName = "opencv",
    batch_size: int,
    workers: int,
    flip: bool,
    watch: Callable[[Iterable[RawBatch]], Iterable[RawBatch]] = iter,
) -> Predictions:
    """Joints of these samples, in their order, on every rank; each rank predicts a share.

    network: in eval mode, on the device. watch: wraps the batches, to show how many are done.
    """
    mine = slice(dist.rank, None, dist.world_size)
    batches: Iterable[RawBatch] = ()
    if len(samples[mine]):
        batches = evaluation_batches(
            source,
            samples[mine],
            codec,
            loader=loader,
            device=dist.device,
            batch_size=batch_size,
            workers=workers,
        )
    found = predict(network, watch(batches), codec, flip=flip, device=dist.device, dtype=dist.dtype)
    merged = torch.zeros(len(samples), codec.skeleton.joint_count, 3, dtype=torch.float64)
    merged[mine, :, :2] = torch.from_numpy(found.keypoints_NJ2)
    merged[mine, :, 2] = torch.from_numpy(found.scores_NJ)
    # Each row is zero on all ranks but one, so the sum is exact.
    merged = sum_over_ranks(merged.to(dist.device), dist).cpu()
    return Predictions(merged[..., :2].numpy(), merged[..., 2].numpy())


def oracle_keypoints(
    people: People, skeleton: Skeleton, rule: RuleName, input_px: int
) -> npt.NDArray[np.float64]:
    """(N, J, 2) image px, the upper bound: the annotation rendered as heatmaps and decoded.

    `princeton` uses its own crop and rounding, the other rules the affine crop. No picture is read.
    """
    codec = Codec(
        preset=preset_of("princeton" if rule == "princeton" else "none", mirror=False),
        rule=rule,
        sigma=2.0 if rule == "hrnet" else 1.0,
        input_px=input_px,
        skeleton=skeleton,
    )
    keypoints = []
    for rows in np.array_split(np.arange(people.count), math.ceil(people.count / 256)):
        records = np.stack([record_of(people, row, 0, 0) for row in rows])
        affines = crop_affines(unpack_records(records), Draw(), codec.preset, input_px)[:, :2]
        affines_N23, fields = torch.from_numpy(affines), unpack_records(torch.from_numpy(records))
        draws = torch.tensor([Draw()] * len(rows))
        joints, _ = codec.heat_joints(fields, affines_N23, draws)
        decoded, _ = codec.decode(codec.render(joints, fields.marked_NJ))
        keypoints.append(codec.image_joints(decoded, unpack_records(records), affines_N23))
    return np.concatenate(keypoints)
