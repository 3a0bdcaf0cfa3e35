"""Pure affine maps between image, input and heatmap pixels. Conventions: docs/conventions.md.

Matrices are (..., 3, 3) float64, named target_from_source, for column vectors (x, y, 1) whose
pixel centres are integers. Arguments are numbers, or arrays (...,) of one shape, which give one
matrix for each person. Without randomness, files or devices.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from configs.skeleton import PIXELS_PER_SCALE

Matrix = npt.NDArray[np.float64]
Number = float | npt.NDArray[Any]

STRIDE = 4
"""Input pixels per heatmap pixel: the stem halves the picture twice."""
MAX_HALVINGS = 5
"""Enough for a box of 64 x the input's side."""
SAME_SHRINK = 1e-4
"""Base-2 logarithms that differ by less are equal, so that rounding does not halve a picture."""


def identities(like: Number) -> Matrix:
    """(..., 3, 3) identity matrices, one for each number."""
    return np.tile(np.eye(3), (*np.shape(like), 1, 1))


def translation(x: Number, y: Number) -> Matrix:
    """Moves points by (x, y) px."""
    matrix = identities(x)
    matrix[..., 0, 2], matrix[..., 1, 2] = x, y
    return matrix


def scaling(x: Number, y: Number) -> Matrix:
    """Multiplies the coordinates, about the origin."""
    matrix = identities(x)
    matrix[..., 0, 0], matrix[..., 1, 1] = x, y
    return matrix


def rotation(degrees: Number) -> Matrix:
    """Rotates points about the origin, clockwise on the screen."""
    matrix, angle = identities(degrees), np.deg2rad(degrees)
    matrix[..., 0, 0] = matrix[..., 1, 1] = np.cos(angle)
    matrix[..., 0, 1], matrix[..., 1, 0] = -np.sin(angle), np.sin(angle)
    return matrix


def input_from_image(
    center: npt.ArrayLike,
    scale: Number,
    input_px: int,
    scale_factor: Number = 1.0,
    rotation_deg: Number = 0.0,
    flip: npt.ArrayLike = False,
) -> Matrix:
    """Affine, image px -> input px: the person's box fills the input edge to edge.

    center: (..., 2) middle of the box, image px. scale: side of the box / 200 px. scale_factor
    enlarges the box, so the person gets smaller. The picture is rotated by rotation_deg about the
    box's centre, then mirrored if flip.
    """
    center_2 = np.asarray(center, dtype=np.float64)
    zoom = input_px / (PIXELS_PER_SCALE * scale * scale_factor)
    middle = (input_px - 1) / 2
    matrix = (
        translation(middle, middle)
        @ rotation(rotation_deg)
        @ scaling(zoom, zoom)
        @ translation(-center_2[..., 0], -center_2[..., 1])
    )
    return mirrored(matrix, flip, input_px)


def mirrored(input_from_image: Matrix, flip: npt.ArrayLike, input_px: int) -> Matrix:
    """The affines, mirrored left to right where flip is not 0: x -> input_px - 1 - x."""
    mirror = translation(input_px - 1.0, 0.0) @ scaling(-1.0, 1.0)
    is_flipped = np.asarray(flip)[..., None, None]
    return np.where(is_flipped, mirror @ input_from_image, input_from_image)


def halvings(target_from_source: Matrix) -> npt.NDArray[np.int64]:
    """(...) how often the source is halved before it is warped by an affine (..., 3, 3).

    The remaining warp shrinks it at most twice, so that bilinear sampling reads every pixel.
    """
    shrink = 1 / np.sqrt(np.abs(np.linalg.det(target_from_source[..., :2, :2])))
    return np.clip(np.ceil(np.log2(shrink) - SAME_SHRINK), 1, MAX_HALVINGS + 1).astype(int) - 1


def stored_from_half(width: int, height: int) -> Matrix:
    """(3, 3) affine, px of the picture at half size (rounded down) -> px of the picture."""
    x, y = width / max(1, width // 2), height / max(1, height // 2)
    return translation(-0.5, -0.5) @ scaling(x, y) @ translation(0.5, 0.5)


def transform(matrix: npt.ArrayLike, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Apply an affine (..., 2 or 3, 3) to points (..., P, 2); returns (..., P, 2), target px."""
    affine = np.asarray(matrix, dtype=np.float64)
    linear, shift = affine[..., :2, :2], affine[..., :2, 2]
    return np.asarray(points, np.float64) @ np.swapaxes(linear, -1, -2) + shift[..., None, :]
