"""The file that MPII's evaluation of the test set takes: pred_keypoints_mpii.mat.

It holds `pred`, which is `RELEASE.annolist(RELEASE.img_train == 0)` of MPII's own annotation file
(mpii_human_pose_v1_u12_1.mat) with `annopoints.point(k).x, .y, .id` filled in for every person of
`RELEASE.single_person` (the instructions on MPII's web site, human-pose.mpi-inf.mpg.de).
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from evaluation.predictions import open_mat, write_mat
from pipelines.annotations import People


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
    release = _read(path)
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


def _read(path: Path) -> Release:
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
