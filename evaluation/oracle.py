"""The best PCKh that a way of cropping and decoding allows: what perfect heatmaps come back as."""

import numpy as np
import numpy.typing as npt
import torch

from configs.skeleton import Skeleton
from pipelines import geometry, heatmaps, princeton
from pipelines.annotations import People
from pipelines.augment import Draw, draws_array
from pipelines.geometry import STRIDE

_PEOPLE_AT_A_TIME = 256


def oracle_keypoints(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    """(N, J, 2) image px: the annotation rendered as heatmaps and decoded again, without pictures.

    `princeton` crops, truncates and projects back by its own rules; the others by our affine.
    """
    way = _princeton_way if rule == "princeton" else _affine_way
    parts = [
        way(people.select(np.arange(start, min(start + _PEOPLE_AT_A_TIME, people.count))), skeleton,
            rule, input_px)
        for start in range(0, people.count, _PEOPLE_AT_A_TIME)
    ]  # fmt: skip
    return np.concatenate(parts)


def _affine_way(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    to_heat = heatmaps.heat_from_input(rule)
    heat_from_image = np.stack([
        to_heat @ geometry.input_from_image(center, float(scale), input_px)
        for center, scale in zip(people.center, people.scale, strict=True)
    ])  # fmt: skip
    joints = geometry.transform(heat_from_image, people.joints)
    decoded = _there_and_back(torch.from_numpy(joints), people, rule, input_px)
    return geometry.transform(np.linalg.inv(heat_from_image), decoded)


def _princeton_way(
    people: People, skeleton: Skeleton, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    heat_px = input_px // STRIDE
    joints, _ = princeton.heat_joints(
        torch.from_numpy(people.joints),
        torch.from_numpy(people.center),
        torch.from_numpy(people.scale),
        torch.from_numpy(draws_array([Draw()] * people.count)),
        torch.tensor(skeleton.mirrored),
        input_px,
        heat_px,
    )
    decoded = _there_and_back(joints, people, rule, input_px)
    return princeton.image_points(decoded, people.center, people.scale, input_px, heat_px)


def _there_and_back(
    joints_NJ2: torch.Tensor, people: People, rule: heatmaps.Rule, input_px: int
) -> npt.NDArray[np.float64]:
    """Rendered with the rule's usual sigma, and decoded."""
    sigma = 2.0 if rule == "hrnet" else 1.0
    marked = torch.from_numpy(people.marked)
    heat = heatmaps.render(joints_NJ2, marked, input_px // STRIDE, rule, sigma)
    return heatmaps.decode(heat, rule)[0].double().numpy()
