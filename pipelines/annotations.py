"""Annotation files -> People. The only place that fixes pixel base, box size and missing joints.

Reads the h5 files of princeton-vl (train.h5, valid.h5) and mpii_annotations.json(.gz). Bad files
end in one InputError that lists what is wrong.
"""

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.mpii import (
    BOX_SCALE,
    BOX_SHIFT_Y_PX,
    HEAD_LENGTH_FROM_NECK_TO_TOP,
    HEAD_TOP,
    MPII,
    UPPER_NECK,
)
from configs.skeleton import Skeleton

_LARGEST_JSON_BYTES = 512 << 20
_H5_COLUMNS = {
    "center": (2,),
    "scale": (),
    "part": (MPII.joint_count, 2),
    "visible": (MPII.joint_count,),
}
_FROM_PRINCETON = "an annotation file of princeton-vl/pytorch_stacked_hourglass (data/MPII/annot)"


class People(NamedTuple):
    """N annotated people, a row each. Units and meaning of the fields: docs/conventions.md."""

    images: tuple[str, ...]
    """N file names, relative to the folder of pictures, no folder above it."""
    index: npt.NDArray[np.int64]  # type: ignore[assignment]
    """(N,) number of the picture in the source; -1 where the file has none."""
    person: npt.NDArray[np.int64]
    """(N,) number of the person in the picture; -1 where the file has none."""
    center: npt.NDArray[np.float64]
    """(N, 2) image px."""
    scale: npt.NDArray[np.float64]
    """(N,) box side / 200 px."""
    normalize: npt.NDArray[np.float64]
    """(N,) px; 0 where it is unknown."""
    joints: npt.NDArray[np.float64]
    """(N, J, 2) image px."""
    marked: npt.NDArray[np.bool_]
    """(N, J)"""
    visible: npt.NDArray[np.bool_]
    """(N, J)"""

    @property
    def count(self) -> int:  # type: ignore[override]
        """Number of people, N."""
        return len(self.images)

    def select(self, rows: npt.ArrayLike) -> "People":
        """The people of these rows, in this order."""
        rows = np.asarray(rows)
        images = tuple(self.images[row] for row in rows)
        return People(images, *(column[rows] for column in self[1:]))


def read_annotations(path: Path, split: str) -> tuple[People, Skeleton]:
    """People of one split ("train" or "valid") and their joints.

    path: a folder that holds train.h5 and valid.h5, an h5 file, or an mpii_annotations.json(.gz),
    which has both splits and its own flag for them. Raises InputError.
    """
    if path.is_dir():
        path = path / f"{split}.h5"
    if not path.is_file():
        raise InputError(
            path,
            "no such file",
            f"{_FROM_PRINCETON}, or mpii_annotations.json",
            "give the file or its folder with --annotations, or put it there",
        )
    is_json = path.name.endswith((".json", ".json.gz"))
    people = _read_json(path, split) if is_json else _read_h5(path)
    _check(people, path)
    return people, MPII


def _read_h5(path: Path) -> People:
    try:
        with h5py.File(path) as file:
            columns = _h5_columns(file, path)
    except (InputError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes h5py raise almost any kind
        raise InputError(
            path,
            f"not a readable HDF5 file ({str(error)[:120]})",
            _FROM_PRINCETON,
            "fetch the file again",
        ) from error
    joints = columns["part"]
    return People(
        images=columns["imgname"],
        index=_whole_numbers(columns["index"], f"{path}: dataset index"),
        person=_whole_numbers(columns["person"], f"{path}: dataset person"),
        center=columns["center"],
        scale=columns["scale"],
        normalize=columns["normalize"],
        joints=joints,
        marked=joints[..., 0] != 0,
        visible=columns["visible"] > 0,
    )


def _h5_columns(file: h5py.File, path: Path) -> dict[str, Any]:
    """The columns that are used, with their shapes checked. Optional ones are filled in."""
    wanted = {"imgname", *_H5_COLUMNS}
    missing = sorted(name for name in wanted if not isinstance(file.get(name), h5py.Dataset))
    if missing:
        raise InputError(
            path,
            f"no dataset {', '.join(missing)} (it has {', '.join(map(str, file)) or 'none'})",
            f"the datasets {', '.join(sorted(wanted))}",
            "check that this is an annotation file and not another HDF5 file",
        )
    names = file["imgname"]
    if names.ndim != 1 or names.dtype.kind not in "SO":
        raise InputError(
            f"{path}: dataset imgname",
            f"shape {names.shape}, type {names.dtype}",
            "(N,) names",
            "write the file in the layout of MPII's valid.h5 (docs/conventions.md)",
        )
    count = len(names)
    shapes = {**_H5_COLUMNS, "normalize": (), "index": (), "person": ()}
    for name, tail in shapes.items():
        shape = getattr(file.get(name), "shape", None)
        if name in file and shape != (count, *tail):
            raise InputError(
                f"{path}: dataset {name}",
                f"shape {shape} beside {count} names",
                f"shape (N, {', '.join(map(str, tail))})" if tail else "shape (N,)",
                "write the file in the layout of MPII's valid.h5 (docs/conventions.md)",
            )
    columns: dict[str, Any] = {"imgname": tuple(_text(name, path) for name in names[()])}
    for name in shapes:
        if name in file:
            columns[name] = _numbers(file[name][()], f"{path}: dataset {name}")
    if "normalize" not in columns:
        joints = columns["part"]
        columns["normalize"] = head_length(joints, joints[..., 0] != 0)
    for name in ("index", "person"):
        columns.setdefault(name, np.full(count, -1.0))
    return columns


def _text(name: Any, path: Path) -> str:
    try:
        return name.decode("utf-8") if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: dataset imgname", repr(name), "names in UTF-8", "fetch the file again"
        ) from error


def _numbers(values: Any, where: str) -> npt.NDArray[np.float64]:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise InputError(where, f"type {values.dtype}", "numbers", "fetch the file again")
    return values.astype(np.float64)


def _whole_numbers(values: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.int64]:
    fits = np.abs(values) < 2**53  # false for what is not a number, too
    if not fits.all():
        row = fits.argmin()
        raise InputError(where, f"{values[row]} in row {row}", "whole numbers", "correct this row")
    return values.astype(np.int64)


def _read_json(path: Path, split: str) -> People:
    """MPII's own scale and centre, enlarged here as the h5 files are."""
    entries = _load_json(path)
    rows = []
    for number, entry in enumerate(entries):
        try:
            if bool(entry["isValidation"]) == (split == "valid"):
                rows.append(_json_row(entry))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: entry {number}",
                f"{type(error).__name__}: {error}",
                "img_paths, isValidation, objpos, scale_provided and joint_self of 16 joints",
                "fetch the file again",
            ) from error
    images = tuple(row[0] for row in rows)
    joints = np.array([row[5] for row in rows], dtype=np.float64).reshape(-1, MPII.joint_count, 3)
    raw_scale = np.array([row[4] for row in rows], dtype=np.float64)
    center = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 2)
    center = center + np.stack([np.zeros_like(raw_scale), BOX_SHIFT_Y_PX * raw_scale], axis=1)
    marked = joints[..., 0] != 0
    return People(
        images=images,
        index=np.array([row[1] for row in rows], dtype=np.int64),
        person=np.array([row[2] for row in rows], dtype=np.int64),
        center=center,
        scale=BOX_SCALE * raw_scale,
        normalize=head_length(joints[..., :2], marked),
        joints=joints[..., :2],
        marked=marked,
        visible=marked & (joints[..., 2] > 0),
    )


def _load_json(path: Path) -> list[Any]:
    opener = gzip.open if path.name.endswith(".gz") else open
    problem = ""
    try:
        with opener(path, "rb") as file:
            data = file.read(_LARGEST_JSON_BYTES + 1)
        if len(data) > _LARGEST_JSON_BYTES:
            problem = f"more than {_LARGEST_JSON_BYTES >> 20} MiB"
        else:
            entries = json.loads(data)
            if isinstance(entries, list) and entries:
                return entries
            problem = f"a JSON {type(entries).__name__} of length {len(entries)}"
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError, TypeError) as error:
        problem = f"not readable as JSON ({error})"
    raise InputError(path, problem, "a JSON list of people", "fetch the file again")


def _json_row(entry: dict[str, Any]) -> tuple[Any, ...]:
    joints = np.array(entry["joint_self"], dtype=np.float64)
    if joints.shape != (MPII.joint_count, 3):
        raise ValueError(f"joint_self of shape {joints.shape}")
    return (
        str(entry["img_paths"]),
        np.int64(int(entry.get("annolist_index", -1))),
        np.int64(int(entry.get("people_index", -1))),
        [float(entry["objpos"][0]), float(entry["objpos"][1])],
        float(entry["scale_provided"]),
        joints,
    )


def head_length(
    joints_NJ2: npt.NDArray[np.float64], marked_NJ: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(N,) 0.75 x |head top - upper neck|, px, in place of a head box; 0 where one is unmarked."""
    length = np.linalg.norm(joints_NJ2[:, HEAD_TOP] - joints_NJ2[:, UPPER_NECK], axis=-1)
    known = marked_NJ[:, HEAD_TOP] & marked_NJ[:, UPPER_NECK]
    return np.where(known, HEAD_LENGTH_FROM_NECK_TO_TOP * length, 0.0)


def safe_name(name: str) -> bool:
    """Whether a file name stays in the folder that it is joined to."""
    parts = re.split(r"[/\\]", name)
    plain = "" not in parts and not {".", ".."} & set(parts) and ":" not in parts[0]
    return plain and name.isprintable()


def _check(people: People, path: Path) -> None:
    """Raise one InputError that names the first rows with impossible values."""
    if people.count == 0:
        raise InputError(path, "no people in this split", "at least one", "check the file")
    faults: list[str] = []

    def report(rows: npt.ArrayLike, text: str) -> None:
        found = np.flatnonzero(rows)
        if len(found):
            more = ", ..." if len(found) > 5 else ""
            faults.append(f"{text} in {len(found)} row(s): {', '.join(map(str, found[:5]))}{more}")

    unsafe = np.array([not safe_name(name) for name in people.images])
    if unsafe.any():
        report(unsafe, f"imgname that leaves the folder ({people.images[unsafe.argmax()]!r})")
    report(~np.isfinite(people.center).all(axis=1), "center not a number")
    report(~np.isfinite(people.scale), "scale not a number")
    report(people.scale <= 0, "scale not above 0")
    lengths = np.isfinite(people.normalize) & (people.normalize >= 0)
    report(~lengths, "normalize not a length")
    report(~np.isfinite(people.joints).all(axis=(1, 2)), "joints not a number")
    if faults:
        raise InputError(
            path,
            "; ".join(faults),
            "finite numbers, scale above 0, names inside the folder of pictures",
            "correct these rows (rows count from 0)",
        )
