"""PCKh: the share of joints within a fraction of the head length, by each definition in use.

Errors are distances in image px divided by `normalize`. The errors of joints that are not marked,
and of people without a known `normalize`, are NaN and do not count.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.skeleton import PIXELS_PER_SCALE, Skeleton, length_in_words
from pipelines.annotations import People

Floats = npt.NDArray[np.float64]

THRESHOLDS = (0.5, 0.1)
_CURVE_THRESHOLDS = np.linspace(0.0, 0.5, 51)
_SIZES = 5
_QUARTILES = (0.25, 0.5, 0.75)
_PERCENTILES = tuple(i / 100 for i in range(101))


def normalized_errors(keypoints_NJ2: npt.NDArray, people: People) -> Floats:
    """(N, J) distances from the annotation over `normalize`; NaN where a joint does not count."""
    assert keypoints_NJ2.shape == people.joints.shape
    distance = np.linalg.norm(keypoints_NJ2 - people.joints, axis=-1)
    length_N1 = people.normalize[:, None]
    return distance / np.where(people.marked & (length_N1 > 0), length_N1, np.nan)


def rates(errors_NJ: Floats, threshold: float, inclusive: bool) -> tuple[Floats, npt.NDArray]:
    """(J,) shares of errors below the threshold, and (J,) numbers of joints that counted.

    inclusive: whether an error equal to the threshold is correct (HRNet, mmpose) or not (princeton,
    bearpaw). The rate of a joint that never counts is NaN.
    """
    counts = np.isfinite(errors_NJ).sum(axis=0)
    with np.errstate(invalid="ignore"):
        correct = errors_NJ <= threshold if inclusive else errors_NJ < threshold
        return correct.sum(axis=0) / np.where(counts > 0, counts, np.nan), counts


class Score(NamedTuple):
    """PCKh at one threshold. All rates are in 0..1."""

    pooled: float
    """Over all joints of all people together, `<` (princeton-vl: 16 joints)."""
    unweighted: float
    """Mean of the rates of the joints that belong to a group, `<` (bearpaw, anibali: 14 joints)."""
    weighted: float
    """Their mean weighted by how often each joint counts, `<=` (HRNet, mmpose: 14 joints)."""
    groups: dict[str, float]
    """Mean of the rates of a group's joints, `<=`, by name."""
    joints: tuple[float, ...]
    """(J,) rates, `<`."""


def score(errors_NJ: Floats, skeleton: Skeleton, threshold: float) -> Score:
    """Every mean of PCKh at a threshold."""
    strict, counts = rates(errors_NJ, threshold, inclusive=False)
    loose, _ = rates(errors_NJ, threshold, inclusive=True)
    grouped = sorted({joint for _, joints in skeleton.groups for joint in joints})
    return Score(
        pooled=_mean(strict, counts),
        unweighted=_mean(strict[grouped]),
        weighted=_mean(loose[grouped], counts[grouped]),
        groups={name: _mean(loose[list(joints)]) for name, joints in skeleton.groups},
        joints=tuple(strict.tolist()),
    )


def _mean(values: Floats, weights: npt.NDArray | None = None) -> float:
    """Weighted mean without NaN values; by default all weights are equal."""
    weights = np.isfinite(values) if weights is None else weights
    total = weights.sum()
    return float(np.nansum(values * weights) / total) if total else float("nan")


def auc(errors_NJ: Floats) -> float:
    """Area under the curve of the pooled PCKh over thresholds 0..0.5, divided by 0.5."""
    errors = errors_NJ[np.isfinite(errors_NJ)]
    if not errors.size:
        return float("nan")
    found = np.searchsorted(np.sort(errors), _CURVE_THRESHOLDS, side="left") / errors.size
    return float(np.trapezoid(found, _CURVE_THRESHOLDS) / _CURVE_THRESHOLDS[-1])


def details(parts: dict[str, Floats], skeleton: Skeleton) -> dict[str, Any]:
    """Rates and counts of every joint (`<`) and every group of joints (`<=`), by name.

    parts: (N, J) errors of all, visible and occluded joints. A group's rate is the mean of its
    joints' rates, as in Score.groups; its AUC is pooled.
    """
    singles = [(name, (j,)) for j, name in enumerate(skeleton.names)]
    return {
        "joints": {name: _detail(parts, joints, False) for name, joints in singles},
        "groups": {name: _detail(parts, joints, True) for name, joints in skeleton.groups},
    }


def _detail(parts: dict[str, Floats], joints: tuple[int, ...], inclusive: bool) -> dict[str, Any]:
    mine = {name: errors[:, list(joints)] for name, errors in parts.items()}

    def rate(name: str, threshold: float) -> float:
        return _mean(rates(mine[name], threshold, inclusive)[0])

    return {
        "counts": {name: int(np.isfinite(errors).sum()) for name, errors in mine.items()},
        **{str(threshold): rate("all", threshold) for threshold in THRESHOLDS},
        "auc": auc(mine["all"]),
        "visible": rate("visible", THRESHOLDS[0]),
        "occluded": rate("occluded", THRESHOLDS[0]),
        "error_quartiles": _quantiles(mine["all"], _QUARTILES),
    }


def _quantiles(errors: Floats, shares: Sequence[float]) -> list[float]:
    known = errors[np.isfinite(errors)]
    return np.quantile(known, shares).tolist() if known.size else [float("nan")] * len(shares)


def curves(errors_NJ: Floats, skeleton: Skeleton) -> dict[str, Any]:
    """Rates over thresholds 0..0.5: pooled, and of every group and joint by name.

    Computed by `score`, so that they agree with its values at 0.5 and 0.1.
    """
    scores = [score(errors_NJ, skeleton, threshold) for threshold in _CURVE_THRESHOLDS.tolist()]
    return {
        "thresholds": [round(threshold, 2) for threshold in _CURVE_THRESHOLDS.tolist()],
        "pooled": [at.pooled for at in scores],
        "groups": {name: [at.groups[name] for at in scores] for name, _ in skeleton.groups},
        "joints": {n: [at.joints[j] for at in scores] for j, n in enumerate(skeleton.names)},
    }


def person_errors(errors_NJ: Floats) -> Floats:
    """(N,) mean error of each person's joints; NaN for people without a joint that counts."""
    counts = np.isfinite(errors_NJ).sum(axis=1)
    return np.nansum(errors_NJ, axis=1) / np.where(counts > 0, counts, np.nan)


def by_size(errors_NJ: Floats, people: People) -> list[dict[str, Any]]:
    """Fifths of the people by the side of their box, smallest first; pooled rates with `<`.

    Only people with a joint that counts. With fewer than five people there are fewer bins.
    """
    side = PIXELS_PER_SCALE * people.scale
    known = np.flatnonzero(np.isfinite(errors_NJ).any(axis=1))
    order = known[np.argsort(side[known], kind="stable")]
    return [
        {
            "from_px": float(side[rows[0]]),
            "to_px": float(side[rows[-1]]),
            "people": len(rows),
            "joints_counted": int(np.isfinite(errors_NJ[rows]).sum()),
            **{str(t): _mean(*rates(errors_NJ[rows], t, inclusive=False)) for t in THRESHOLDS},
            "error_quartiles": _quantiles(errors_NJ[rows], _QUARTILES),
        }
        for rows in np.array_split(order, _SIZES)
        if len(rows)
    ]


def summary(keypoints_NJ2: npt.NDArray, people: People, skeleton: Skeleton) -> dict[str, Any]:
    """All numbers of an evaluation as plain values: what evaluate.py prints and writes."""
    errors = normalized_errors(keypoints_NJ2, people)
    counts = np.isfinite(errors).sum(axis=0)
    parts = {
        "all": errors,
        "visible": np.where(people.visible, errors, np.nan),
        "occluded": np.where(people.visible, np.nan, errors),
    }
    values = {
        "people": people.count,
        "metric": skeleton.metric,
        "length": length_in_words(skeleton),
        "truth_sha256": truth_sha256(people),
        "people_scored": int(people.scored.sum()),
        "joints_counted": int(counts.sum()),
        "joint_names": list(skeleton.names),
        "joint_counts": counts.tolist(),
        "pckh": {str(t): score(errors, skeleton, t)._asdict() for t in THRESHOLDS},
        "auc": auc(errors),
    }
    for name in ("visible", "occluded"):
        pooled = score(parts[name], skeleton, 0.5).pooled
        values[name] = {"pooled": pooled, "joints_counted": int(np.isfinite(parts[name]).sum())}
    pixels = errors * people.normalize[:, None]
    values["pixels"] = {"mean": _mean(pixels), "median": _quantiles(pixels, [0.5])[0]}
    values |= {
        "details": details(parts, skeleton),
        "curves": curves(errors, skeleton),
        "by_size": by_size(errors, people),
        "person_error_percentiles": _quantiles(person_errors(errors), _PERCENTILES),
    }
    return json_values(values)


def truth_sha256(people: People) -> str:
    """SHA-256 of the ground truth: pictures, marked joints and lengths, in any order.

    Joints and lengths as float32, as shards store them. Boxes and visibility are left out, because
    no error depends on them.
    """
    joints = np.where(people.marked[..., None], people.joints, 0).astype("<f4")
    rows = zip(people.images, people.marked, joints, people.normalize.astype("<f4"), strict=True)
    digests = []
    for picture, *arrays in rows:
        name = picture.encode("utf-8", "backslashreplace")
        data = b"".join(array.tobytes() for array in arrays)
        digests.append(hashlib.sha256(name + b"\0" + data).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def json_values(value: Any) -> Any:
    """Nested values for JSON: None instead of NaN, lists instead of tuples."""
    if isinstance(value, dict):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [json_values(item) for item in value]
    return None if value != value else value


def mean_pose(people: People) -> Floats:
    """(N, J, 2) image px: for each person the mean pose of the others, in the person's box.

    The mean is over marked joints, relative to each box. Needs no picture.
    """
    box = PIXELS_PER_SCALE * people.scale[:, None, None]
    weight = people.marked[..., None]
    in_box = (people.joints - people.center[:, None]) / box * weight
    pose = (in_box.sum(axis=0) - in_box) / np.maximum(weight.sum(axis=0) - weight, 1)
    return people.center[:, None] + pose * box
