"""Annotation files -> People. The only place that fixes pixel base, box size and missing joints.

Reads the h5 files of princeton-vl (train.h5, valid.h5), mpii_annotations.json(.gz), and keypoints
in COCO's JSON. Bad files end in one InputError that lists what is wrong.
"""

import gzip
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import LARGEST_JSON, bounded, parse_json
from configs.skeleton import (
    BOX_SCALE,
    BOX_SHIFT_Y_PX,
    HEAD_LENGTH_FROM_NECK_TO_TOP,
    HEAD_TOP,
    MPII,
    PIXELS_PER_SCALE,
    UPPER_NECK,
    Skeleton,
)

_LARGEST_COLUMN = 256 << 20
"""Bytes; that of MPII's 25,000 people has 6 million."""
_SUFFIXES = (".h5", ".json", ".json.gz")
_FROM_PRINCETON = "an annotation file of princeton-vl/pytorch_stacked_hourglass (data/MPII/annot)"
_JSON_KINDS = "a JSON list of people, or COCO's dict of images and annotations"


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


def read_annotations(
    path: Path, split: str, skeleton: Skeleton | None = None
) -> tuple[People, Skeleton]:
    """People of one split ("train" or "valid") and their joints.

    path: an h5 file, COCO's JSON, an mpii_annotations.json(.gz), which has both splits and its own
    flag for them, or a folder of files named after their splits. skeleton: the file's joints, those
    of MPII by default; its length, where it has one, is preferred to the file's. Says on stderr
    whom COCO's rules leave out. Raises InputError.
    """
    path, joints = split_file(path, split), skeleton or MPII
    if not path.name.endswith((".json", ".json.gz")):
        people = _read_h5(path, joints)
    else:
        data = _load_json(path)
        if isinstance(data, list):
            people = _read_json(data, path, split, joints)
        else:
            people = _read_coco(data, path, skeleton)
    _check(people, path)
    return people, joints


def split_file(path: Path, split: str) -> Path:
    """The file of a split: the path itself, or the one of that name in it. Raises InputError."""
    places = [path / f"{split}{suffix}" for suffix in _SUFFIXES] if path.is_dir() else [path]
    found = [place for place in places if place.is_file()]
    if len(found) > 1:
        names = " and ".join(place.name for place in found)
        raise InputError(path, names, f"one file for {split}", "name the file, or move the other")
    if not found:
        others = sorted(each.name for each in path.glob("*") if each.suffix in _SUFFIXES)[:4]
        beside = f"; in the folder: {', '.join(others) or 'none at all'}" if path.is_dir() else ""
        raise InputError(
            places[0],
            "no such file" + (", nor one of JSON" if path.is_dir() else "") + beside,
            f"{_FROM_PRINCETON}, mpii_annotations.json, or COCO's JSON",
            "give the file or its folder with --annotations, put it there, "
            "or pack one split alone with --splits",
        )
    return found[0]


def has_both_splits(path: Path) -> bool:
    """Whether one file holds both splits, as MPII's JSON does: a list where COCO's is a dict."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte-order mark, too
    except (OSError, EOFError, zlib.error):
        return True  # reading it will say what is wrong
    return path.name.endswith((".json", ".json.gz")) and not start.startswith(b"{")


def _read_h5(path: Path, skeleton: Skeleton) -> People:
    try:
        columns = _open_h5(path, skeleton)
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
    marked = joints[..., 0] != 0
    length = columns.get("normalize")
    if length is None or skeleton.length:
        length = normalizing_length(joints, marked, columns["scale"], skeleton, path)
    return People(
        images=columns["imgname"],
        index=_whole_numbers(columns["index"], f"{path}: dataset index"),
        person=_whole_numbers(columns["person"], f"{path}: dataset person"),
        center=columns["center"],
        scale=columns["scale"],
        normalize=length,
        joints=joints,
        marked=marked,
        visible=columns["visible"] > 0,
    )


def _open_h5(path: Path, skeleton: Skeleton) -> dict[str, Any]:
    with h5py.File(path) as file:
        return _h5_columns(file, path, skeleton)


def _h5_columns(file: h5py.File, path: Path, skeleton: Skeleton) -> dict[str, Any]:
    """The columns that are used, with their shapes checked. Optional ones may lack."""
    joints = skeleton.joint_count
    shapes: dict[str, tuple[int, ...]]
    shapes = {"center": (2,), "scale": (), "part": (joints, 2), "visible": (joints,)}
    wanted = {"imgname", *shapes}
    _refuse_far_reaching(file, {*wanted, "normalize", "index", "person"}, path)
    missing = sorted(name for name in wanted if not isinstance(file.get(name), h5py.Dataset))
    if missing:
        raise InputError(
            path,
            f"no dataset {', '.join(missing)} (it has {', '.join(list(file)[:20]) or 'none'})",
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
    shapes |= {"normalize": (), "index": (), "person": ()}
    for name, tail in shapes.items():
        shape = getattr(file.get(name), "shape", None)
        if name in file and shape != (count, *tail):
            raise InputError(
                f"{path}: dataset {name}",
                f"shape {shape} beside {count} names",
                f"shape (N, {', '.join(map(str, tail))})" if tail else "shape (N,)",
                "write the file in the layout of MPII's valid.h5 (docs/conventions.md); "
                "other joints than MPII's need --skeleton FILE.yaml",
            )
    columns: dict[str, Any] = {"imgname": tuple(_text(name, path) for name in names[()])}
    for name in shapes:
        if name in file:
            columns[name] = _numbers(file[name][()], f"{path}: dataset {name}")
    for name in ("index", "person"):
        columns.setdefault(name, np.full(count, -1.0))
    return columns


def _refuse_far_reaching(file: h5py.File, names: set[str], path: Path) -> None:
    """Raise InputError for a dataset that lies in another file, or claims to be huge."""
    problem = ""
    for name in sorted(names):
        link = file.get(name, getlink=True)
        if link is not None and not isinstance(link, h5py.HardLink):
            problem = f"{name} is a link"
            break
        data = file.get(name)
        if isinstance(data, h5py.Dataset):
            if data.is_virtual or data.external:
                problem = f"the values of {name} lie in another file"
            elif data.nbytes > _LARGEST_COLUMN:
                problem = f"{name} claims {data.nbytes:,} bytes"
    if problem:
        raise InputError(
            path, problem, f"datasets of at most {_LARGEST_COLUMN >> 20} MiB in the file itself",
            "fetch the file again, from whom you trust",
        )  # fmt: skip


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


def _read_json(entries: list[Any], path: Path, split: str, skeleton: Skeleton) -> People:
    """MPII's own scale and centre, enlarged here as the h5 files are."""
    count, rows = skeleton.joint_count, []
    for number, entry in enumerate(entries):
        try:
            if bool(entry["isValidation"]) == (split == "valid"):
                rows.append(_json_row(entry, count))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: entry {number}",
                f"{type(error).__name__}: {error}",
                f"img_paths, isValidation, objpos, scale_provided and joint_self of {count} joints",
                "fetch the file again",
            ) from error
    images = tuple(row[0] for row in rows)
    joints = np.array([row[5] for row in rows], dtype=np.float64).reshape(-1, count, 3)
    raw_scale = np.array([row[4] for row in rows], dtype=np.float64)
    center = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 2)
    center = center + np.stack([np.zeros_like(raw_scale), BOX_SHIFT_Y_PX * raw_scale], axis=1)
    marked, scale = joints[..., 0] != 0, BOX_SCALE * raw_scale
    return People(
        images=images,
        index=np.array([row[1] for row in rows], dtype=np.int64),
        person=np.array([row[2] for row in rows], dtype=np.int64),
        center=center,
        scale=scale,
        normalize=normalizing_length(joints[..., :2], marked, scale, skeleton, path),
        joints=joints[..., :2],
        marked=marked,
        visible=marked & (joints[..., 2] > 0),
    )


def _load_json(path: Path) -> list[Any] | dict[str, Any]:
    """A list of people in MPII's manner, or COCO's dict."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            entries = parse_json(bounded(file.read(LARGEST_JSON + 1), LARGEST_JSON))
        if isinstance(entries, list) and entries:
            return entries
        if isinstance(entries, dict) and {"images", "annotations"} <= entries.keys():
            return entries
        size = f" of length {len(entries)}" if isinstance(entries, (list, dict, str)) else ""
        problem = f"a JSON {type(entries).__name__}{size}"
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"not readable as JSON ({error})"
    raise InputError(path, problem, _JSON_KINDS, "fetch the file again")


def _json_row(entry: dict[str, Any], count: int) -> tuple[Any, ...]:
    joints = np.array(entry["joint_self"], dtype=np.float64)
    if joints.shape != (count, 3):
        raise ValueError(f"joint_self of shape {joints.shape}")
    return (
        str(entry["img_paths"]),
        np.int64(int(entry.get("annolist_index", -1))),
        np.int64(int(entry.get("people_index", -1))),
        [float(entry["objpos"][0]), float(entry["objpos"][1])],
        float(entry["scale_provided"]),
        joints,
    )


def _read_coco(data: dict[str, Any], path: Path, skeleton: Skeleton | None) -> People:
    """COCO's boxes and keypoints by the rules of docs/conventions.md, in the file's order."""
    if skeleton is None:
        raise InputError(path, "COCO's JSON without a skeleton", "--skeleton FILE.yaml with it",
                         "see docs/custom-data.md; configs/skeletons/coco.yaml has COCO's own 17 "
                         "joints")  # fmt: skip
    count, rows, left_out = skeleton.joint_count, [], Counter[str]()
    images = _coco_images(data["images"], path)
    wanted = _coco_categories(data.get("categories", []), path, skeleton)
    for number, entry in enumerate(_entries(data["annotations"], f"{path}: annotations")):
        try:
            reason = _why_left_out(entry, wanted)
            if reason:
                left_out[reason] += 1
            else:
                rows.append(_coco_row(entry, images, count))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: annotation {number}",
                f"{type(error).__name__}: {error}",
                f"id, image_id, bbox [x, y, width, height] and keypoints [x, y, v] x {count}",
                "correct it in the program that wrote the file",
            ) from error
    if left_out:
        what = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        print(f"{path}: left out {what}", file=sys.stderr)
    return _coco_people(rows, path, skeleton)


def _entries(raw: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(raw, list) and all(isinstance(entry, dict) for entry in raw):
        return raw
    raise InputError(where, "something else", "a list of dicts", "write the file as COCO does")


def _coco_images(raw: Any, path: Path) -> dict[int, str]:
    """The file name of each image id."""
    images: dict[int, str] = {}
    for number, entry in enumerate(_entries(raw, f"{path}: images")):
        image: Any = entry.get("id")
        name, is_number = entry.get("file_name"), type(image) is int and 0 <= image < 2**53
        if not is_number or image in images or not isinstance(name, str):
            raise InputError(
                f"{path}: image {number}", f"id {image!r}, file_name {name!r}",
                "a whole number that no other image has, and a name", "correct this image",
            )  # fmt: skip
        images[image] = name
    return images


def _coco_categories(raw: Any, path: Path, skeleton: Skeleton) -> set[Any] | None:
    """Ids of the categories with the skeleton's joints; None where the file names no joints."""
    entries = _entries(raw, f"{path}: categories")
    named = [entry for entry in entries if entry.get("keypoints")]
    names = list(skeleton.names)
    found = {e["id"] for e in named if e["keypoints"] == names and type(e.get("id")) is int}
    if not named or found:
        return found or None
    theirs = named[0]["keypoints"]
    raise InputError(
        f"{path}: categories",
        f"the joints {', '.join(map(str, theirs)) if isinstance(theirs, list) else theirs!r}",
        f"those of the skeleton {skeleton.name}, in its order: {', '.join(names)}",
        "give the skeleton's joints the names and the order that they have in this file",
    )


def _why_left_out(entry: dict[str, Any], wanted: set[Any] | None) -> str:
    """Why an annotation is nobody to train or evaluate on; empty for a person."""
    if wanted is not None and entry["category_id"] not in wanted:
        return "of other categories"
    if entry.get("iscrowd"):
        return "crowds"
    if not any(entry.get("keypoints", [])[2::3]):
        return "without a marked joint"
    box = entry.get("bbox")
    if not box or not (float(box[2]) > 0 and float(box[3]) > 0):
        return "without a box"
    return ""


def _coco_row(entry: dict[str, Any], images: dict[int, str], count: int) -> tuple[Any, ...]:
    joints = np.array(entry["keypoints"], dtype=np.float64)
    if joints.shape != (3 * count,):
        raise ValueError(f"{joints.size} values for {count} joints")
    joints = joints.reshape(count, 3)
    if not np.isin(joints[:, 2], (0, 1, 2)).all():
        raise ValueError(f"visibilities {sorted(set(joints[:, 2].tolist()))}, not 0, 1 and 2")
    joints[joints[:, 2] == 0] = 0.0  # files leave anything there; 0 is what MPII's have
    box = np.array(entry["bbox"], dtype=np.float64)
    if box.shape != (4,):
        raise ValueError(f"a box of {box.size} values")
    image, person = entry["image_id"], entry["id"]
    if image not in images:
        raise ValueError(f"image_id {image!r} is of no image in the file")
    if type(person) is not int or not 0 <= person < 2**53:
        raise ValueError(f"id {person!r} is no whole number")
    return images[image], image, person, box, joints


def _coco_people(rows: list[tuple[Any, ...]], path: Path, skeleton: Skeleton) -> People:
    person = np.array([row[2] for row in rows], dtype=np.int64)
    numbers, uses = np.unique(person, return_counts=True)
    if (uses > 1).any():
        found = f"id {numbers[uses.argmax()]} of {uses.max()} annotations"
        raise InputError(path, found, "an id for each annotation", "give each another id")
    box = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4)
    joints = np.array([row[4] for row in rows]).reshape(-1, skeleton.joint_count, 3)
    marked, scale = joints[..., 2] > 0, BOX_SCALE * box[:, 2:].max(axis=1) / PIXELS_PER_SCALE
    return People(
        images=tuple(row[0] for row in rows),
        index=np.array([row[1] for row in rows], dtype=np.int64),
        person=person,
        # Edges of boxes count from the picture's corner, which lies at (-0.5, -0.5).
        center=box[:, :2] + box[:, 2:] / 2 - 0.5,
        scale=scale,
        normalize=normalizing_length(joints[..., :2], marked, scale, skeleton, path),
        joints=joints[..., :2],
        marked=marked,
        visible=joints[..., 2] > 1,
    )


def normalizing_length(
    joints_NJ2: npt.NDArray[np.float64],
    marked_NJ: npt.NDArray[np.bool_],
    scale_N: npt.NDArray[np.float64],
    skeleton: Skeleton,
    path: Path,
) -> npt.NDArray[np.float64]:
    """(N,) the length that errors are divided by, px; 0 where a joint that it needs is unmarked.

    By the skeleton's rule, or in MPII's files without a head box by the head. Else InputError.
    """
    rule = skeleton.length
    if rule is None and skeleton.same_joints(MPII):
        return head_length(joints_NJ2, marked_NJ)
    if rule is None:
        expected = "`normalize` in the skeleton's file"
        found, advice = "no length to divide errors by", "add it (docs/custom-data.md)"
        raise InputError(path, found, expected, advice)
    if not rule.joints:
        return rule.factor * scale_N * PIXELS_PER_SCALE / BOX_SCALE
    a, b = rule.joints
    length = rule.factor * np.linalg.norm(joints_NJ2[:, a] - joints_NJ2[:, b], axis=-1)
    return np.where(marked_NJ[:, a] & marked_NJ[:, b], length, 0.0)


def head_length(
    joints_NJ2: npt.NDArray[np.float64], marked_NJ: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(N,) 0.75 x |head top - upper neck|, px, in place of a head box; 0 where one is unmarked."""
    length = np.linalg.norm(joints_NJ2[:, HEAD_TOP] - joints_NJ2[:, UPPER_NECK], axis=-1)
    known = marked_NJ[:, HEAD_TOP] & marked_NJ[:, UPPER_NECK]
    return np.where(known, HEAD_LENGTH_FROM_NECK_TO_TOP * length, 0.0)


_LONGEST_NAME, _LONGEST_PART = 1024, 255
"""Bytes of a name with its folders, and of a file's or folder's own, which is what disks take."""


def safe_name(name: str) -> bool:
    """Whether a file name stays in the folder that it is joined to, and no disk finds it long."""
    if not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return False
    parts = re.split(r"[/\\]", name)
    plain = "" not in parts and not {".", ".."} & set(parts) and ":" not in parts[0]
    return plain and all(len(part.encode()) <= _LONGEST_PART for part in parts)


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a name, links followed, is of something in the folder."""
    try:
        return safe_name(name) and (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead to each other, names too long
        return False


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
        report(unsafe, f"file name that leaves the folder ({people.images[unsafe.argmax()]!r})")
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
