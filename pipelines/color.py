"""Colour jitter of a batch, by one torch routine on the batch's device, for both loaders."""

import torch

from pipelines.augment import Draw

_COLUMN = {name: index for index, name in enumerate(Draw._fields)}


def jitter(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
    """Apply the colour part of the draws to RGB images in 0..1; returns the same shape and range.

    Hue, saturation, brightness and contrast follow princeton-vl/pytorch_stacked_hourglass: hue and
    saturation in HSV, then an added brightness, then contrast about the mean of the pixel's own
    three channels, then a clip to 0..1. The channel gain follows princeton-vl/pose-hg-train: a
    factor, then a clip. Images whose draw is neutral come back bit for bit.
    """
    neutral = torch.tensor(Draw()[_COLUMN["hue"] :], device=draws_ND.device)
    changed = (draws_ND[:, _COLUMN["hue"] :] != neutral).any(dim=1)
    if images_N3HW.device.type == "cpu":
        result = images_N3HW.clone(memory_format=torch.preserve_format)
        # Planes in one piece are faster here than every third number of a channels-last image.
        result[changed] = _color(images_N3HW[changed].contiguous(), draws_ND[changed])
        return result
    # On a GPU, picking rows would make the host wait for their number.
    return torch.where(changed[:, None, None, None], _color(images_N3HW, draws_ND), images_N3HW)


def _color(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
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
    return torch.stack(channels, dim=1)
