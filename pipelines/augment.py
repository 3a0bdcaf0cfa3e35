"""Augmentation presets, random draws from them, and colour jitter.

Each preset follows the code that it is named after. Both loaders use the same draws.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from common.system import triton_works
from configs.schema import PresetName


class Distribution(NamedTuple):
    """How one number is drawn: uniform in low..high, or normal and then clipped to low..high."""

    kind: Literal["uniform", "normal"]
    low: float
    high: float
    mean: float = 0.0
    std: float = 0.0


class Preset(NamedTuple):
    """One row of the table of presets; by default no augmentation."""

    scale: Distribution = Distribution("uniform", 1.0, 1.0)  # factor on the box's side, or its log2
    scale_is_log2: bool = False
    rotation_deg: Distribution = Distribution("uniform", 0.0, 0.0)
    rotation_probability: float = 0.0
    flip_probability: float = 0.0
    color: Literal["none", "hsv_if_flipped", "channel_gain"] = "none"
    princeton_crop: bool = False  # crop, joints and flip by the rules in pipelines/princeton.py


PRESETS: dict[str, Preset] = {
    # princeton-vl/pytorch_stacked_hourglass
    "princeton": Preset(
        scale=Distribution("uniform", 0.75, 1.25),
        rotation_deg=Distribution("uniform", -30.0, 30.0),
        rotation_probability=1.0,
        flip_probability=0.5,
        color="hsv_if_flipped",
        princeton_crop=True,
    ),
    # princeton-vl/pose-hg-train (Newell et al., ECCV 2016)
    "newell": Preset(
        scale=Distribution("normal", -0.5, 0.5, 0.0, 0.25),
        scale_is_log2=True,
        rotation_deg=Distribution("normal", -60.0, 60.0, 0.0, 30.0),
        rotation_probability=0.4,
        flip_probability=0.5,
        color="channel_gain",
    ),
    # leoxiaobin/deep-high-resolution-net
    "hrnet": Preset(
        scale=Distribution("normal", 0.75, 1.25, 1.0, 0.25),
        rotation_deg=Distribution("normal", -60.0, 60.0, 0.0, 30.0),
        rotation_probability=0.6,
        flip_probability=0.5,
    ),
    # Ours, for short runs of small networks: they have no time to learn large rotations.
    "mild": Preset(
        scale=Distribution("uniform", 0.85, 1.15),
        rotation_deg=Distribution("uniform", -15.0, 15.0),
        rotation_probability=1.0,
        flip_probability=0.5,
    ),
    "none": Preset(),
}


def preset_of(name: PresetName, mirror: bool) -> Preset:
    """A preset by its name. mirror: False sets its flip probability to 0."""
    preset = PRESETS[name]
    return preset if mirror else preset._replace(flip_probability=0.0)


def without_augmentation(preset: Preset) -> Preset:
    """No augmentation, but the preset's crop rule, because princeton's crop always differs."""
    return Preset(princeton_crop=preset.princeton_crop)


# Colour ranges of the two rules that have one (the formulas are in `jitter`).
HUE_TURNS = Distribution("uniform", -0.2, 0.2)
SATURATION = Distribution("uniform", 0.5, 1.5)
BRIGHTNESS = Distribution("uniform", -0.3, 0.3)
CONTRAST = Distribution("uniform", 0.5, 1.5)
CHANNEL_GAIN = Distribution("uniform", 0.6, 1.4)


class Draw(NamedTuple):
    """One drawn augmentation. As a row of a batch it is a float32 vector in this order."""

    scale: float = 1.0  # factor on the side of the box
    rotation_deg: float = 0.0  # of the picture, clockwise on the screen
    flip: float = 0.0  # 1 if mirrored, else 0
    hue: float = 0.0  # shift of the HSV hue, in turns of 360 degrees
    saturation: float = 1.0  # factor on the HSV saturation
    brightness: float = 0.0  # added to every channel (range 0..1)
    contrast: float = 1.0  # factor about the mean of the pixel's three channels
    red: float = 1.0  # gain of the channel, as `green` and `blue`
    green: float = 1.0
    blue: float = 1.0


_COLOR_NUMBERS = {"none": 0, "hsv_if_flipped": 4, "channel_gain": 3}
"""Random numbers for the colours of one person."""
_FIRST_COLOR = Draw._fields.index("hue")


def draw_rng(seed: int, epoch: int, person: int) -> np.random.Generator:
    """The generator for one person in one epoch: the same on any rank and in any worker."""
    return np.random.default_rng([seed, epoch, person])


def draw(preset: Preset, rng: np.random.Generator) -> Draw:
    """Draw one augmentation from a preset."""
    return Draw(*draw_batch(preset, [rng])[0].tolist())


def draw_batch(preset: Preset, rngs: Iterable[np.random.Generator]) -> npt.NDArray[np.float64]:
    """(N, 10) draws from a preset, one of each generator, columns in the order of Draw's fields."""
    scale, turn, rotation, flip, *colors = np.array([_numbers(preset, rng) for rng in rngs]).T
    draws_ND = np.tile(Draw(), (len(scale), 1))
    factor = _values(preset.scale, scale)
    draws_ND[:, 0] = np.float_power(2.0, factor) if preset.scale_is_log2 else factor
    turned, mirrored = turn < preset.rotation_probability, flip < preset.flip_probability
    draws_ND[turned, 1] = _values(preset.rotation_deg, rotation[turned])
    draws_ND[:, 2] = mirrored
    if preset.color == "hsv_if_flipped":
        ranges = (HUE_TURNS, SATURATION, BRIGHTNESS, CONTRAST)
        for column, (distribution, number) in enumerate(zip(ranges, colors, strict=True), 3):
            draws_ND[mirrored, column] = _values(distribution, number[mirrored])
    if preset.color == "channel_gain":
        draws_ND[:, 7:] = _values(CHANNEL_GAIN, np.stack(colors, axis=1))
    return draws_ND


def _numbers(preset: Preset, rng: np.random.Generator) -> list[float]:
    """Standard uniform or normal numbers, from which `draw_batch` makes a draw."""
    kinds = (preset.scale.kind, "uniform", preset.rotation_deg.kind, "uniform")
    numbers = [rng.random() if kind == "uniform" else rng.standard_normal() for kind in kinds]
    return numbers + rng.random(_COLOR_NUMBERS[preset.color]).tolist()


def _values(
    distribution: Distribution, numbers: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Values of a distribution, of standard uniform or normal numbers."""
    low, high = distribution.low, distribution.high
    if distribution.kind == "uniform":
        return low + (high - low) * numbers
    return (distribution.mean + distribution.std * numbers).clip(low, high)


def jitter(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
    """Apply the colour part of the draws to RGB images in 0..1; returns the same shape and range.

    OpenCV does it on a CPU (20 times as fast as torch on one core), torch on a GPU, compiled if
    that is possible: 63 operations would move 51 MB a person. They agree within 1e-5.

    Hue, saturation, brightness and contrast follow princeton-vl/pytorch_stacked_hourglass: hue and
    saturation in HSV, then an added brightness, then contrast about the mean of the pixel's own
    three channels, then a clip to 0..1. The channel gain follows princeton-vl/pose-hg-train: a
    factor, then a clip. Images with a neutral draw are unchanged bit for bit.
    """
    if images_N3HW.device.type == "cpu":
        result = images_N3HW.clone(memory_format=torch.channels_last)
        for image_3HW, draw in zip(result, draws_ND.tolist(), strict=True):
            color_by_opencv(image_3HW.permute(1, 2, 0).numpy(), Draw(*draw))
        return result
    neutral = constant_on_device(Draw()[_FIRST_COLOR:], draws_ND.dtype, draws_ND.device)
    is_on_gpu = images_N3HW.device.type == "cuda"
    color = _color_where_drawn_on_gpu() if is_on_gpu else _color_where_drawn
    return color(images_N3HW, draws_ND, neutral)


def color_by_opencv(image_HW3: npt.NDArray[np.float32], draw: Draw) -> None:
    """Apply the formula to one RGB image in 0..1, in place.

    Contrast c about the pixel's own mean is linear in x: c x + (1 - c) mean + brightness.
    """
    if draw[_FIRST_COLOR:] == Draw()[_FIRST_COLOR:]:
        return
    buffer_HW3 = np.empty_like(image_HW3)  # alternating between two buffers keeps both in the cache
    if draw.hue or draw.saturation != 1:
        # OpenCV takes a hue above 360, but not below 0.
        affine = [[1, 0, 0, draw.hue % 1 * 360], [0, draw.saturation, 0, 0], [0, 0, 1, 0]]
        cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV, dst=buffer_HW3)  # hue in 0..360
        cv2.transform(buffer_HW3, np.array(affine, dtype=np.float32), dst=image_HW3)
        np.minimum(image_HW3[..., 1], 1, out=image_HW3[..., 1])
        cv2.cvtColor(image_HW3, cv2.COLOR_HSV2RGB, dst=buffer_HW3)
    else:
        np.copyto(buffer_HW3, image_HW3)
    contrast = np.full((3, 4), (1 - draw.contrast) / 3, dtype=np.float32)
    contrast[:, :3] += draw.contrast * np.eye(3, dtype=np.float32)
    contrast[:, 3] = draw.brightness
    cv2.transform(buffer_HW3, contrast, dst=image_HW3)
    np.clip(image_HW3, 0, 1, out=image_HW3)
    gain = np.array([draw.red, draw.green, draw.blue], dtype=np.float32)
    if (gain != 1).any():
        image_HW3 *= gain
        np.clip(image_HW3, 0, 1, out=image_HW3)


def color_by_torch(images_N3HW: torch.Tensor, draws_ND: torch.Tensor) -> torch.Tensor:
    """The formula for a batch of RGB images in 0..1."""
    colors = draws_ND[:, _FIRST_COLOR:, None, None]
    hue, saturation, brightness, contrast = colors[:, :4].unbind(dim=1)
    colored = _shift_hsv(images_N3HW, hue, saturation) + brightness[:, None]
    grey = colored.mean(dim=1, keepdim=True)
    colored = ((colored - grey) * contrast[:, None] + grey).clamp(0, 1)
    return (colored * colors[:, 4:]).clamp(0, 1)


def _color_where_drawn(
    images_N3HW: torch.Tensor, draws_ND: torch.Tensor, neutral: torch.Tensor
) -> torch.Tensor:
    changed = (draws_ND[:, _FIRST_COLOR:] != neutral).any(dim=1)
    # Boolean indexing on a GPU would synchronise with the host.
    colored = color_by_torch(images_N3HW, draws_ND)
    return torch.where(changed[:, None, None, None], colored, images_N3HW)


@functools.cache
def _color_where_drawn_on_gpu() -> Callable[..., torch.Tensor]:
    can_compile = triton_works() and torch.cuda.get_device_capability() >= (7, 0)
    return torch.compile(_color_where_drawn) if can_compile else _color_where_drawn


def _shift_hsv(
    images_N3HW: torch.Tensor, hue_turns: torch.Tensor, saturation_factor: torch.Tensor
) -> torch.Tensor:
    """Shift the hue and scale the saturation (clipped to 0..1); the HSV value stays.

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
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)  # channels-last, as the input


@functools.lru_cache(maxsize=64)
def constant_on_device(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(len(values),) tensor, cached because each copy would synchronise. Never write to it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
