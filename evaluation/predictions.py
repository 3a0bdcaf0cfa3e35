"""Reads and writes prediction files: our JSON, COCO keypoint results, .mat, MPII's submission.

Keypoints are in px of the original pictures. Picture names and numbers are the annotation's.
"""

import csv
import faulthandler
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import LARGEST_JSON, read_bytes, read_json, write_atomic
from common.system import optional_module
from evaluation.pckh import Floats
from pipelines.annotations import People

Entries = list[dict[str, Any]]

_COORDINATES = ("x", "y", "likelihood")
HEAD_BOX_SHARE = 0.6
"""MPII's head length is this share of the head box's diagonal (its evaluation toolkit, SC_BIAS)."""


class FilePredictions(NamedTuple):
    """Predictions from a file, and the ground truth if the file contains one."""

    keypoints_NJ2: Floats
    scores_N: Floats | None
    """Of the people; None if the file has none."""
    truth: People | None
    scores_NJ: Floats | None = None
    """Of the joints; None if the file has none."""


def read_predictions(path: Path, people: People) -> FilePredictions:
    """Predictions for all people of an annotation, in its order. Raises InputError.

    `.mat`: `preds` (N, J, 2), or the layout of detections_our_format.mat. Other files: the JSON of
    --save-predictions, or COCO keypoint results.
    """
    if not path.is_file():
        raise InputError(path, "no such file", "a .json or .mat of predictions", "give its path")
    predicted = _read_mat(path, people) if path.suffix == ".mat" else _read_json(path, people)
    if not np.isfinite(predicted.keypoints_NJ2).all():
        raise _mismatch(path, people, "coordinates that are not finite numbers")
    return predicted


def _mismatch(path: Path, people: People, found: str) -> InputError:
    wanted = f"predictions of {people.count} people with {people.joints.shape[1]} joints each"
    return InputError(path, found, wanted, "give the file that belongs to this annotation")


def _read_json(path: Path, people: People) -> FilePredictions:
    try:
        entries = read_json(path)
    except ValueError as error:
        raise _mismatch(path, people, f"no JSON ({error})") from error
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    rows = _rows(entries, people) if is_list else []
    if not rows or not all(isinstance(entry.get("keypoints"), list) for entry in entries):
        need = "row and image, or image_id, and annotation_id where people share a picture"
        raise _mismatch(path, people, f"no list of keypoints, with {need}, for each person")
    try:
        values = np.array([entry["keypoints"] for entry in entries], dtype=np.float64)
        keypoints = values.reshape(*people.joints.shape[:2], 3)
        own = zip(entries, keypoints[..., 2].mean(axis=1), strict=True)
        scores = np.array([entry.get("score", mean) for entry, mean in own], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _mismatch(path, people, f"keypoints or a score of other values ({error})") from error
    order = np.argsort(rows)
    joints = keypoints[order]
    return FilePredictions(joints[..., :2], scores[order], None, joints[..., 2])


def _rows(entries: Entries, people: People) -> list[int]:
    """For each entry the row of its person; [] unless every person has exactly one entry.

    Uses the first fields that identify all people: those of our files, of COCO results as `as_coco`
    writes them, image_id of pictures with one person each, or image_id as the row.
    """
    candidates: list[tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]] = [
        (("row", "image"), enumerate(people.images)),
        (("image_id", "annotation_id"), _person_keys(people)),
        (("image_id",), zip(people.index.tolist(), strict=True)),
        (("image_id",), zip(range(people.count), strict=True)),
    ]
    for fields, known in candidates:
        rows = {key: row for row, key in enumerate(known)}
        if all(isinstance(entry.get(field), int | str) for entry in entries for field in fields):
            found = [rows.get(tuple(entry[field] for field in fields), -1) for entry in entries]
            if sorted(found) == list(range(people.count)):
                return found
    return []


def _read_mat(path: Path, people: People) -> FilePredictions:
    """`preds` (N, J, 2); or (J, 2, N) `pos_pred_src`, with optional ground truth: (J, 2, N)
    `pos_gt_src`, (J, N) `jnt_missing` and (2, 2, N) corners of head boxes `headboxes_src`.
    """
    count, joints = people.joints.shape[:2]
    shapes = {
        "preds": (count, joints, 2),
        "pos_pred_src": (joints, 2, count),
        "pos_gt_src": (joints, 2, count),
        "jnt_missing": (joints, count),
        "headboxes_src": (2, 2, count),
    }
    mat = open_mat(path, list(shapes), "a .mat of predictions")

    def array(name: str) -> Floats:
        value = np.asarray(mat.get(name))  # an object if it is missing or sparse
        if name == "preds" and value.ndim == 3:
            value = value[..., :2]
        if value.dtype.kind not in "biuf" or value.shape != shapes[name]:
            raise _mismatch(path, people, f"no {name} with numbers of the shape {shapes[name]}")
        return value.astype(np.float64)

    if "preds" in mat:
        return FilePredictions(array("preds"), None, None)
    keypoints = array("pos_pred_src").transpose(2, 0, 1)
    if "pos_gt_src" not in mat:
        return FilePredictions(keypoints, None, None)
    box, marked = array("headboxes_src"), array("jnt_missing").T == 0
    truth = people._replace(
        joints=array("pos_gt_src").transpose(2, 0, 1),
        marked=marked,
        visible=people.visible & marked,
        normalize=HEAD_BOX_SHARE * np.linalg.norm(box[1] - box[0], axis=0),
    )
    return FilePredictions(keypoints, None, truth)


def as_entries(people: People, keypoints_NJ2: Floats, scores_NJ: Floats) -> Entries:
    """Our JSON: a dict for each person, in the annotation's order; keypoints [x, y, score], px."""
    joined = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=-1)
    return [
        {"image": image, "row": row, "keypoints": joined[row].tolist()}
        for row, image in enumerate(people.images)
    ]


def as_coco(people: People, keypoints_NJ2: Floats, scores_NJ: Floats) -> Entries:
    """COCO keypoint results in the annotation's order; score is the mean over joints.

    image_id is the picture's number in the annotation file (in COCO's files its id), annotation_id
    the person's. If the annotation has no such numbers, image_id is the row.
    """
    ids = _person_keys(people)
    has_ids = min(map(min, ids)) >= 0 and len(set(ids)) == people.count
    joined = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=-1)
    return [
        {
            **({"image_id": image, "annotation_id": person} if has_ids else {"image_id": row}),
            "category_id": 1,
            "keypoints": joined[row].ravel().tolist(),
            "score": float(scores_NJ[row].mean()),
        }
        for row, (image, person) in enumerate(ids)
    ]


def deeplabcut_table(entries: Entries, joints: Sequence[str], scorer: str, frames: int) -> str:
    """CSV in the columns of DeepLabCut's results: x, y (px), likelihood of each joint by frame.

    entries: with `frame`, `person` and `keypoints`. Several people have the row `individuals`, and
    a person who is not in a frame has empty cells there.
    """
    people = sorted({entry["person"] for entry in entries}) or [0]
    columns = [(f"individual{p}", j, c) for p in people for j in joints for c in _COORDINATES]
    levels = zip(("individuals", "bodyparts", "coords"), zip(*columns, strict=True), strict=True)
    header = [["scorer", *[scorer] * len(columns)], *([name, *level] for name, level in levels)]
    if len(people) == 1:
        del header[1]
    cells = {(e["frame"], e["person"]): np.ravel(e["keypoints"]).round(4).tolist() for e in entries}
    absent = [""] * (len(columns) // len(people))
    rows = [[n, *(v for p in people for v in cells.get((n, p), absent))] for n in range(frames)]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([*header, *rows])
    return file.getvalue()


def open_mat(path: Path, names: list[str], expected: str) -> dict[str, Any]:
    """The named variables of a .mat file. Raises InputError; expected: for its message."""
    scipy_io = optional_module("scipy.io", path)
    try:
        data = io.BytesIO(read_bytes(path, LARGEST_JSON))
        pid = os.fork()  # SciPy's parser crashes on some damaged elements (scipy/scipy#25829)
        if pid == 0:
            faulthandler.disable()  # the parent reports a crash
            try:
                scipy_io.loadmat(data, variable_names=names)
            finally:
                os._exit(0)
        if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            raise ValueError("SciPy crashes on it")
        return scipy_io.loadmat(data, variable_names=names)
    except FileNotFoundError as error:
        raise InputError(path, "no such file", expected, "give its path") from error
    except (scipy_io.matlab.MatReadError, zlib.error, ArithmeticError, LookupError, MemoryError,
            NameError, OSError, RuntimeError, TypeError, ValueError) as error:  # fmt: skip
        found = f"not readable as .mat ({str(error)[:120]})"
        raise InputError(path, found, expected, "fetch the file again") from error


def write_mat(path: Path, variables: dict[str, Any]) -> None:
    """Write a .mat file atomically. Raises InputError without SciPy."""
    scipy_io = optional_module("scipy.io", path)
    file = io.BytesIO()
    scipy_io.savemat(file, variables, long_field_names=True, do_compression=True)
    write_atomic(path, file.getvalue())


class MpiiRelease(NamedTuple):
    """The test set in MPII's annotation file mpii_human_pose_v1_u12_1.mat. Numbers from 0."""

    annolist: npt.NDArray[Any]
    """(P,) structs of all pictures."""
    test_pictures: list[int]
    single_people: set[tuple[int, int]]
    """(picture, person) of all people who are evaluated."""
    all_people: set[tuple[int, int]]
    """(picture, person) of all people in the pictures of the test set."""


def read_release(path: Path, people: People) -> MpiiRelease:
    """Read MPII's annotation file, and check that `people` are those of its test set.

    people: `index` and `person` are their numbers in the file, from 0, as in princeton-vl's
    test.h5. Raises InputError if a person is missing, repeated, or not in the test set.
    """
    release, counts = _read_release(path), Counter(_person_keys(people))
    faults = {
        "missing": release.single_people - counts.keys(),
        "not in the test set": counts.keys() - release.all_people,
        "repeated": {key for key, count in counts.items() if count > 1},
    }
    found = [
        f"{len(keys):,} {fault} (first: picture {min(keys)[0]}, person {min(keys)[1]})"
        for fault, keys in faults.items()
        if keys
    ]
    if found:
        expected = f"each of the {len(release.single_people):,} single people of the test set once"
        advice = "predict the people of a test.h5 whose index and person count from 0 in this file"
        raise InputError(path, f"predicted people: {'; '.join(found)}", expected, advice)
    return release


def _person_keys(people: People) -> list[tuple[int, int]]:
    return list(zip(people.index.tolist(), people.person.tolist(), strict=True))


def _read_release(path: Path) -> MpiiRelease:
    expected = "a struct RELEASE with annolist, img_train and single_person"
    mat = open_mat(path, ["RELEASE"], expected)

    def array(value: Any, kinds: str) -> npt.NDArray[Any]:
        if np.asarray(value).dtype.kind not in kinds:
            raise ValueError("a field of another type")
        return value.ravel()

    try:
        release = array(mat["RELEASE"], "V")[0]
        annolist = array(release["annolist"], "V")
        single = array(release["single_person"], "O")
        is_train = array(release["img_train"], "biuf")
        if not len(annolist) == len(single) == len(is_train):
            raise ValueError("fields of different lengths")
        pictures = np.flatnonzero(is_train == 0).tolist()
        single_people = {(i, int(k) - 1) for i in pictures for k in array(single[i], "biuf")}
        sizes = {i: array(annolist[i]["annorect"], "Vbiuf").size for i in pictures}
    except (LookupError, ValueError, OverflowError) as error:  # int(inf)
        advice = "give mpii_human_pose_v1_u12_1.mat from MPII's web site"
        raise InputError(path, f"no annotation of MPII ({error})", expected, advice) from error
    all_people = {(i, person) for i in pictures for person in range(sizes[i])}
    return MpiiRelease(annolist, pictures, single_people, all_people)


def write_submission(
    path: Path, release: MpiiRelease, people: People, keypoints_NJ2: Floats
) -> int:
    """Write pred_keypoints_mpii.mat for MPII's test server; returns the number of people in it.

    Its `pred` is RELEASE.annolist(RELEASE.img_train == 0) with annopoints.point(k).x, .y, .id for
    each person of RELEASE.single_person (instructions on human-pose.mpi-inf.mpg.de).
    keypoints_NJ2: image px. Other people of the test set are left out.
    """
    single = release.single_people
    rows = {key: row for row, key in enumerate(_person_keys(people)) if key in single}
    pictures = release.annolist[release.test_pictures].copy()
    for entry, number in zip(pictures, release.test_pictures, strict=True):
        rects = entry["annorect"]
        present = rects.dtype.names or ()
        names = [*present, *({"annopoints"} - {*present})]
        filled = np.empty(rects.size, dtype=[(name, object) for name in names])
        for person, rect in enumerate(rects.ravel()):
            for name in names:
                filled[person][name] = rect[name] if name in present else np.empty((0, 0))
            if (number, person) in rows:
                filled[person]["annopoints"] = _points(keypoints_NJ2[rows[number, person]])
        entry["annorect"] = filled.reshape(rects.shape)
    write_mat(path, {"pred": pictures[None]})
    return len(rows)


def _points(keypoints_J2: Floats) -> npt.NDArray[Any]:
    """A struct annopoints with its point(k); ids count from 0."""
    kind = [("x", object), ("y", object), ("id", object)]
    points = np.array([(x, y, float(j)) for j, (x, y) in enumerate(keypoints_J2)], dtype=kind)
    return np.array([[(points[None],)]], dtype=[("point", object)])
