"""Pure affine maps between image, input and heatmap pixels. Conventions: docs/conventions.md.

Matrices are (3, 3) float64, named target_from_source, for column vectors (x, y, 1) whose pixel
centres are integers. Without randomness, files or devices.
"""

import numpy as np
import numpy.typing as npt

from configs.skeleton import PIXELS_PER_SCALE

Matrix = npt.NDArray[np.float64]

STRIDE = 4
"""Input pixels per heatmap pixel: the stem halves the picture twice."""
MAX_HALVINGS = 5
"""Enough for a box of 64 x the input's side."""
SAME_SHRINK = 1e-4
"""Base-2 logarithms that differ by less are equal, because DALI computes them in float32."""


def translation(x: float, y: float) -> Matrix:
    """(3, 3) matrix that moves points by (x, y) px."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def scaling(x: float, y: float) -> Matrix:
    """(3, 3) matrix that multiplies the coordinates, about the origin."""
    return np.diag([x, y, 1.0])


def rotation(degrees: float) -> Matrix:
    """(3, 3) matrix that rotates points about the origin, clockwise on the screen."""
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def mirror(width_px: int) -> Matrix:
    """(3, 3) matrix that mirrors a picture of that width left to right: x -> W - 1 - x."""
    return translation(width_px - 1.0, 0.0) @ scaling(-1.0, 1.0)


def input_from_image(
    center: npt.ArrayLike,
    scale: float,
    input_px: int,
    scale_factor: float = 1.0,
    rotation_deg: float = 0.0,
    flip: bool = False,
) -> Matrix:
    """(3, 3) affine, image px -> input px: the person's box fills the input edge to edge.

    center: (2,) middle of the box, image px. scale: side of the box / 200 px. scale_factor enlarges
    the box, so the person gets smaller. The picture is rotated by rotation_deg about the box's
    centre, then mirrored if flip.
    """
    x, y = np.asarray(center, dtype=np.float64)
    zoom = input_px / (PIXELS_PER_SCALE * scale * scale_factor)
    middle = (input_px - 1) / 2
    matrix = (
        translation(middle, middle)
        @ rotation(rotation_deg)
        @ scaling(zoom, zoom)
        @ translation(-x, -y)
    )
    return mirror(input_px) @ matrix if flip else matrix


def halvings(shrink: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How often a picture is halved before the warp. shrink: source px per target px of the warp.

    The remaining warp shrinks it at most twice, so that bilinear sampling reads every pixel.
    """
    return np.clip(np.ceil(np.log2(shrink) - SAME_SHRINK), 1, MAX_HALVINGS + 1).astype(int) - 1


def shrink_of(target_from_source: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(...) source px per target px along an axis, for affines (..., 2 or 3, 3)."""
    linear = np.asarray(target_from_source, dtype=np.float64)[..., :2, :2]
    return 1 / np.sqrt(np.abs(np.linalg.det(linear)))


def stored_from_half(width: int, height: int) -> Matrix:
    """(3, 3) affine, px of the picture at half size (rounded down) -> px of the picture."""
    x, y = width / max(1, width // 2), height / max(1, height // 2)
    return translation(-0.5, -0.5) @ scaling(x, y) @ translation(0.5, 0.5)


def transform(matrix: npt.ArrayLike, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Apply an affine (..., 2 or 3, 3) to points (..., P, 2); returns (..., P, 2), target px."""
    affine = np.asarray(matrix, dtype=np.float64)
    linear, shift = affine[..., :2, :2], affine[..., :2, 2]
    return np.asarray(points, np.float64) @ np.swapaxes(linear, -1, -2) + shift[..., None, :]
