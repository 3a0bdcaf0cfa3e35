"""Named augmentation presets, and drawing from them. Applying a draw is done elsewhere.

The rules are those of the code that each preset is named after; the table is read by the OpenCV
path (`draw`, numpy) and by the DALI graph (`pipelines/dali_loader.py`), so there is one table.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt


class Distribution(NamedTuple):
    """How one number is drawn: uniform in low..high, or normal and then clipped to low..high."""

    kind: Literal["uniform", "normal"]
    low: float
    high: float
    mean: float = 0.0
    std: float = 0.0


class Preset(NamedTuple):
    """One row of the table of presets."""

    scale: Distribution
    """Factor on the side of the box, or its base-2 logarithm if `scale_is_log2`."""
    scale_is_log2: bool
    rotation_deg: Distribution
    rotation_probability: float
    flip_probability: float
    color: Literal["none", "hsv_if_flipped", "channel_gain"]
    princeton_crop: bool = False
    """Crop, joints and flip by the rules in pipelines/princeton.py."""


PresetName = Literal["princeton", "newell", "hrnet", "mild", "none"]

ONE = Distribution("uniform", 1.0, 1.0)
ZERO = Distribution("uniform", 0.0, 0.0)

PRESETS: dict[str, Preset] = {
    # princeton-vl/pytorch_stacked_hourglass
    "princeton": Preset(
        scale=Distribution("uniform", 0.75, 1.25),
        scale_is_log2=False,
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
        scale_is_log2=False,
        rotation_deg=Distribution("normal", -60.0, 60.0, 0.0, 30.0),
        rotation_probability=0.6,
        flip_probability=0.5,
        color="none",
    ),
    # Ours, for short runs of small networks: they have no time to learn large rotations.
    "mild": Preset(
        scale=Distribution("uniform", 0.85, 1.15),
        scale_is_log2=False,
        rotation_deg=Distribution("uniform", -15.0, 15.0),
        rotation_probability=1.0,
        flip_probability=0.5,
        color="none",
    ),
    "none": Preset(ONE, False, ZERO, 0.0, 0.0, "none"),
}


def preset_of(name: PresetName, mirror: bool) -> Preset:
    """A row of the table; without mirroring if the data forbid it."""
    preset = PRESETS[name]
    return preset if mirror else preset._replace(flip_probability=0.0)


def still(preset: Preset) -> Preset:
    """No augmentation, but the preset's crop rule: princeton's crop differs even without a draw."""
    return PRESETS["none"]._replace(princeton_crop=preset.princeton_crop)


# Colour ranges of the two rules that have one (see pipelines/color.py for the formulas).
HUE_TURNS = Distribution("uniform", -0.2, 0.2)
SATURATION = Distribution("uniform", 0.5, 1.5)
BRIGHTNESS = Distribution("uniform", -0.3, 0.3)
CONTRAST = Distribution("uniform", 0.5, 1.5)
CHANNEL_GAIN = Distribution("uniform", 0.6, 1.4)


class Draw(NamedTuple):
    """One drawn augmentation. As a row of a batch it is a float32 vector in this order."""

    scale: float = 1.0
    """Factor on the side of the box."""
    rotation_deg: float = 0.0
    """Turn of the picture, clockwise on the screen."""
    flip: float = 0.0
    """1 if mirrored, else 0."""
    hue: float = 0.0
    """Shift of the HSV hue, in turns of 360 degrees."""
    saturation: float = 1.0
    """Factor on the HSV saturation."""
    brightness: float = 0.0
    """Added to every channel, of 0..1."""
    contrast: float = 1.0
    """Factor about the pixel's own grey."""
    red: float = 1.0
    """Channel gain; so are the next two."""
    green: float = 1.0
    blue: float = 1.0


def draw_rng(seed: int, epoch: int, person: int) -> np.random.Generator:
    """The generator for one person in one epoch: the same on any rank and in any worker."""
    return np.random.default_rng([seed, epoch, person])


def draw(preset: Preset, rng: np.random.Generator) -> Draw:
    """Draw one augmentation from a preset."""
    scale = _value(preset.scale, rng)
    turns = rng.random() < preset.rotation_probability
    angle = _value(preset.rotation_deg, rng)
    flip = rng.random() < preset.flip_probability
    geometric = Draw(
        scale=2.0**scale if preset.scale_is_log2 else scale,
        rotation_deg=angle if turns else 0.0,
        flip=float(flip),
    )
    if preset.color == "hsv_if_flipped" and flip:
        return geometric._replace(
            hue=_value(HUE_TURNS, rng),
            saturation=_value(SATURATION, rng),
            brightness=_value(BRIGHTNESS, rng),
            contrast=_value(CONTRAST, rng),
        )
    if preset.color == "channel_gain":
        red, green, blue = (_value(CHANNEL_GAIN, rng) for _ in range(3))
        return geometric._replace(red=red, green=green, blue=blue)
    return geometric


def _value(distribution: Distribution, rng: np.random.Generator) -> float:
    if distribution.kind == "uniform":
        return float(rng.uniform(distribution.low, distribution.high))
    value = rng.normal(distribution.mean, distribution.std)
    return float(np.clip(value, distribution.low, distribution.high))


def draws_array(draws: list[Draw]) -> npt.NDArray[np.float32]:
    """(N, 10) float32, a row a draw, columns in the order of Draw's fields."""
    return np.asarray(draws, dtype=np.float32).reshape(len(draws), len(Draw._fields))
