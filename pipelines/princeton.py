"""The crop, joint and decode rules of princeton-vl/pytorch_stacked_hourglass, including its bugs.

Its published weights were trained with them. Only the preset and rule `princeton` use them.
Frames: image px -> crop px (the 256-px crop before augmentation) -> input px -> heatmap px.
"""

import cv2
import numpy as np
import numpy.typing as npt
import torch

from configs.skeleton import PIXELS_PER_SCALE
from pipelines.augment import Draw
from pipelines.geometry import STRIDE, Matrix, Number, mirrored, rotation, scaling, translation
from pipelines.shard_format import Records


def crop_from_image(center: npt.ArrayLike, scale: Number, crop_px: int) -> Matrix:
    """(..., 3, 3) affine, image px -> crop px, of its joints: the box's corner goes to 0."""
    # In princeton-vl's order of operations: the result is truncated later, so the last bit matters.
    box_px = PIXELS_PER_SCALE * scale
    corner = crop_px * (-np.asarray(center, dtype=np.float64) / np.expand_dims(box_px, -1) + 0.5)
    matrix = scaling(crop_px / box_px, crop_px / box_px)
    matrix[..., :2, 2] = corner
    return matrix


def box_corners(
    center: npt.ArrayLike, scale: Number, crop_px: int
) -> tuple[npt.NDArray, npt.NDArray]:
    """Upper left and lower right corner, (..., 2) int, image px: truncated toward zero."""
    image_from_crop = np.linalg.inv(crop_from_image(center, scale, crop_px))
    corners = image_from_crop @ np.array([[0.0, crop_px], [0.0, crop_px], [1.0, 1.0]])
    return corners[..., :2, 0].astype(int), corners[..., :2, 1].astype(int)


def crop(image_HW3: npt.NDArray, center: npt.ArrayLike, scale: float, crop_px: int) -> npt.NDArray:
    """(crop_px, crop_px, 3) float64 in the image's range: a zero-padded cut, resized bilinearly."""
    upper_left, lower_right = box_corners(center, scale, crop_px)
    width, height = np.maximum(lower_right - upper_left, 1)
    canvas = np.zeros((height, width, 3))
    image_height, image_width = image_HW3.shape[:2]
    left, top = np.maximum(upper_left, 0)
    right, bottom = min(lower_right[0], image_width), min(lower_right[1], image_height)
    if left < right and top < bottom:
        x, y = left - upper_left[0], top - upper_left[1]
        canvas[y : y + bottom - top, x : x + right - left] = image_HW3[top:bottom, left:right]
    return cv2.resize(canvas, (crop_px, crop_px))


def input_from_crop(draw: Draw, crop_px: int) -> Matrix:
    """(..., 3, 3) affine of the second resampling: scale and rotation about crop_px / 2."""
    middle, zoom = crop_px / 2, 1 / draw.scale
    return (
        translation(middle, middle)
        @ rotation(draw.rotation_deg)
        @ scaling(zoom, zoom)
        @ translation(-middle, -middle)
    )


def augment(crop_HW3: npt.NDArray, draw: Draw) -> npt.NDArray:
    """The second resampling and the flip of a crop, float64 in, float64 out, same shape."""
    size = crop_HW3.shape[0]
    warped = cv2.warpAffine(crop_HW3, input_from_crop(draw, size)[:2], (size, size))
    return warped[:, ::-1] if draw.flip else warped


def input_from_image(center: npt.ArrayLike, scale: Number, draw: Draw, input_px: int) -> Matrix:
    """(..., 3, 3) affine, image px -> input px: both resamplings and the flip as one.

    DALI warps with it; the OpenCV path resamples twice instead. draw: its fields are numbers or
    arrays (...,).
    """
    upper_left, lower_right = box_corners(center, scale, input_px)
    size = np.maximum(lower_right - upper_left, 1)
    crop_from_box = (
        translation(-0.5, -0.5)
        @ scaling(input_px / size[..., 0], input_px / size[..., 1])
        @ translation(0.5 - upper_left[..., 0], 0.5 - upper_left[..., 1])
    )
    matrix = input_from_crop(draw, input_px) @ crop_from_box
    return mirrored(matrix, draw.flip, input_px)


def heat_joints(
    records: Records, draws_ND: torch.Tensor, flip_indices: torch.Tensor, input_px: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joints in heatmap px (N, J, 2) by its rules, and which have a target, (N, J) bool.

    Joints are truncated to whole crop pixels, those with x <= 0 are not moved into the crop, a flip
    is x -> width - x, and the mask of joints that are missing (0, 0) is not mirrored with them.
    flip_indices: (J,) int64, the joint on the other side.
    """
    heat_px = input_px // STRIDE
    box_N1 = (PIXELS_PER_SCALE * records.scale_N.double())[:, None]
    joints = records.joints_NJ2.double()
    shift_N2 = input_px * (-records.center_N2.double() / box_N1 + 0.5)
    moved = torch.trunc(joints * (input_px / box_N1)[:, None] + shift_N2[:, None])
    in_crop = torch.where(joints[..., :1] > 0, moved, joints)

    scale, degrees, flip = draws_ND[:, :3].double().unbind(1)
    angle = torch.deg2rad(degrees)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    turn_N22 = torch.stack([cosine, -sine, sine, cosine], dim=1).reshape(-1, 2, 2)
    zoom = heat_px / (input_px * scale)[:, None, None]
    heat = ((in_crop - input_px / 2) * zoom) @ turn_N22.transpose(1, 2) + heat_px / 2

    x_NJ, y_NJ = heat[:, flip_indices].unbind(dim=-1)
    flipped = torch.stack([heat_px - x_NJ, y_NJ], dim=-1)
    heat = torch.where(flip[:, None, None] > 0, flipped, heat)
    missing = (joints == 0).all(dim=-1)
    heat = torch.where(missing[..., None], torch.zeros_like(heat), heat)
    return heat.float(), heat[..., 0] > 0


def image_joints(
    heat_NJ2: npt.NDArray[np.float64], records: Records, input_px: int
) -> npt.NDArray[np.float64]:
    """Decoded heatmap px (N, J, 2) -> image px, truncated to whole pixels toward zero."""
    scale_N = records.scale_N.astype(np.float64)
    image_from_crop = np.linalg.inv(crop_from_image(records.center_N2, scale_N, input_px))
    zoom_N12 = image_from_crop[:, None, [0, 1], [0, 1]]
    return np.trunc(heat_NJ2 * STRIDE * zoom_N12 + image_from_crop[:, None, :2, 2])
