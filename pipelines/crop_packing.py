"""Stored crops: the region of a picture that augmentation can sample, scaled down.

The region is a square around the person's box, clipped to the picture, because crops are black
outside it. It is resized edge to edge: with x0 the region's first column and a = region width /
stored width, x_image + 0.5 = (x_stored + 0.5) a + x0.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE
from pipelines import i420
from pipelines.augment import PRESETS, Preset
from pipelines.jpeg import decode
from pipelines.shard_format import CropRule, Manifest

_MARGIN_PX = 2
"""Stored px around the region, because a bilinear warp reads the neighbours of a pixel."""


class Region(NamedTuple):
    """A rectangle of a picture and the size at which it is stored, px."""

    left: int
    top: int
    right: int
    """Exclusive, as is `bottom`."""
    bottom: int
    width: int
    """Stored width; at most right - left."""
    height: int

    @property
    def image_from_stored(self) -> tuple[float, ...]:
        """Affine a, b, tx, c, d, ty, stored px -> image px; pixel centres are integers."""
        x = (self.right - self.left) / self.width
        y = (self.bottom - self.top) / self.height
        return (x, 0.0, x / 2 - 0.5 + self.left, 0.0, y, y / 2 - 0.5 + self.top)


def crop_extent(preset: Preset) -> float:
    """Side of the upright square that contains the preset's largest crop / side of the box.

    A square rotated by t fits an upright square of |cos t| + |sin t| its side, at most at 45 deg.
    """
    scale = 2.0**preset.scale.high if preset.scale_is_log2 else preset.scale.high
    angle = max(abs(preset.rotation_deg.low), abs(preset.rotation_deg.high))
    angle = math.radians(min(angle, 45.0)) if preset.rotation_probability else 0.0
    return scale * (math.cos(angle) + math.sin(angle))


def crop_rule(preset: str, person_px: int, quality: int) -> CropRule:
    """The CropRule for a preset's largest crops."""
    extent = crop_extent(PRESETS[preset])
    return CropRule(preset=preset, extent=extent, person_px=person_px, quality=quality)


def crop_region(
    center: npt.ArrayLike, scale: float, image_width: int, image_height: int, rule: CropRule
) -> Region:
    """The region of one person. center: (2,) image px. scale: box side / 200 px.

    If the region is outside the picture, the picture's nearest row or column is used.
    """
    box_px = PIXELS_PER_SCALE * scale
    shrink = max(1.0, box_px / rule.person_px)
    half = box_px * rule.extent / 2 + _MARGIN_PX * shrink
    x, y = np.asarray(center, dtype=np.float64) + 0.5  # from the picture's edge
    left, right = _clip(x - half, x + half, image_width)
    top, bottom = _clip(y - half, y + half, image_height)
    # Rounded down, so that the box has at most person_px.
    width = max(1, math.floor((right - left) / shrink))
    height = max(1, math.floor((bottom - top) / shrink))
    return Region(left, top, right, bottom, width, height)


def _clip(start: float, end: float, size: int) -> tuple[int, int]:
    """Whole pixels of start..end inside 0..size, at least one."""
    first = min(max(math.floor(start), 0), size - 1)
    return first, max(min(math.ceil(end), size), first + 1)


def resize_region(image_HW3: npt.NDArray, region: Region) -> npt.NDArray:
    """(height, width, 3) of the region; each stored pixel is the mean of the area it covers."""
    cut = image_HW3[region.top : region.bottom, region.left : region.right]
    return cv2.resize(cut, (region.width, region.height), interpolation=cv2.INTER_AREA)


def stored_crop(jpeg: bytes, region: Region, packing: str, quality: int) -> bytes:
    """The region of a picture as a JPEG (the same bytes if it is the whole picture), or raw.

    jpeg: must have passed check_jpeg. Chroma is subsampled, as in photographs.
    """
    image = decode(jpeg, "a checked picture")
    if packing == "raw":
        return i420.from_bgr(resize_region(image, region))
    if image.shape[:2] == (region.height, region.width):
        return jpeg
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, stored = cv2.imencode(".jpg", resize_region(image, region), options)
    return stored.tobytes()


def require_preset_fits(manifest: Manifest, preset: Preset, where: object) -> None:
    """Raise InputError unless the shards contain all pixels that the preset can read."""
    rule, extent = manifest.crop, crop_extent(preset)
    if rule and (preset.princeton_crop or extent > rule.extent + 1e-6):
        found = f"crops of {rule.extent:.3f} x the box, for the preset {rule.preset}"
        expected = f"crops of {extent:.3f} x the box"
        if preset.princeton_crop:
            expected = "original pictures, for princeton's crop"
        advice = (
            "take another data.preset, --packing original, or --packing crop or raw with --preset"
        )
        raise InputError(where, found, expected, advice)
