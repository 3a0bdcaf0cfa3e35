"""PCKh: the share of joints found within a fraction of the head length, by each definition in use.

Errors are distances in image px divided by `normalize`. Joints that are not marked, and people
without a known `normalize`, are NaN and never count.
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
    """(N, J) distances from the annotation over `normalize`; NaN where nothing counts."""
    if keypoints_NJ2.shape != people.joints.shape:
        raise ValueError(f"keypoints {keypoints_NJ2.shape}, annotation {people.joints.shape}")
    distance = np.linalg.norm(keypoints_NJ2 - people.joints, axis=-1)
    counts = people.marked & (people.normalize > 0)[:, None]
    length = np.where(people.normalize > 0, people.normalize, 1.0)[:, None]
    return np.where(counts, distance / length, np.nan)


def rates(errors_NJ: Floats, threshold: float, inclusive: bool) -> tuple[Floats, npt.NDArray]:
    """Per joint the share of errors below the threshold (J,) and how many counted (J,).

    inclusive: an error equal to the threshold counts as found (HRNet, mmpose) or not (princeton,
    bearpaw). A joint that never counts has the rate NaN.
    """
    counts = np.isfinite(errors_NJ).sum(axis=0)
    with np.errstate(invalid="ignore"):
        found = errors_NJ <= threshold if inclusive else errors_NJ < threshold
        return found.sum(axis=0) / np.where(counts > 0, counts, np.nan), counts


class Score(NamedTuple):
    """PCKh at one threshold. All rates are in 0..1."""

    pooled: float
    """All joints of all people in one pool, `<` (princeton-vl: 16 joints)."""
    unweighted: float
    """Mean of the rates of the joints in groups, `<` (bearpaw, anibali: 14 joints)."""
    weighted: float
    """The same weighted by how often each joint counts, `<=` (HRNet, mmpose: 14 joints)."""
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
        unweighted=_mean(strict[grouped], (counts[grouped] > 0).astype(float)),
        weighted=_mean(loose[grouped], counts[grouped]),
        groups={
            name: _mean(loose[list(joints)], (counts[list(joints)] > 0).astype(float))
            for name, joints in skeleton.groups
        },
        joints=tuple(strict.tolist()),
    )


def _mean(values: Floats, weights: npt.NDArray) -> float:
    total = weights.sum()
    return float(np.nansum(values * weights) / total) if total else float("nan")


def auc(errors_NJ: Floats) -> float:
    """Area under the pooled PCKh over thresholds 0..0.5, as a share of the whole."""
    errors = errors_NJ[np.isfinite(errors_NJ)]
    if not errors.size:
        return float("nan")
    found = np.searchsorted(np.sort(errors), _CURVE_THRESHOLDS, side="left") / errors.size
    return float(np.trapezoid(found, _CURVE_THRESHOLDS) / _CURVE_THRESHOLDS[-1])


def details(errors_NJ: Floats, visible_NJ: npt.NDArray, skeleton: Skeleton) -> dict[str, Any]:
    """Rates and counts of every joint (`<`) and every group of joints (`<=`), by name.

    A group's rate is the mean of its joints' rates, as in Score.groups; its AUC is pooled.
    """
    parts = {
        "all": errors_NJ,
        "visible": np.where(visible_NJ, errors_NJ, np.nan),
        "occluded": np.where(visible_NJ, np.nan, errors_NJ),
    }
    singles = [(name, (j,)) for j, name in enumerate(skeleton.names)]
    return {
        "joints": {name: _detail(parts, joints, False) for name, joints in singles},
        "groups": {name: _detail(parts, joints, True) for name, joints in skeleton.groups},
    }


def _detail(parts: dict[str, Floats], joints: tuple[int, ...], inclusive: bool) -> dict[str, Any]:
    mine = {name: errors[:, list(joints)] for name, errors in parts.items()}

    def rate(name: str, threshold: float) -> float:
        values, counts = rates(mine[name], threshold, inclusive)
        return _mean(values, (counts > 0).astype(float))

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

    They are those of `score`, with its signs, so that they meet the table at 0.5 and 0.1.
    """
    scores = [score(errors_NJ, skeleton, threshold) for threshold in _CURVE_THRESHOLDS.tolist()]
    return {
        "thresholds": [round(threshold, 2) for threshold in _CURVE_THRESHOLDS.tolist()],
        "pooled": [at.pooled for at in scores],
        "groups": {name: [at.groups[name] for at in scores] for name, _ in skeleton.groups},
        "joints": {n: [at.joints[j] for at in scores] for j, n in enumerate(skeleton.names)},
    }


def person_errors(errors_NJ: Floats) -> Floats:
    """(N,) mean error of each person's joints; NaN where none counts."""
    counts = np.isfinite(errors_NJ).sum(axis=1)
    return np.nansum(errors_NJ, axis=1) / np.where(counts > 0, counts, np.nan)


def by_size(errors_NJ: Floats, people: People) -> list[dict[str, Any]]:
    """Fifths of the people by the side of their box, smallest first; pooled rates with `<`.

    Only people of whom a joint counts. With fewer than five people there are fewer bins.
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
            **{str(t): _pooled(errors_NJ[rows], t) for t in THRESHOLDS},
            "error_quartiles": _quantiles(errors_NJ[rows], _QUARTILES),
        }
        for rows in np.array_split(order, _SIZES)
        if len(rows)
    ]


def _pooled(errors_NJ: Floats, threshold: float) -> float:
    return _mean(*rates(errors_NJ, threshold, inclusive=False))


def summary(keypoints_NJ2: npt.NDArray, people: People, skeleton: Skeleton) -> dict[str, Any]:
    """Everything that evaluate.py prints and writes, as plain values."""
    errors = normalized_errors(keypoints_NJ2, people)
    _, counts = rates(errors, 0.5, inclusive=False)
    visible = np.where(people.visible, errors, np.nan)
    occluded = np.where(people.visible, np.nan, errors)
    return plain({
        "people": people.count,
        "metric": skeleton.metric,
        "length": length_in_words(skeleton),
        "truth_sha256": truth_sha256(people),
        "people_without_length": int((people.normalize <= 0).sum()),
        "joints_counted": int(counts.sum()),
        "joint_names": list(skeleton.names),
        "joint_counts": counts.tolist(),
        "pckh": {
            str(threshold): score(errors, skeleton, threshold)._asdict()
            for threshold in THRESHOLDS
        },
        "auc": auc(errors),
        "visible": {
            "pooled": score(visible, skeleton, 0.5).pooled,
            "joints_counted": int(np.isfinite(visible).sum()),
        },
        "occluded": {
            "pooled": score(occluded, skeleton, 0.5).pooled,
            "joints_counted": int(np.isfinite(occluded).sum()),
        },
        "details": details(errors, people.visible, skeleton),
        "curves": curves(errors, skeleton),
        "by_size": by_size(errors, people),
        "person_error_percentiles": _quantiles(person_errors(errors), _PERCENTILES),
    })  # fmt: skip


def truth_sha256(people: People) -> str:
    """What predictions are scored against, in 64 hexadecimal digits; the order does not count.

    Pictures, marked joints and lengths, as float32, which is what shards keep. Boxes and visibility
    are left out: they say what the network was shown, and what is told apart, not what is right.
    """
    joints = np.where(people.marked[..., None], people.joints, 0).astype("<f4")
    rows = zip(people.images, people.marked, joints, people.normalize.astype("<f4"), strict=True)
    digests = [
        hashlib.sha256(
            picture.encode("utf-8", "backslashreplace") + b"\0" + b"".join(r.tobytes() for r in row)
        ).digest()
        for picture, *row in rows
    ]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def plain(value: Any) -> Any:
    """Nested values with None in place of NaN, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return None if value != value else value


def mean_pose(train: People, valid: People) -> Floats:
    """(N, J, 2) image px: for everybody in `valid` the mean pose of the boxes of `train`.

    The predictor that never looks at the picture. The mean is over marked joints, in units of the
    box.
    """
    box_train = PIXELS_PER_SCALE * train.scale[:, None, None]
    in_box = (train.joints - train.center[:, None]) / box_train
    weight = train.marked[..., None]
    pose = (in_box * weight).sum(axis=0) / np.maximum(weight.sum(axis=0), 1)
    box_valid = PIXELS_PER_SCALE * valid.scale[:, None, None]
    return valid.center[:, None] + pose * box_valid
