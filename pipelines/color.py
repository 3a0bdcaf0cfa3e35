"""Colour jitter of a batch, for both loaders: torch on a GPU, OpenCV on a CPU.

Both compute the same formula; OpenCV is twenty times as fast on one core, torch needs no copy from
the GPU. They differ by less than 1e-5 of 0..1.
"""

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment import Draw
from pipelines.constants import on_device

_COLUMN = {name: index for index, name in enumerate(Draw._fields)}


def jitter(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
    """Apply the colour part of the draws to RGB images in 0..1; returns the same shape and range.

    Hue, saturation, brightness and contrast follow princeton-vl/pytorch_stacked_hourglass: hue and
    saturation in HSV, then an added brightness, then contrast about the mean of the pixel's own
    three channels, then a clip to 0..1. The channel gain follows princeton-vl/pose-hg-train: a
    factor, then a clip. Images whose draw is neutral come back bit for bit.
    """
    neutral = on_device(Draw()[_COLUMN["hue"] :], draws_ND.dtype, draws_ND.device)
    changed = (draws_ND[:, _COLUMN["hue"] :] != neutral).any(dim=1)
    if images_N3HW.device.type == "cpu":
        result = images_N3HW.clone(memory_format=torch.channels_last)
        for image_3HW, draw, applies in zip(result, draws_ND.tolist(), changed, strict=True):
            if applies:
                image_HW3 = image_3HW.permute(1, 2, 0).numpy()
                image_HW3[:] = color_by_opencv(image_HW3, Draw(*draw))
        return result
    # On a GPU, picking rows would make the host wait for their number.
    return torch.where(
        changed[:, None, None, None], color_by_torch(images_N3HW, draws_ND), images_N3HW
    )


def color_by_opencv(image_HW3: npt.NDArray, draw: Draw) -> npt.NDArray:
    """The formula for one float32 RGB image in 0..1.

    A contrast c about the pixel's own mean is linear: c x + (1 - c) mean + brightness.
    """
    turned = image_HW3
    if draw.hue or draw.saturation != 1:
        hsv = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV)  # hue in 0..360
        hsv = cv2.transform(hsv, _hue_and_saturation(draw))
        np.minimum(hsv[..., 1], 1, out=hsv[..., 1])
        turned = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    contrast = np.full((3, 4), (1 - draw.contrast) / 3, dtype=np.float32)
    contrast[:, :3] += draw.contrast * np.eye(3, dtype=np.float32)
    contrast[:, 3] = draw.brightness
    colored = np.clip(cv2.transform(turned, contrast), 0, 1)
    gain = np.array([draw.red, draw.green, draw.blue], dtype=np.float32)
    return colored if (gain == 1).all() else np.clip(colored * gain, 0, 1)


def _hue_and_saturation(draw: Draw) -> npt.NDArray[np.float32]:
    """(3, 4) affine of (hue, saturation, value). OpenCV takes a hue beyond 360, not below 0."""
    return np.array(
        [[1, 0, 0, draw.hue % 1 * 360], [0, draw.saturation, 0, 0], [0, 0, 1, 0]], dtype=np.float32
    )


def color_by_torch(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
    """The formula for a batch of RGB images in 0..1."""
    hue, saturation, brightness, contrast = (
        draws_ND[:, _COLUMN[name], None, None]
        for name in ("hue", "saturation", "brightness", "contrast")
    )
    gain = draws_ND[:, _COLUMN["red"] : _COLUMN["blue"] + 1, None, None]
    colored = _shift_hsv(images_N3HW, hue, saturation) + brightness[:, None]
    grey = colored.mean(dim=1, keepdim=True)
    colored = ((colored - grey) * contrast[:, None] + grey).clamp(0, 1)
    return (colored * gain).clamp(0, 1)


def _shift_hsv(
    images_N3HW: torch.Tensor, hue_turns: torch.Tensor, saturation_factor: torch.Tensor
) -> torch.Tensor:
    """Turn the hue and scale the saturation (clipped to 0..1); the HSV value stays.

    With sector h in 0..6, value v and saturation s, the hexcone model gives channel n (5, 3, 1 for
    red, green, blue) as v - v s clip(min(k, 4 - k), 0, 1) where k = (n + h) mod 6.
    """
    red, green, blue = images_N3HW.unbind(dim=1)
    value = images_N3HW.amax(dim=1)
    chroma = value - images_N3HW.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = sector + 6 * hue_turns
    saturation = chroma / torch.where(value > 0, value, torch.ones_like(value))
    saturation = (saturation * saturation_factor).clamp(0, 1)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(sector + offset, 6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)  # channels-last, as it came
