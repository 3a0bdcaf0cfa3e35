"""What a shard of crops stores of a picture: the region that augmentation can reach, shrunk.

The region is a square about the person's box, cut at the picture's borders; outside is black
either way. Picture and region are mapped edge to edge, so with x0 the region's first column and a
its width over the stored width, x_image + 0.5 = (x_stored + 0.5) a + x0.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE
from pipelines.augment import PRESETS, Preset
from pipelines.shard_format import CropRule, Manifest

_MARGIN_PX = 2
"""Stored px about the region: a bilinear warp reads the neighbours of what it reaches."""
WORST_ANGLE_DEG = 45.0


class Region(NamedTuple):
    """A rectangle of a picture and the size at which it is stored, px."""

    left: int
    top: int
    right: int
    """First column that is not in it; so is `bottom` for rows."""
    bottom: int
    width: int
    """Stored; never more than right - left."""
    height: int

    @property
    def image_from_stored(self) -> tuple[float, ...]:
        """a, b, tx, c, d, ty of the affine, stored px -> image px, pixel centres whole."""
        x = (self.right - self.left) / self.width
        y = (self.bottom - self.top) / self.height
        return (x, 0.0, x / 2 - 0.5 + self.left, 0.0, y, y / 2 - 0.5 + self.top)


def reach(preset: Preset) -> float:
    """Side of the upright square that the preset's strongest draw sees, in sides of the box.

    A square turned by t has an upright hull larger by |cos t| + |sin t|, at most at 45 degrees.
    """
    scale = 2.0**preset.scale.high if preset.scale_is_log2 else preset.scale.high
    turn = max(abs(preset.rotation_deg.low), abs(preset.rotation_deg.high))
    turn = math.radians(min(turn, WORST_ANGLE_DEG)) if preset.rotation_probability else 0.0
    return scale * (math.cos(turn) + math.sin(turn))


def rule_of(preset: str, person_px: int, quality: int) -> CropRule:
    """The rule that packs for a preset of the table. Raises InputError for princeton's."""
    if PRESETS[preset].princeton_crop:
        raise InputError(
            "--reach princeton",
            "a preset whose crop is exact on original pictures only",
            "another preset, such as hrnet, which reaches further",
            "pack with --packing original to train by princeton's rules",
        )
    return CropRule(
        preset=preset, reach=reach(PRESETS[preset]), person_px=person_px, quality=quality
    )


def region(
    center: npt.ArrayLike, scale: float, image_width: int, image_height: int, rule: CropRule
) -> Region:
    """The region of one person. center: (2,) image px. scale: box side / 200 px.

    A person whose region lies outside the picture gets the nearest row or column of it.
    """
    box_px = PIXELS_PER_SCALE * scale
    shrink = max(1.0, box_px / rule.person_px)
    half = box_px * rule.reach / 2 + _MARGIN_PX * shrink
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


def shrink(image_HW3: npt.NDArray, part: Region) -> npt.NDArray:
    """(height, width, 3) of the region, each stored pixel the mean of the area that it covers."""
    cut = image_HW3[part.top : part.bottom, part.left : part.right]
    if cut.shape[:2] == (part.height, part.width):
        return cut
    return cv2.resize(cut, (part.width, part.height), interpolation=cv2.INTER_AREA)


def crop_jpeg(jpeg: bytes, part: Region, quality: int) -> bytes:
    """The region of a picture as a JPEG; the bytes themselves where it is all of the picture.

    jpeg: of a picture that pipelines/jpeg.py let pass. Chroma is halved, as in photographs.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flags)
    assert image is not None, "it was decoded before, as a check"
    if image.shape[:2] == (part.height, part.width):
        return jpeg
    done, stored = cv2.imencode(".jpg", shrink(image, part), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return stored.tobytes()


def require(manifest: Manifest, preset: Preset, where: object) -> None:
    """Raise InputError unless these shards hold all that the preset can reach."""
    rule = manifest.crop
    if rule is None:
        return
    if preset.princeton_crop:
        raise InputError(
            where,
            "shards of crops, and princeton's crop",
            "the original pictures: its truncated box and its two resamplings need them",
            "pack with tools/make_shards.py --packing original into another folder, or train "
            "with another data.preset",
        )
    wanted = reach(preset)
    if wanted > rule.reach + 1e-6:
        raise InputError(
            where,
            f"crops of {rule.reach:.3f} x the person's box, as the preset {rule.preset} needs",
            f"{wanted:.3f} x, which this preset can reach",
            "choose a milder data.preset, or pack again with tools/make_shards.py --packing crop "
            "--reach PRESET into another folder",
        )
