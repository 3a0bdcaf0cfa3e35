"""Reads label files of DeepLabCut, Lightning Pose and YOLO-pose into Labels.

A table is a CSV file with one row per picture, below the rows `scorer`, `individuals` (if there are
several), `bodyparts` and `coords`. DeepLabCut writes CollectedData_<scorer>.csv for each video, and
the same as .h5; Lightning Pose one such file for all. YOLO-pose has one text file per picture.
"""

import csv
import io
import math
import os
import pickletools
import re
from collections.abc import Iterable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from common.errors import InputError
from common.files import read_bytes, read_yaml
from configs.skeleton import Length, Pairs, Skeleton, default_groups, with_named_pairs
from pipelines.coco import Floats

_LARGEST = 256 << 20
"""Maximum bytes of a table or a dataset. A table of 100,000 pictures, 20 joints has 60 million."""
_HEADER = ("scorer", "individuals", "bodyparts", "coords")
_TABLE = "a table with the rows scorer, bodyparts, coords and one row for each picture"
PROJECT = "config.yaml"
"""The file of a DeepLabCut project, and of some YOLO-pose data sets."""
_YOLO_KEYS = "kpt_shape [joints, 2 or 3], train and val"
PICTURE_LENGTH = Length((), 0.1)
"""Where boxes are whole pictures, in which a person or animal is smaller."""
BOX_LENGTH = Length((), 0.4)
"""Errors are divided by 0.4 x the box, so PCK@0.5 counts errors below a fifth of the box."""
_FIX = "correct it, or export the labels again"


class Labels(NamedTuple):
    """N labelled people or animals with J joints."""

    images: tuple[str, ...]
    """N file names, relative to the folder of pictures."""
    box_N4: Floats
    """x, y, width, height, image px from the picture's corner; NaN if the file has no box."""
    keypoints_NJ3: Floats
    """x, y (image px) and v: 0 not marked, 1 occluded, 2 visible."""
    skeleton: Skeleton
    is_relative: bool = False
    """Whether px above means shares of the picture's width and height."""
    columns: Mapping[str, Any] = {}
    """Further columns of People."""


def is_table(file: Path) -> bool:
    """Whether a file is named as a table of DeepLabCut or Lightning Pose."""
    return file.suffix in (".csv", ".h5")


def read_table(path: Path, *_: object) -> Labels:
    """The labels of one table. Raises InputError."""
    try:
        data = read_bytes(path, _LARGEST)
        if path.suffix == ".h5":
            rows = _h5_rows(data)
        else:
            rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
        images, joints, keypoints_NJ3 = _parse_table(rows)
    except (OSError, RuntimeError, ArithmeticError, LookupError, ValueError, csv.Error) as error:
        raise InputError(path, f"not readable ({error})", _TABLE, _FIX) from error
    no_box = np.full((len(images), 4), np.nan)
    return Labels(images, no_box, keypoints_NJ3, skeleton_of_names(path.stem, joints, limbs=()))


def _h5_rows(data: bytes) -> list[list[str]]:
    """The rows of the CSV file with the same labels. Raises OSError, LookupError or ValueError.

    pandas writes a table in one of two layouts ("fixed" and the older "table"). The names of the
    older one's columns are a pickle, of which only the strings are read.
    """
    with h5py.File(io.BytesIO(data)) as file:
        (key,) = (key for key in file if isinstance(file.get(key, getlink=True), h5py.HardLink))
        if f"{key}/table" in file:
            table = own_dataset(file, f"{key}/table")
            values, images = table["values_block_0"], [np.char.decode(table["index"])]
            strings = _pickled_strings(table.attrs["values_block_0_kind"])
            columns = np.reshape(strings, (values.shape[1], -1)).T.tolist()
        else:
            values = own_dataset(file, f"{key}/block0_values")[()]
            columns = _pandas_levels(file, f"{key}/block0_items")
            images = _pandas_levels(file, f"{key}/axis1")
    names = [_HEADER[0], *_HEADER[1 - len(columns) :]]  # of three levels without individuals
    blank = [""] * (len(images) - 1)
    header = [[name, *blank, *row] for name, row in zip(names, columns, strict=True)]
    return header + np.column_stack([*images, values.astype(str)]).tolist()


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset that is stored in the file itself. Raises ValueError."""
    data = file.get(name) if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
        raise ValueError(f"no dataset {name} in the file itself")
    try:
        size = data.nbytes
    except TypeError as error:  # h5py's, of a damaged type
        raise ValueError(f"{name}: {error}") from error
    if size > _LARGEST:
        raise ValueError(f"{name} claims {size:,} bytes")
    return data


def _pandas_levels(file: h5py.File, name: str) -> list[Any]:
    """The levels of an index, each with a value for each row or column."""
    if name in file:
        return [np.char.decode(own_dataset(file, name)[()]).tolist()]
    count = sum(f"{name}_level{i}" in file for i in range(len(_HEADER)))
    values, rows = (
        [own_dataset(file, f"{name}_{part}{i}")[()] for i in range(count)]
        for part in ("level", "label")
    )
    return [np.char.decode(v)[r].tolist() for v, r in zip(values, rows, strict=True)]


def _pickled_strings(data: bytes) -> list[str]:
    """The strings in a pickle of lists, tuples and strings, in order. Runs nothing of it."""
    found: list[str] = []
    memo: dict[Any, str] = {}
    for code, value, _ in pickletools.genops(data):
        if "GET" in code.name:
            found.append(memo[value])
        elif isinstance(value, str):
            found.append(value)
        elif "PUT" in code.name and found:  # a tuple's number as well, which nothing refers to
            memo[value] = found[-1]
    return found


def _parse_table(rows: list[list[str]]) -> tuple[tuple[str, ...], tuple[str, ...], Floats]:
    """File names, joints, and (N, J, 3) keypoints of all individuals. Raises ValueError."""
    header = {row[0]: row for row in rows[:4] if row and row[0] in _HEADER}
    coords, bodyparts = header.get("coords", []), header.get("bodyparts", [])
    individuals = header.get("individuals", [""] * len(coords))
    if "x" not in coords or not len(coords) == len(bodyparts) == len(individuals):
        raise ValueError(f"the first rows begin with {', '.join(header)}")
    # A picture's path is in one cell, or in three cells: labeled-data, video, picture.
    start = coords.index("x")
    joints = tuple(dict.fromkeys(bodyparts[start:]))
    columns: dict[str, dict[str, int]] = {}
    for column in range(start, len(coords), 2):
        if coords[column : column + 2] != ["x", "y"]:
            raise ValueError(f"columns {column} and {column + 1} are not x and y")
        columns.setdefault(individuals[column], {})[bodyparts[column]] = column
    images, keypoints = [], []
    for row in rows[len(header) :]:
        for own in columns.values():
            xy = [_cells(row, own[joint]) if joint in own else None for joint in joints]
            if any(xy):
                images.append("/".join(filter(None, row[:start])).replace("\\", "/"))
                keypoints.append([(*each, 2.0) if each else (0.0, 0.0, 0.0) for each in xy])
    return tuple(images), joints, np.array(keypoints).reshape(-1, len(joints), 3)


def _cells(row: list[str], column: int) -> tuple[float, float] | None:
    """x and y of a joint; None if it is not labelled. Raises ValueError."""
    x, y = (float(cell or "nan") for cell in row[column : column + 2])
    return None if math.isnan(x) or math.isnan(y) else (x, y)


def read_deeplabcut(file: Path, *_: object) -> Labels:
    """The labels of a table, or all of a project, given its config.yaml. Raises InputError."""
    if is_table(file):
        return read_table(file)
    project, config = file.parent, read_yaml(file, "a DeepLabCut project")
    tables = deeplabcut_files(file)[1:]
    if not tables:
        where, expected = project / "labeled-data", "VIDEO/CollectedData_SCORER.csv or .h5"
        raise InputError(where, "no such file", expected, "save the labels in DeepLabCut again")
    parts = [read_table(table) for table in tables]
    joints = parts[0].skeleton.names
    for table, part in zip(tables, parts, strict=True):
        if part.skeleton.names != joints:
            found = f"the body parts {', '.join(part.skeleton.names)}"
            raise InputError(table, found, f"those of {tables[0]}: {', '.join(joints)}", _FIX)
    drawn, possible = config.get("skeleton") or [], [*permutations(range(len(joints)), 2)]
    if not isinstance(drawn, list):
        raise InputError(file, f"skeleton: {drawn}", "a list of pairs of body parts", _FIX)
    return Labels(
        images=tuple(image for part in parts for image in part.images),
        box_N4=np.concatenate([part.box_N4 for part in parts]),
        keypoints_NJ3=np.concatenate([part.keypoints_NJ3 for part in parts]),
        skeleton=skeleton_of_names(
            str(config.get("Task", project.name)),
            joints,
            tuple((a, b) for a, b in possible if [joints[a], joints[b]] in drawn),
        ),
    )


def deeplabcut_files(file: Path) -> list[Path]:
    """The file itself and, of a project, a table for each video and scorer, the .csv if there."""
    found = [] if is_table(file) else file.parent.glob("labeled-data/*/CollectedData_*.*")
    tables = {path.with_suffix(""): path for path in sorted(found, reverse=True) if is_table(path)}
    return [file, *sorted(tables.values())]


def read_yolo(data_yaml: Path, split: str, *_: object) -> Labels:
    """The labels of one split ("train" or "valid") of a YOLO-pose data set. Raises InputError.

    data_yaml: the data set's description, with kpt_shape. Names are relative to its `path`.
    """
    config, root = read_yaml(data_yaml, _YOLO_KEYS), yolo_root(data_yaml)
    shape: Any = config.get("kpt_shape")
    pictures = config.get("train" if split == "train" else "val")
    if not re.fullmatch(r"\[[1-9]\d{0,3}, [23]\]", repr(shape)) or not pictures:
        raise InputError(data_yaml, f"kpt_shape {shape!r}, {split}: {pictures!r}", _YOLO_KEYS, _FIX)
    images, boxes, keypoints = [], [], []
    for picture in _yolo_pictures(root, pictures):
        # .../images/a.jpg has the labels .../labels/a.txt; the last folder `images` is replaced.
        labels = re.sub("(.*)/images/", r"\1/labels/", picture.as_posix())
        for box_4, keypoints_J3 in _yolo_rows(Path(labels).with_suffix(".txt"), *shape):
            images.append(os.path.relpath(picture, root))
            boxes.append([*(box_4[:2] - box_4[2:] / 2), *box_4[2:]])
            keypoints.append(keypoints_J3)
    return Labels(
        tuple(images),
        np.array(boxes).reshape(-1, 4),
        np.array(keypoints).reshape(-1, shape[0], 3),
        _yolo_skeleton(data_yaml, config, shape[0]),
        is_relative=True,
    )


def yolo_root(data_yaml: Path) -> Path:
    """The folder to which the names in the file are relative. Raises InputError."""
    return (data_yaml.parent / str(read_yaml(data_yaml, _YOLO_KEYS).get("path") or ".")).resolve()


def is_yolo(file: Path) -> bool:
    """Whether a file describes a YOLO-pose data set. Raises InputError."""
    is_named = file.suffix in (".yaml", ".yml")
    return is_named and (file.name != PROJECT or "kpt_shape" in read_yaml(file, _YOLO_KEYS))


def yolo_files(data_yaml: Path) -> list[Path]:
    """The file itself and the labels of all splits."""
    return [data_yaml, *sorted(yolo_root(data_yaml).rglob("labels/**/*.txt"))]


def _yolo_pictures(root: Path, given: Any) -> Iterable[Path]:
    """The pictures of folders, or of text files with one path per line."""
    for name in given if isinstance(given, list) else [given]:
        source = root / str(name)
        if source.is_dir():
            yield from sorted(path for path in source.rglob("*") if path.suffix not in ("", ".txt"))
        elif source.is_file():
            yield from (root / os.fsdecode(row) for row in source.read_bytes().splitlines() if row)
        else:
            raise InputError(source, "no such file or folder", "pictures", "correct `path`")


def _yolo_rows(path: Path, joints: int, dimensions: int) -> list[tuple[Floats, Floats]]:
    """Box (4,) and keypoints (J, 3) of each row, as shares of the picture; none without a file."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            values = np.array(line.split(), dtype=np.float64)[1:]  # without the class
        except ValueError:
            values = np.zeros(0)
        if values.size != 4 + joints * dimensions or not np.isfinite(values).all():
            expected = f"class, x, y, width, height, and {joints} x {dimensions} numbers"
            raise InputError(f"{path}: line {number}", line[:80], expected, _FIX)
        given = values[4:].reshape(joints, dimensions)
        low, high = given[:, :2].min(axis=1), given[:, :2].max(axis=1)
        is_marked = (low >= 0) & (high > 0)
        v = given[:, 2] * is_marked if dimensions == 3 else 2.0 * is_marked
        rows.append((values[:4], np.column_stack([given[:, :2] * (v > 0)[:, None], v])))
    return rows


def _yolo_skeleton(path: Path, config: dict[str, Any], joints: int) -> Skeleton:
    named = config.get("kpt_names") or [f"joint{number}" for number in range(joints)]
    names = next(iter(named.values())) if isinstance(named, dict) else named
    order, indices = config.get("flip_idx") or [], sorted(map(str, range(joints)))
    is_order = isinstance(order, list) and sorted(map(repr, order)) in ([], indices)
    if not (isinstance(names, list) and len(names) == joints and is_order):
        found = f"kpt_names {names}, flip_idx {order}"
        raise InputError(path, found, f"a name and a partner for each of {joints} joints", _FIX)
    pairs = tuple((a, b) for a, b in enumerate(order) if a < b) if order else None
    return skeleton_of_names(path.stem, tuple(map(str, names)), (), BOX_LENGTH, pairs)


def skeleton_of_names(
    name: str,
    joints: tuple[str, ...],
    limbs: Pairs,
    length: Length = PICTURE_LENGTH,
    flip_pairs: Pairs | None = None,
) -> Skeleton:
    """A skeleton whose length is of the box. flip_pairs: None for those that the names give.

    length: for labels with boxes, or for whole pictures.
    """
    groups, mirror = default_groups(joints, flip_pairs or ()), flip_pairs is not None
    skeleton = Skeleton(name, joints, flip_pairs or (), limbs, groups, length, mirror)
    return skeleton if mirror else with_named_pairs(skeleton)
