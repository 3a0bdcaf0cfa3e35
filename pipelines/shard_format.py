"""A person as a row of float32 numbers, which DALI reads without parsing, and as JSON for people.

Record: HEADER fields, then (x, y, marked, visible) for each of the J joints.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.skeleton import Skeleton
from pipelines.annotations import People

HEADER = (
    "row",  # place in the annotation file's split, from 0
    "center_x", "center_y",  # image px
    "scale",  # box side / 200 px
    "normalize",  # px, 0 where unknown
    "width", "height",  # of the stored picture, px
    "a", "b", "tx", "c", "d", "ty",  # affine, stored picture px -> image px, row by row
)  # fmt: skip
IDENTITY_AFFINE: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_FARTHEST_PX = 131_072.0
"""From the origin; no picture has more."""


def record_length(joints: int) -> int:
    """Number of float32 values in the record of a person with that many joints."""
    return len(HEADER) + 4 * joints


def record_of(
    people: People,
    row: int,
    width: int,
    height: int,
    image_from_stored: tuple[float, ...] = IDENTITY_AFFINE,
) -> npt.NDArray[np.float64]:
    """(record_length,) record of one person, in full precision; as it is for the original picture.

    width, height: of the stored picture, px. image_from_stored: six numbers, row by row.
    """
    facts = np.stack([people.marked[row], people.visible[row]], axis=-1)
    joints = np.concatenate([people.joints[row], facts], axis=-1)
    header = [row, *people.center[row], people.scale[row], people.normalize[row], width, height]
    return np.concatenate([header, image_from_stored, joints.ravel()])


def pack_record(
    people: People,
    row: int,
    width: int,
    height: int,
    image_from_stored: tuple[float, ...] = IDENTITY_AFFINE,
) -> npt.NDArray[np.float32]:
    """(record_length,) '<f4' record as a shard holds it."""
    return record_of(people, row, width, height, image_from_stored).astype("<f4")


class Records(NamedTuple):
    """Fields of a batch of records, numpy or torch alike. Units: docs/conventions.md."""

    row_N: Any
    center_N2: Any
    scale_N: Any
    normalize_N: Any
    size_N2: Any
    """Width and height of the stored picture, px."""
    image_from_stored_N23: Any
    joints_NJ2: Any
    marked_NJ: Any
    visible_NJ: Any


def unpack_records(records_NR: Any) -> Records:
    """Name the fields of (N, record_length) records; the results are views where they can be."""
    count = records_NR.shape[0]
    joints_NJ4 = records_NR[:, len(HEADER) :].reshape(count, -1, 4)
    return Records(
        row_N=records_NR[:, 0],
        center_N2=records_NR[:, 1:3],
        scale_N=records_NR[:, 3],
        normalize_N=records_NR[:, 4],
        size_N2=records_NR[:, 5:7],
        image_from_stored_N23=records_NR[:, 7:13].reshape(count, 2, 3),
        joints_NJ2=joints_NJ4[..., :2],
        marked_NJ=joints_NJ4[..., 2] > 0,
        visible_NJ=joints_NJ4[..., 3] > 0,
    )


def people_sha256(records_NR: npt.NDArray[np.float32]) -> str:
    """Who they are, in their order, in 64 hexadecimal digits; the same for both packings."""
    of_the_picture = [i for i, name in enumerate(HEADER) if name in ("width", "height")]
    of_the_picture += range(HEADER.index("a"), len(HEADER))
    people = np.delete(records_NR, of_the_picture, axis=1)
    return hashlib.sha256(np.ascontiguousarray(people, dtype="<f4").tobytes()).hexdigest()


def describe(
    people: People,
    row: int,
    skeleton: Skeleton,
    width: int,
    height: int,
    image_from_stored: tuple[float, ...] = IDENTITY_AFFINE,
) -> bytes:
    """The JSON component: what the record holds, in words, as UTF-8."""
    joints = {
        name: {
            "x": float(people.joints[row, j, 0]),
            "y": float(people.joints[row, j, 1]),
            "marked": bool(people.marked[row, j]),
            "visible": bool(people.visible[row, j]),
        }
        for j, name in enumerate(skeleton.names)
    }
    facts = {
        "image": people.images[row],
        "row": int(row),
        "index": int(people.index[row]),
        "person": int(people.person[row]),
        "center": people.center[row].tolist(),
        "scale": float(people.scale[row]),
        "normalize": float(people.normalize[row]),
        "width": width,
        "height": height,
        "joints": joints,
    }
    if image_from_stored != IDENTITY_AFFINE:
        facts["image_from_stored"] = [image_from_stored[:3], image_from_stored[3:]]
    return json.dumps(facts, indent=1).encode()


def record_faults(
    records_NR: npt.NDArray[np.float32], largest: tuple[int, int]
) -> dict[str, npt.NDArray[np.bool_]]:
    """(N,) masks of what is impossible in the records of a split, by its name in words.

    largest: width and height that no stored picture exceeds, px.
    """
    fields = unpack_records(records_NR.astype(np.float64))
    affine = fields.image_from_stored_N23
    with np.errstate(invalid="ignore", over="ignore"):
        determinant = affine[:, 0, 0] * affine[:, 1, 1] - affine[:, 0, 1] * affine[:, 1, 0]
        points = np.concatenate([fields.joints_NJ2, fields.center_N2[:, None]], axis=1)
        sizes = (fields.size_N2 >= 1) & (fields.size_N2 <= largest)
        marks = records_NR[:, len(HEADER) :].reshape(len(records_NR), -1, 4)[..., 2:]
        return {
            "values that are no numbers": ~np.isfinite(records_NR).all(axis=1),
            "a scale that is not above 0": ~(fields.scale_N > 0)
            | ~(fields.scale_N < _FARTHEST_PX / 200),
            "a joint or centre far out": ~(np.abs(points) < _FARTHEST_PX).all(axis=(1, 2)),
            "a normalize that is no length": ~((fields.normalize_N >= 0)
                                               & (fields.normalize_N < _FARTHEST_PX)),
            "an affine without an inverse": ~(np.abs(determinant) > 1e-9),
            "a size that the manifest excludes": ~sizes.all(axis=1),
            "marks other than 0 and 1": ~np.isin(marks, (0, 1)).all(axis=(1, 2)),
            "the row of another person": _repeated(fields.row_N),
        }  # fmt: skip


def _repeated(row_N: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """(N,) whether a row is no whole number from 0, or was there before."""
    first = np.zeros(len(row_N), dtype=bool)
    first[np.unique(row_N, return_index=True)[1]] = True
    return ~first | ~(row_N >= 0) | (row_N != np.floor(row_N))
