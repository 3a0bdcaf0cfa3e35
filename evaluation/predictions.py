"""Files of predictions, read and written: our JSON, COCO keypoint results, and `.mat`.

Keypoints are in px of the original pictures, people in the annotation's order. Where a file says
which picture a prediction is for, that is checked against the annotation.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from pipelines.annotations import People

_LARGEST_BYTES = 512 << 20
HEAD_BOX_SHARE = 0.6
"""MPII's head length is this share of the head box's diagonal (its evaluation toolkit, SC_BIAS)."""


class Predicted(NamedTuple):
    """Predictions from a file, and the ground truth if the file has its own."""

    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    truth: People | None


def read_predictions(path: Path, people: People) -> Predicted:
    """Predictions for everybody in an annotation. Raises InputError.

    `.mat`: the layout of detections_our_format.mat. `.json`: what evaluate.py saves, or COCO
    keypoint results, whose image_id is the person's row in the annotation.
    """
    if not path.is_file():
        raise InputError(path, "no such file", "a .json or .mat of predictions", "give its path")
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError(
            path, f"more than {_LARGEST_BYTES >> 20} MiB", "predictions", "give another file"
        )
    read = _read_mat if path.suffix == ".mat" else _read_json
    try:
        predicted = read(path, people)
        shape = predicted.keypoints_NJ2.shape
        if shape != people.joints.shape:
            raise ValueError(f"{shape[0]} people of {shape[1:]} values")
        if not np.isfinite(predicted.keypoints_NJ2).all():
            raise ValueError("coordinates that are not numbers")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            path,
            f"{type(error).__name__}: {error}",
            f"predictions of {people.count} people with {people.joints.shape[1]} joints each",
            "give the file that belongs to this annotation",
        ) from error
    return predicted


def _read_json(path: Path, people: People) -> Predicted:
    entries = json.loads(path.read_text())
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"a JSON {type(entries).__name__}")
    joints = people.joints.shape[1]
    if "image_id" in entries[0]:
        rows = [int(entry["image_id"]) for entry in entries]
    else:
        rows = [int(entry["index"]) for entry in entries]
        _check_names([str(entry["image"]) for entry in entries], rows, people)
    if sorted(rows) != list(range(people.count)):
        raise ValueError(f"{len(set(rows))} different people")
    keypoints = np.empty((people.count, joints, 2))
    for row, entry in zip(rows, entries, strict=True):
        values = np.array(entry["keypoints"], dtype=np.float64).reshape(-1, 3)
        if len(values) != joints:
            raise ValueError(f"row {row} has {len(values)} joints")
        keypoints[row] = values[:, :2]
    return Predicted(keypoints, None)


def _check_names(names: list[str], rows: list[int], people: People) -> None:
    for name, row in zip(names, rows, strict=True):
        if not 0 <= row < people.count or people.images[row] != name:
            raise ValueError(f"index {row} is not of {name}")


def _read_mat(path: Path, people: People) -> Predicted:
    """Arrays (J, 2, N) of positions, (J, N) of missing joints, (2, 2, N) of head boxes."""
    scipy_io = _scipy_io(path)
    names = ["pos_pred_src", "pos_gt_src", "jnt_missing", "headboxes_src"]
    try:
        mat = scipy_io.loadmat(path, variable_names=names)
    except Exception as error:  # SciPy raises a different type for each kind of damage
        raise ValueError(f"not readable as .mat ({error})") from error
    keypoints = np.asarray(mat["pos_pred_src"], dtype=np.float64).transpose(2, 0, 1)
    if "pos_gt_src" not in mat or len(keypoints) != people.count:
        return Predicted(keypoints, None)
    box = np.asarray(mat["headboxes_src"], dtype=np.float64)
    marked = np.asarray(mat["jnt_missing"]).T == 0
    truth = people._replace(
        joints=np.asarray(mat["pos_gt_src"], dtype=np.float64).transpose(2, 0, 1),
        marked=marked,
        visible=people.visible & marked,
        normalize=HEAD_BOX_SHARE * np.linalg.norm(box[1] - box[0], axis=0),
    )
    return Predicted(keypoints, truth)


def as_entries(
    people: People, keypoints_NJ2: npt.NDArray, scores_NJ: npt.NDArray
) -> list[dict[str, Any]]:
    """Our JSON: a dict a person, in the annotation's order; keypoints [x, y, score] in image px."""
    joined = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=-1)
    return [
        {"image": image, "index": row, "keypoints": joined[row].tolist()}
        for row, image in enumerate(people.images)
    ]


def as_coco(keypoints_NJ2: npt.NDArray, scores_NJ: npt.NDArray) -> list[dict[str, Any]]:
    """COCO keypoint results: image_id is the row in the annotation, score the mean over joints."""
    joined = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=-1)
    return [
        {
            "image_id": row,
            "category_id": 1,
            "keypoints": joined[row].ravel().tolist(),
            "score": float(scores_NJ[row].mean()),
        }
        for row in range(len(joined))
    ]


def write_mat(path: Path, keypoints_NJ2: npt.NDArray) -> None:
    """`preds` (N, J, 2) counted from 1, as HRNet's tools write it. Raises InputError."""
    scipy_io = _scipy_io(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        scipy_io.savemat(file, {"preds": keypoints_NJ2 + 1.0})
    temporary.rename(path)


def _scipy_io(path: Path) -> Any:
    """SciPy's module for .mat files; SciPy is not among the required packages."""
    try:
        import scipy.io
    except ImportError as error:
        raise InputError(
            path, "SciPy is not installed", "SciPy, for .mat files", "pip install scipy"
        ) from error
    return scipy.io
