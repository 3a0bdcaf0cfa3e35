"""Which annotations disagree with predictions by networks that were not trained on them.

A score is the log-likelihood ratio (nats) of a kind of error against a right annotation, or
against another kind that is likelier. If the annotation of a joint is right, the prediction is near
it with the probability that a calibration gives for its peak; if it is wrong, with _CHANCE.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from evaluation.calibration import fit
from evaluation.inference import Predictions
from evaluation.pckh import Floats
from pipelines.annotations import People

KINDS = ("left and right swapped", "one joint misplaced", "wrong person")
_NEAR = 0.1
"""A prediction at most this far from an annotation is near it, in sides of the person's box."""
_CHANCE = 0.1
_CERTAIN = 0.98
"""Limit of the calibrated probability, so that one joint cannot outweigh all others."""


class LabelErrors(NamedTuple):
    """Of N people."""

    ratios_NK: Floats
    """Log-likelihood ratios of KINDS, nats."""
    kind_N: npt.NDArray[np.int64]
    """The kind with the largest ratio."""
    joint_N: npt.NDArray[np.int64]
    """The most likely wrong joint."""
    order: list[int]
    """The people, the most likely wrong first."""


def label_errors_of(found: Predictions, people: People, skeleton: Skeleton) -> LabelErrors:
    """How likely wrong each annotation is. found: by networks that did not train on the person."""
    flip, side_N1 = list(skeleton.flip_indices), PIXELS_PER_SCALE * people.scale[:, None]
    own, swapped = (
        np.linalg.norm(found.keypoints_NJ2 - people.joints[:, order], axis=2) / side_N1
        for order in (slice(None), flip)
    )
    own = np.where(people.marked, own, np.nan)
    swapped = np.where(people.marked & people.marked[:, flip], swapped, own)
    table = fit(found.scores_NJ, own * (0.5 / _NEAR), own)  # it takes errors below 0.5 as correct
    right_NJ = np.clip(table.probabilities(found.scores_NJ), 1 - _CERTAIN, _CERTAIN)
    own_NJ = _elsewhere(own, right_NJ)
    swap_N = (own_NJ - _elsewhere(swapped, right_NJ)).sum(axis=1)
    person_N, joint_N = own_NJ.sum(axis=1), own_NJ.argmax(axis=1)
    worst_N = own_NJ.max(axis=1)
    # One joint rather than none, all or swapped ones; wrong person rather than swapped ones.
    one_N = worst_N - np.maximum(0, np.maximum(person_N - worst_N, swap_N))
    other_N = person_N - np.maximum(0, swap_N)
    ratios_NK = np.stack([swap_N, one_N, other_N], axis=1)
    order = np.argsort(-ratios_NK.max(axis=1), kind="stable").tolist()
    return LabelErrors(ratios_NK, ratios_NK.argmax(axis=1), joint_N, order)


def _elsewhere(distances_NJ: Floats, right_NJ: Floats) -> Floats:
    """Log-likelihood ratio of a joint that is elsewhere; 0 where it is not marked (NaN)."""
    is_near = distances_NJ < _NEAR
    if_here = np.where(is_near, right_NJ, 1 - right_NJ)
    if_elsewhere = np.where(is_near, _CHANCE, 1 - _CHANCE)
    return np.where(np.isnan(distances_NJ), 0.0, np.log(if_elsewhere / if_here))
