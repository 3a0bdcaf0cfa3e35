"""The loader and training step of princeton-vl/pytorch_stacked_hourglass, re-created as baseline.

Written from a description of its steps, not from its code. Loading: decode; cut with whole corners
into a float64 canvas and resize; warp a second time; mirror and jitter the colours in numpy; move
joints and paste a 9 x 9 Gaussian for each in Python loops; collate by torch. Training: float32
(TF32 on a GPU), Adam, the loss read in each step.
"""

from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from configs.skeleton import MPII, PIXELS_PER_SCALE
from pipelines import princeton
from pipelines.augment import PRESETS, Draw, draw, draw_rng
from pipelines.geometry import STRIDE
from pipelines.opencv_loader import endless_batches, shuffled_keys
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

PREFETCH = 2
"""torch's default."""
_Y, _X = np.mgrid[-4:5, -4:5]
STAMP = np.exp(-(_X**2 + _Y**2) / 2)
"""(9, 9) Gaussian of sigma 1."""


class PrincetonPeople(Dataset):
    """(input_px, input_px, 3) float32 images in 0..1 and (J, H, W) float32 heatmaps."""

    def __init__(self, shards: ShardSet, input_px: int):
        """shards: of original pictures."""
        self.shards, self.input_px = shards, input_px
        self.fields = unpack_records(shards.records())

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        sample, epoch = key
        drawn = draw(PRESETS["princeton"], draw_rng(0, epoch, sample))
        data = np.frombuffer(self.shards.picture(sample), dtype=np.uint8)
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
        center = self.fields.center_N2[sample].astype(np.float64)
        scale = float(self.fields.scale_N[sample])
        crop = princeton.crop(image, center, scale, self.input_px)
        crop = princeton.augment(crop, drawn) / 255
        if drawn.flip:
            crop = jitter(crop.astype(np.float32), drawn)
        heat_px = self.input_px // STRIDE
        joints = move_joints(self.fields.joints_NJ2[sample], center, scale, drawn, self.input_px)
        heat = render_by_loop(joints * heat_px / self.input_px, heat_px)
        return np.ascontiguousarray(crop, dtype=np.float32), heat


def jitter(image_HW3: np.ndarray, drawn: Draw) -> np.ndarray:
    """Jitter hue, saturation, brightness and contrast of an RGB image in 0..1, one by one."""
    hsv = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV)
    hsv[:, :, 0] = np.mod(hsv[:, :, 0] + 360 * drawn.hue, 360)
    hsv[:, :, 1] = np.clip(hsv[:, :, 1] * drawn.saturation, 0, 1)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) + drawn.brightness
    grey = rgb.mean(axis=2, keepdims=True)
    return np.clip((rgb - grey) * drawn.contrast + grey, 0, 1)


def move_joints(
    joints_J2: np.ndarray, center: np.ndarray, scale: float, drawn: Draw, input_px: int
) -> np.ndarray:
    """(J, 2) input px: moved into the crop joint by joint, truncated, then warped."""
    zoom = input_px / (PIXELS_PER_SCALE * scale)
    moved = np.zeros((len(joints_J2), 2))
    for place, (x, y) in enumerate(joints_J2):
        if x > 0:
            corner = input_px / 2 - center * zoom
            moved[place] = int(x * zoom + corner[0]), int(y * zoom + corner[1])
    warp = princeton.input_from_crop(drawn, input_px)
    moved = moved @ warp[:2, :2].T + warp[:2, 2]
    if drawn.flip:
        moved = moved[list(MPII.flip_indices)]
        moved[:, 0] = input_px - moved[:, 0]
    moved[(joints_J2 == 0).all(axis=1)] = 0  # the mask is not mirrored, as in its code
    return moved


def render_by_loop(joints_J2: np.ndarray, heat_px: int = 64) -> np.ndarray:
    """(J, heat_px, heat_px) targets of one person: a pasted 9 x 9 Gaussian where x > 0."""
    maps = np.zeros((len(joints_J2), heat_px, heat_px), dtype=np.float32)
    for target, (x, y) in zip(maps, joints_J2, strict=True):
        px, py = int(x), int(y)
        if x > 0 and px < heat_px and 0 <= py < heat_px:
            left, top = max(0, px - 4), max(0, py - 4)
            right, bottom = min(heat_px, px + 5), min(heat_px, py + 5)
            target[top:bottom, left:right] = STAMP[
                top - py + 4 : bottom - py + 4, left - px + 4 : right - px + 4
            ]
    return maps


def princeton_batches(
    shards: ShardSet, input_px: int, batch_size: int, workers: int
) -> Iterator[list[torch.Tensor]]:
    """Endless batches by torch's DataLoader, set up as in its code.

    Workers are not forked from this process: they would inherit its malloc settings.
    """
    sampler = endless_batches(partial(shuffled_keys, shards, 0, 0), batch_size, 0, 1)
    return iter(
        DataLoader(
            PrincetonPeople(shards, input_px),
            batch_sampler=sampler,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_one_thread,
            multiprocessing_context="forkserver" if workers else None,
        )
    )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def princeton_step(
    network: nn.Module, optimizer: Optimizer, images_NHW3: torch.Tensor, heat_NJHW: torch.Tensor
) -> float:
    """Its training step: the mean of one loss per stack; the loss is read in each step."""
    heat_NSJHW = network(images_NHW3.permute(0, 3, 1, 2))
    losses = [(heat - heat_NJHW).square().mean() for heat in heat_NSJHW.unbind(dim=1)]
    loss = torch.stack(losses).mean()
    value = loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value
