"""Files of predictions, read and written: our JSON, COCO keypoint results, and `.mat`.

Keypoints are in px of the original pictures, people in the annotation's order. Where a file says
which picture a prediction is for, that is checked against the annotation.
"""

import io
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import LARGEST_JSON, read_json, write_atomic
from pipelines.annotations import People

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
    keypoint results (`_coco_rows` says how people are found again).
    """
    if not path.is_file():
        raise InputError(path, "no such file", "a .json or .mat of predictions", "give its path")
    read = _read_mat if path.suffix == ".mat" else _read_json
    try:
        predicted = read(path, people)
        shape = predicted.keypoints_NJ2.shape
        if shape != people.joints.shape:
            raise ValueError(f"{shape[0]} people of {shape[1:]} values")
        if not np.isfinite(predicted.keypoints_NJ2).all():
            raise ValueError("coordinates that are not numbers")
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            path,
            f"{type(error).__name__}: {error}",
            f"predictions of {people.count} people with {people.joints.shape[1]} joints each",
            "give the file that belongs to this annotation",
        ) from error
    return predicted


def _read_json(path: Path, people: People) -> Predicted:
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"a JSON {type(entries).__name__}")
    joints = people.joints.shape[1]
    if "image_id" in entries[0]:
        rows = _coco_rows(entries, people)
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


def _coco_rows(entries: list[dict[str, Any]], people: People) -> list[int]:
    """The person's row of each COCO result.

    By image_id and annotation_id as `as_coco` writes them; without annotation_id by the number of
    the picture where nobody shares one; where neither fits, image_id is the row itself.
    """
    pictures, persons = people.index.tolist(), people.person.tolist()
    keys: list[Any] = [int(entry["image_id"]) for entry in entries]
    own: list[Any] = pictures
    if all("annotation_id" in entry for entry in entries):
        keys = [(k, int(e["annotation_id"])) for k, e in zip(keys, entries, strict=True)]
        own = list(zip(pictures, persons, strict=True))
    rows = {key: row for row, key in enumerate(own)}
    if len(rows) == people.count and rows.keys() == set(keys):
        return [rows[key] for key in keys]
    if sorted(keys) == list(range(people.count)):
        return keys
    raise ValueError(
        "image_id (and annotation_id, which results need where people share a picture) are not "
        "those of the annotation"
    )


def _check_names(names: list[str], rows: list[int], people: People) -> None:
    for name, row in zip(names, rows, strict=True):
        if not 0 <= row < people.count or people.images[row] != name:
            raise ValueError(f"index {row} is not of {name}")


def _read_mat(path: Path, people: People) -> Predicted:
    """`preds` (N, J, 2); or arrays (J, 2, N) of positions, (J, N) of missing joints, (2, 2, N) of
    head boxes.
    """
    names = ["preds", "pos_pred_src", "pos_gt_src", "jnt_missing", "headboxes_src"]
    mat = open_mat(path, names, "a .mat of predictions")
    if "preds" in mat:
        return Predicted(np.asarray(mat["preds"], dtype=np.float64)[..., :2], None)
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


def as_coco(
    people: People, keypoints_NJ2: npt.NDArray, scores_NJ: npt.NDArray
) -> list[dict[str, Any]]:
    """COCO keypoint results in the annotation's order; score is the mean over joints.

    image_id is the picture's number in the annotation file, COCO's own for COCO's files, and
    annotation_id the person's, by which people who share a picture are told apart. A file without
    such numbers gives the row as image_id alone.
    """
    numbers = list(zip(people.index.tolist(), people.person.tolist(), strict=True))
    numbered = min(map(min, numbers)) >= 0 and len(set(numbers)) == people.count
    joined = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=-1)
    return [
        {
            **({"image_id": image, "annotation_id": person} if numbered else {"image_id": row}),
            "category_id": 1,
            "keypoints": joined[row].ravel().tolist(),
            "score": float(scores_NJ[row].mean()),
        }
        for row, (image, person) in enumerate(numbers)
    ]


def open_mat(path: Path, names: list[str], expected: str) -> dict[str, Any]:
    """These variables of a .mat file. Raises InputError. expected: what it should be, in words."""
    scipy_io = _scipy_io(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON >> 20} MiB")
        return scipy_io.loadmat(path, variable_names=names)
    except FileNotFoundError as error:
        raise InputError(path, "no such file", expected, "give its path") from error
    except Exception as error:  # SciPy raises a different type for each kind of damage
        raise InputError(
            path, f"not readable as .mat ({str(error)[:120]})", expected, "fetch the file again"
        ) from error


def write_mat(path: Path, variables: dict[str, Any]) -> None:
    """Write a .mat file whole or not at all. Raises InputError without SciPy."""
    scipy_io = _scipy_io(path)
    file = io.BytesIO()
    scipy_io.savemat(file, variables, long_field_names=True, do_compression=True)
    write_atomic(path, file.getvalue())


def _scipy_io(path: Path) -> Any:
    """SciPy's module for .mat files; SciPy is not among the required packages."""
    try:
        import scipy.io
    except ImportError as error:
        raise InputError(
            path, "SciPy is not installed", "SciPy, for .mat files", "pip install scipy"
        ) from error
    return scipy.io


class Release(NamedTuple):
    """What the annotation file says of the test set. Pictures and people count from 0 here."""

    annolist: npt.NDArray[Any]
    """(P,) structs of all pictures."""
    test_pictures: list[int]
    single_people: set[tuple[int, int]]
    """(picture, person) of everybody who is evaluated."""
    all_people: set[tuple[int, int]]
    """(picture, person) of everybody in the pictures of the test set."""


def read_release(path: Path, people: People) -> Release:
    """MPII's annotation file, once it is sure that these people can be submitted.

    people: those to predict; `index` and `person` say who they are in the file, from 0, as
    princeton-vl's test.h5 gives them. Raises InputError for people who are not in the test set, who
    are there twice, and where somebody is missing.
    """
    release = _read_release(path)
    check_people(_who(people), release, path)
    return release


def write_submission(
    path: Path, release: Release, people: People, keypoints_NJ2: npt.NDArray[np.float64]
) -> int:
    """Write the file and return how many people it holds.

    keypoints_NJ2: in the annotation's own coordinates, as everywhere here. People of the test set
    who are not evaluated are left out.
    """
    rows = {who: row for row, who in enumerate(_who(people)) if who in release.single_people}
    pictures = release.annolist[release.test_pictures].copy()
    for place, number in enumerate(release.test_pictures):
        rects = pictures[place]["annorect"]
        pictures[place]["annorect"] = _filled(rects, number, rows, keypoints_NJ2)
    write_mat(path, {"pred": pictures[None]})
    return len(rows)


def _who(people: People) -> list[tuple[int, int]]:
    return list(zip(people.index.tolist(), people.person.tolist(), strict=True))


def check_people(given: list[tuple[int, int]], release: Release, path: Path) -> None:
    """Raise InputError unless everybody who is evaluated was predicted exactly once."""
    counts = Counter(given)
    faults = {
        "missing": release.single_people - counts.keys(),
        "not in the test set": counts.keys() - release.all_people,
        "there twice": {who for who, count in counts.items() if count > 1},
    }
    found = [
        f"{len(who):,} {what} (first: picture {min(who)[0]}, person {min(who)[1]})"
        for what, who in faults.items()
        if who
    ]
    if found:
        raise InputError(
            path,
            f"predictions of {len(given):,} people, of whom " + "; ".join(found),
            f"each of the {len(release.single_people):,} single people of the test set once",
            "predict the people of a test.h5 whose index and person count from 0 in this file",
        )


def _read_release(path: Path) -> Release:
    mat = open_mat(path, ["RELEASE"], "MPII's mpii_human_pose_v1_u12_1.mat")
    try:
        release = mat["RELEASE"][0, 0]
        annolist = release["annolist"].ravel()
        is_test = release["img_train"].ravel() == 0
        single = release["single_person"].ravel()
        if not len(annolist) == len(is_test) == len(single) or not is_test.any():
            raise ValueError(f"{len(annolist)} pictures, {int(is_test.sum())} of them to test on")
        pictures = np.flatnonzero(is_test).tolist()
        return Release(
            annolist,
            pictures,
            {(i, int(person) - 1) for i in pictures for person in np.ravel(single[i])},
            {(i, p) for i in pictures for p in range(annolist[i]["annorect"].size)},
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            path,
            f"no annotation of MPII ({type(error).__name__}: {error})",
            "a struct RELEASE with annolist, img_train and single_person",
            "give mpii_human_pose_v1_u12_1.mat from MPII's web site",
        ) from error


def _filled(
    rects: npt.NDArray[Any],
    picture: int,
    rows: dict[tuple[int, int], int],
    keypoints_NJ2: npt.NDArray[np.float64],
) -> npt.NDArray[Any]:
    """The people of one picture, with the joints of those who were predicted."""
    names = list(rects.dtype.names or ())
    names += [] if "annopoints" in names else ["annopoints"]
    filled = np.empty(rects.shape, dtype=[(name, object) for name in names])
    for person, rect in enumerate(rects.ravel()):
        fields = [rect[n] if n in (rects.dtype.names or ()) else np.empty((0, 0)) for n in names]
        filled.reshape(-1)[person] = tuple(fields)
        if (picture, person) in rows:
            points = _points(keypoints_NJ2[rows[picture, person]])
            filled.reshape(-1)[person]["annopoints"] = points
    return filled


def _points(keypoints_J2: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """A struct annopoints with its point(k); ids count from 0."""
    kind = [("x", object), ("y", object), ("id", object)]
    points = np.array([(x, y, float(j)) for j, (x, y) in enumerate(keypoints_J2)], dtype=kind)
    return np.array([[(points[None],)]], dtype=[("point", object)])
