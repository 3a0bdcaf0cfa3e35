"""Renders joints as target heatmaps and decodes heatmaps into joints, by one of three rules.

All functions are batched and run on the tensors' device. docs/conventions.md defines the rules.
Axes: N person, J joint, H row, W column; points are (x, y) in heatmap px.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.schema import RuleName
from pipelines.geometry import STRIDE, Matrix, scaling, transform, translation
from pipelines.shard_format import Records

_LEAST_EXPONENT = -40.0
"""Profiles below 4.3e-18 are raised to it: denormal products are four times as slow on a CPU."""
_FLOOR = 1e-6  # values are raised to this before the logarithm of the sub-pixel decode


def heat_from_input(rule: RuleName) -> Matrix:
    """(3, 3) affine, input px -> heatmap px: edge to edge for `exact`, x / 4 for the other two."""
    if rule == "exact":
        return translation(-0.5, -0.5) @ scaling(1 / STRIDE, 1 / STRIDE) @ translation(0.5, 0.5)
    return scaling(1 / STRIDE, 1 / STRIDE)


def heat_joints(
    records: Records,
    input_from_image_N23: Tensor,
    flip_N: Tensor,
    flip_indices: Tensor,
    rule: RuleName,
) -> tuple[Tensor, Tensor]:
    """Joints in heatmap px (N, J, 2), by the affine of the crop's pixels, and marked (N, J).

    In flipped crops left and right joints are swapped, in `marked` too. flip_indices: (J,) int64,
    the joint on the other side.
    """
    linear, shift = input_from_image_N23[..., :2], input_from_image_N23[..., 2]
    in_input = records.joints_NJ2.to(linear) @ linear.transpose(1, 2) + shift[:, None]
    to_heat = heat_from_input(rule)
    heat = in_input * float(to_heat[0, 0]) + float(to_heat[0, 2])  # the same in x and y
    heat = torch.where(flip_N[:, None, None], heat[:, flip_indices], heat)
    marked = records.marked_NJ
    return heat, torch.where(flip_N[:, None], marked[:, flip_indices], marked)


def image_joints(
    joints_NJ2: npt.NDArray[np.float64],
    input_from_image_N23: npt.NDArray[np.float64],
    rule: RuleName,
) -> npt.NDArray[np.float64]:
    """Transform decoded joints, heatmap px -> image px (N, J, 2), by the inverse affine."""
    input_from_image = np.tile(np.eye(3), (len(joints_NJ2), 1, 1))
    input_from_image[:, :2] = input_from_image_N23
    return transform(np.linalg.inv(heat_from_input(rule) @ input_from_image), joints_NJ2)


def render(
    joints_NJ2: Tensor, has_target_NJ: Tensor, heat_px: int, rule: RuleName, sigma: float
) -> Tensor:
    """(N, J, heat_px, heat_px) float32 Gaussians of peak 1 about the joints; 0 without a target.

    joints_NJ2: heatmap px. sigma: heatmap px at a heatmap of 64 px; `princeton` and `exact` scale
    it with the heatmap, `hrnet` does not. The Gaussian is separable, so exponentials are computed
    once per row and column.
    """
    grid = torch.arange(heat_px, device=joints_NJ2.device, dtype=torch.float32)
    if rule != "hrnet":
        sigma = sigma * heat_px / 64
    center, drawn, radius = _discretize(joints_NJ2.float(), has_target_NJ, heat_px, rule, sigma)
    offset_NJ2S = grid - center[..., None]
    profile = torch.exp((offset_NJ2S.square() / (-2 * sigma**2)).clamp_min(_LEAST_EXPONENT))
    if radius is not None:
        profile = profile * (offset_NJ2S.abs() <= radius)
    x_NJS, y_NJS = (profile * drawn[..., None, None]).unbind(dim=2)
    return y_NJS[..., :, None] * x_NJS[..., None, :]


def _discretize(
    joints_NJ2: Tensor, has_target_NJ: Tensor, heat_px: int, rule: RuleName, sigma: float
) -> tuple[Tensor, Tensor, float | None]:
    """Centres, whether each joint is in the heatmap, and the radius of the window (px) or None."""
    drawn = has_target_NJ.bool()
    if rule == "exact":
        return joints_NJ2, drawn, None
    if rule == "princeton":
        center = torch.trunc(joints_NJ2)
        inside = ((center >= 0) & (center < heat_px)).all(dim=-1)
        return center, drawn & (joints_NJ2[..., 0] > 0) & inside, 3 * sigma + 1
    center, radius = torch.trunc(joints_NJ2 + 0.5), 3 * sigma
    near = ((center - radius < heat_px) & (center + radius + 1 >= 0)).all(dim=-1)
    return center, drawn & near, radius


def decode(heat_NJHW: Tensor, rule: RuleName) -> tuple[Tensor, Tensor]:
    """Joints in heatmap px (N, J, 2) float32 and their scores (N, J), the height of the peak."""
    heat = heat_NJHW.detach().float().contiguous()
    if rule == "princeton":
        return _decode_princeton(heat)
    score, x, y = _peak(heat)
    if rule == "exact":
        return torch.stack([_vertex(heat, x, y, axis) for axis in (3, 2)], dim=-1), score
    height, width = heat.shape[2:]
    inner = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    slopes = [_neighbour(heat, x, y, a, 1) - _neighbour(heat, x, y, a, -1) for a in (3, 2)]
    steps = 0.25 * torch.sign(torch.stack(slopes, dim=-1))
    joints = torch.stack([x, y], dim=-1) + steps * inner[..., None]
    return joints * (score > 0)[..., None], score


def flip_back(heat_NJHW: Tensor, flip_indices: Tensor, rule: RuleName) -> Tensor:
    """Mirror the heatmaps of a mirrored input back. flip_indices: (J,) int64.

    `hrnet` then shifts them right by one pixel, as HRNet's test code does.
    """
    back = heat_NJHW.flip(3).index_select(1, flip_indices)
    if rule == "hrnet":
        back = torch.cat([back[..., :1], back[..., :-1]], dim=3)
    return back


def _peak(heat_NJHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, x and y (int64) of the highest pixel of each map, the first of several equal ones."""
    maps = heat_NJHW.flatten(2)
    if maps.device.type == "cpu":
        # numpy guarantees the first of equal values, in one pass.
        index = torch.from_numpy(maps.numpy().argmax(axis=2))
        score = maps.gather(2, index[..., None])[..., 0]
    else:
        score, index = maps.max(dim=2)
        first = (maps == score[..., None]).to(torch.uint8).argmax(dim=2)
        index = torch.where(torch.isnan(score), index, first)
    width = heat_NJHW.shape[3]
    return score, index % width, index // width


def _neighbour(heat_NJHW: Tensor, x: Tensor, y: Tensor, axis: int, step: int) -> Tensor:
    """(N, J) values one pixel away along W (axis 3) or H (axis 2), clamped at the border."""
    height, width = heat_NJHW.shape[2:]
    column = (x + step * (axis == 3)).clamp(0, width - 1)
    row = (y + step * (axis == 2)).clamp(0, height - 1)
    return heat_NJHW.flatten(2).gather(2, (row * width + column)[..., None])[..., 0]


def _vertex(heat: Tensor, x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Sub-pixel coordinate along one axis: vertex of the parabola through three logarithms.

    The logarithm of a Gaussian is a parabola, so this is exact for one (Zhang et al., DARK, CVPR
    2020, use the same fact in two dimensions). No step at the border or where the parabola has no
    vertex.
    """
    position = x if axis == 3 else y
    here, after, before = (
        _neighbour(heat, x, y, axis, step).clamp_min(_FLOOR).log() for step in (0, 1, -1)
    )
    curvature = after - 2 * here + before
    step = (before - after) / (2 * torch.where(curvature < 0, curvature, -torch.ones_like(here)))
    step = torch.where(curvature < 0, step.clamp(-0.5, 0.5), torch.zeros_like(step))
    inside = (position > 0) & (position < heat.shape[axis] - 1)
    return position + step * inside


def _decode_princeton(heat: Tensor) -> tuple[Tensor, Tensor]:
    """3 x 3 non-maximum suppression, first maximum, quarter step to the higher side, + 0.5.

    A tie steps back. A map without a positive value gives the first zero after suppression, without
    a step. In other maps the highest pixel survives suppression, which is therefore skipped.
    """
    score, x, y = _peak(heat)
    empty = score <= 0
    if heat.device.type != "cpu":  # boolean indexing would synchronise with the host
        found = zip(_peak(_suppress(heat)), (score, x, y), strict=True)
        score, x, y = (torch.where(empty, a, b) for a, b in found)
    elif empty.any():
        score[empty], x[empty], y[empty] = (v[0] for v in _peak(_suppress(heat[empty][None])))
    rises = [_neighbour(heat, x, y, a, 1) > _neighbour(heat, x, y, a, -1) for a in (3, 2)]
    steps = torch.where(torch.stack(rises, dim=-1), 0.75, 0.25)
    joints = torch.stack([x, y], dim=-1).float()
    return joints + steps * (score > 0)[..., None], score


def _suppress(heat_NJHW: Tensor) -> Tensor:
    """The maps with zeros where a pixel is not the maximum of its 3 x 3 neighbourhood."""
    return heat_NJHW * (torch.nn.functional.max_pool2d(heat_NJHW, 3, 1, 1) == heat_NJHW)
