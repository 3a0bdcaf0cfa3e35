"""Measures what the heights of heatmaps' peaks mean, and how well a score predicts success.

A joint is correct if its error is below half of the length that errors are divided by.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE
from evaluation import pckh
from evaluation.inference import Predictions
from model.calibration import Calibration, Floats
from pipelines.annotations import People

_KNOTS = 10
_FEWEST = 100
_FOLDS = 5
_BINS = 15
"""Bins of the expected calibration error, as in Guo et al. 2017."""
_COVERAGES = np.linspace(0.01, 1.0, 100)


def calibrate(found: Predictions, people: People) -> tuple[Calibration, dict[str, Any]]:
    """The table for these people, and how good such tables are, by cross-validation.

    Each of the five folds is calibrated with the other four. Folds are runs of people in the
    annotation's order, so that people of one picture or video are mostly in the same fold. Raises
    InputError if too few joints count.
    """
    errors_NJ = pckh.normalized_errors(found.keypoints_NJ2, people)
    distances_NJ = errors_NJ * (people.normalize / (PIXELS_PER_SCALE * people.scale))[:, None]
    known = np.isfinite(errors_NJ)
    if known.sum() < _FEWEST:
        few, enough = f"{known.sum()} joints that count", f"{_FEWEST} or more"
        raise InputError("--calibrate", few, enough, "evaluate on more people")
    after_NJ = np.empty_like(errors_NJ)
    for fold in np.array_split(np.arange(people.count), _FOLDS):
        rest = np.setdiff1d(np.arange(people.count), fold)
        table = fit(found.scores_NJ[rest], errors_NJ[rest], distances_NJ[rest])
        after_NJ[fold] = table.probabilities(found.scores_NJ[fold])
    correct = errors_NJ[known] < 0.5
    before, after = np.clip(found.scores_NJ[known], 0, 1), after_NJ[known]
    facts: dict[str, Any] = {
        "folds": _FOLDS,
        "people": int(known.any(axis=1).sum()),
        "coverage": _COVERAGES.round(2).tolist(),
    }
    for name, measure in (("calibration_error", calibration_error), ("risk", risks)):
        facts[name] = {"before": measure(before, correct), "after": measure(after, correct)}
    return fit(found.scores_NJ, errors_NJ, distances_NJ), facts


def fit(scores_NJ: Floats, errors_NJ: Floats, distances_NJ: Floats) -> Calibration:
    """The table of these joints. errors: NaN where a joint does not count.

    distances: the errors in sides of the box. A joint that counts less often than _FEWEST times
    gets the table of all joints together.
    """
    known_NJ = np.isfinite(errors_NJ)
    tables = []
    for j, count in enumerate(known_NJ.sum(axis=0)):
        is_joint_J = np.arange(known_NJ.shape[1]) == j
        mask = known_NJ & is_joint_J if count >= _FEWEST else known_NJ
        tables.append(_fit_one(scores_NJ[mask], errors_NJ[mask] < 0.5, distances_NJ[mask]))
    return Calibration(*map(np.stack, zip(*tables, strict=True)))


def _fit_one(scores_M: Floats, correct_M: npt.NDArray, distances_M: Floats) -> tuple[Floats, ...]:
    """Peaks, probabilities and distances: means of bins of equally many joints, made monotone."""
    bins = np.array_split(np.argsort(scores_M, kind="stable"), _KNOTS)
    _, group_M, counts = np.unique(scores_M, return_inverse=True, return_counts=True)
    peaks, correct, distances = (
        # Of equal scores the mean is used, because bins may divide them.
        np.array([(np.bincount(group_M, values) / counts)[group_M][rows].mean() for rows in bins])
        for values in (scores_M, correct_M, distances_M)
    )
    return peaks, isotonic(correct), -isotonic(-distances)


def isotonic(values_K: Floats) -> Floats:
    """The rising sequence with the least squared distance from the values.

    The max-min formula (Robertson, Wright, Dykstra: Order Restricted Statistical Inference, 1988,
    theorem 1.4.4): the k-th element is the largest, over i <= k, of the least mean of i..j, j >= k.
    """
    all_k = range(len(values_K))
    return np.array(
        [
            max(min(values_K[i : j + 1].mean() for j in all_k[k:]) for i in all_k[: k + 1])
            for k in all_k
        ]
    )


def calibration_error(probability_M: Floats, correct_M: npt.NDArray) -> float:
    """Expected calibration error: the mean over joints of |mean probability - share correct| of
    their bin, of _BINS bins of equal width (Guo et al. 2017, equation 3)."""
    bins = np.minimum((probability_M * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, probability_M - correct_M)
    return float(np.abs(gaps).sum() / len(correct_M))


def risks(scores_M: Floats, correct_M: npt.NDArray) -> list[float]:
    """Share of wrong joints among those with the highest scores, for each of _COVERAGES."""
    wrong = ~correct_M[np.argsort(-scores_M, kind="stable")]
    counts = np.ceil(_COVERAGES * len(wrong)).astype(int)
    return (np.cumsum(wrong)[counts - 1] / counts).tolist()
