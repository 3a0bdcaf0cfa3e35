"""Parses COCO keypoint annotations by the rules of docs/conventions.md."""

import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import json_numbers, read_json
from configs.skeleton import Skeleton, parse_skeleton, shipped_skeleton, with_named_pairs

Floats = npt.NDArray[np.float64]

_FIX = "correct it in the program that wrote the file"
_KEYPOINT_FILE = "give a file with keypoints, such as COCO's person_keypoints_*.json"
_CROWD, _NO_JOINT = "crowds", "without a marked joint"
Region = list[float]
"""x, y, width, height, area (0 if unknown), iscrowd of an annotation that COCO's metric ignores."""


def parse_coco(
    data: dict[str, Any], path: Path, skeleton: Skeleton
) -> tuple[tuple[str, ...], Floats, Floats, dict[str, Any]]:
    """N people with the skeleton's joints, in the order of the file.

    Returns N file names, (N, 4) boxes x, y, width, height (image px, from the corner of the
    picture; NaN for none with an area), (N, J, 3) keypoints x, y, v (v is 0 for not marked, where
    x and y become 0, 1 occluded, 2 visible), and the columns index, person, size, area and ignored
    of People. Prints how many annotations were left out. Raises InputError.
    """
    names = _image_names(data["images"], path)
    categories = _categories(data.get("categories", []), path, skeleton)
    left_out, kept, regions = Counter[str](), [], defaultdict[Any, list[Region]](list)
    entries = _dicts(data["annotations"], f"{path}: annotations")
    if entries and not any(entry.get("keypoints") for entry in entries):
        found, advice = "no annotation has `keypoints` (a file for detection?)", _KEYPOINT_FILE
        raise InputError(path, found, "keypoints of each person", advice)
    for number, entry in enumerate(entries):
        where = f"{path}: annotation {number}"
        reason = _why_left_out(entry, categories)
        if reason:
            left_out[reason] += 1
            if reason in (_CROWD, _NO_JOINT) and entry.get("bbox"):
                box = json_numbers(entry, "bbox", (4,), where).tolist()
                area = float(json_numbers({"area": 0, **entry}, "area", (), where))
                regions[str(entry.get("image_id"))].append([*box, area, int(reason == _CROWD)])
        else:
            kept.append(_row(entry, names, skeleton.joint_count, where))
    if left_out:
        what = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        print(f"{path}: annotations not used: {what}", file=sys.stderr)
    ids = np.array([row[0] for row in kept], dtype=np.int64).reshape(-1, 2)
    each, uses = np.unique(ids[:, 1], return_counts=True)
    if (uses > 1).any():
        found = f"id {each[uses.argmax()]} of {uses.max()} annotations"
        raise InputError(path, found, "a different id for each annotation", _FIX)
    boxes = np.array([row[1] for row in kept]).reshape(-1, 4)
    keypoints = np.array([row[2] for row in kept]).reshape(-1, skeleton.joint_count, 3)
    sizes = {each["id"]: [each.get("width"), each.get("height")] for each in data["images"]}
    size = [
        [n if type(n) is int and 0 < n < 1 << 31 else 0 for n in sizes[image]]
        for image in ids[:, 0].tolist()
    ]
    more: dict[str, Any] = {"index": ids[:, 0], "person": ids[:, 1]}
    more["size"] = np.array(size, dtype=np.int64).reshape(-1, 2)
    if all(row[3] is not None for row in kept):
        more["area"] = np.array([row[3] for row in kept], dtype=np.float64)
        more["ignored"] = object_array([regions[str(image)] for image in ids[:, 0].tolist()])
    return tuple(names[image] for image in ids[:, 0].tolist()), boxes, keypoints, more


class ImageIndex(NamedTuple):
    """File names and categories of an annotation file, which COCO results do not contain."""

    names: dict[int, str]
    """File name of each image id."""
    categories: list[Any] | None
    """Ids of the categories with joints; None if the file names no joints."""


def read_image_index(path: Path) -> ImageIndex:
    """The images and categories of COCO's annotation or image_info file. Raises InputError."""
    expected = "COCO's JSON with images"
    try:
        data = read_json(path)
        if not isinstance(data, dict) or "images" not in data:
            raise ValueError(f"a {type(data).__name__} without images")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(path, f"not readable ({error})", expected, "give another file") from error
    categories = _dicts(data.get("categories", []), f"{path}: categories")
    with_joints = [entry.get("id") for entry in categories if entry.get("keypoints")]
    return ImageIndex(_image_names(data["images"], path), with_joints or None)


def _dicts(raw: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(raw, list) and all(isinstance(entry, dict) for entry in raw):
        return raw
    raise InputError(where, "another type", "a list of dicts", _FIX)


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _image_names(raw: Any, path: Path) -> dict[int, str]:
    """The file name of each image id."""
    images: dict[int, str] = {}
    for number, entry in enumerate(_dicts(raw, f"{path}: images")):
        image, name = entry.get("id"), entry.get("file_name")
        if not _is_id(image) or image in images or not isinstance(name, str):
            expected = "a whole number that no other image has, and a name"
            found = f"id {image!r}, file_name {name!r}"
            raise InputError(f"{path}: image {number}", found, expected, _FIX)
        images[image] = name
    return images


def _categories(raw: Any, path: Path, skeleton: Skeleton) -> list[Any] | None:
    """Ids of the categories with the skeleton's joints; None if the file names no joints."""
    named = [entry for entry in _dicts(raw, f"{path}: categories") if entry.get("keypoints")]
    names = list(skeleton.names)
    found = [entry.get("id") for entry in named if entry["keypoints"] == names]
    if not named or found:
        return found or None
    where, theirs = f"{path}: categories", f"the joints {named[0]['keypoints']!r}"
    expected = f"those of the skeleton {skeleton.name}, in its order: {', '.join(names)}"
    raise InputError(where, theirs, expected, "use this file's names in the skeleton's YAML")


def skeleton_of(data: dict[str, Any], path: Path) -> Skeleton:
    """The joints that the file names, as in configs/skeletons if they are there.

    Otherwise with the file's limbs if all are pairs of its joints, the flip pairs that the names
    give, and a length of 0.4 x the box. Raises InputError.
    """
    where, advice = f"{path}: categories", "give --skeleton FILE.yaml (docs/custom-data.md)"
    named = [each for each in _dicts(data.get("categories", []), where) if each.get("keypoints")]
    if not named or not isinstance(named[0]["keypoints"], list):
        raise InputError(where, "no names of joints", "a category with `keypoints`", advice)
    names, pairs = named[0]["keypoints"], named[0].get("skeleton")
    number = {str(j): name for j, name in enumerate(names, start=1)}
    raw = {"name": named[0].get("name"), "joints": names, "flip_pairs": [], "mirror": False}
    lists = [each for each in (pairs if isinstance(pairs, list) else []) if isinstance(each, list)]
    limbs = [[number.get(str(joint), joint) for joint in each] for each in lists]
    # Limbs are only drawn. Those of CrowdPose are COCO's, not of its own joints.
    raw["limbs"] = limbs if all(joint in names for limb in limbs for joint in limb) else []
    try:
        shipped = shipped_skeleton(names)
        return shipped or with_named_pairs(parse_skeleton({**raw, "normalize": {"box": 0.4}}))
    except ValueError as error:
        raise InputError(where, str(error), "names and limbs of joints", advice) from error


def _why_left_out(entry: dict[str, Any], categories: list[Any] | None) -> str:
    """Why an annotation is not a person to train or evaluate on; empty for a person."""
    if categories is not None and entry.get("category_id") not in categories:
        return "of other categories"
    if entry.get("iscrowd"):
        return _CROWD
    keypoints = entry.get("keypoints") or []
    if isinstance(keypoints, list) and not any(keypoints[2::3]):
        return _NO_JOINT
    return ""


def object_array(values: Collection[Any]) -> npt.NDArray[np.object_]:
    """A one-dimensional array of these objects, such as lists of different lengths."""
    return np.fromiter(values, dtype=object, count=len(values))


def _row(
    entry: dict[str, Any], images: dict[int, str], joints: int, where: str
) -> tuple[list[int], Floats, Floats, Floats | None]:
    """Ids of image and annotation, box (4,), keypoints (J, 3), area or None. Raises InputError.

    The box is NaN if the annotation has none with an area.
    """
    image, number = entry.get("image_id"), entry.get("id")
    if not _is_id(image) or image not in images or not _is_id(number):
        found = f"image_id {image!r}, id {number!r}"
        raise InputError(where, found, "the id of an image in the file, and a whole number", _FIX)
    keypoints = json_numbers(entry, "keypoints", (3 * joints,), where).reshape(joints, 3)
    if not np.isin(keypoints[:, 2], (0, 1, 2)).all():
        found = f"visibilities {sorted(set(keypoints[:, 2].tolist()))}"
        raise InputError(where, found, "0, 1 and 2", _FIX)
    keypoints[keypoints[:, 2] == 0] = 0.0  # x and y are undefined there
    box = json_numbers({**entry, "bbox": entry.get("bbox") or [0] * 4}, "bbox", (4,), where)
    box = np.where((box[2:] > 0).all(), box, np.nan)
    area = json_numbers(entry, "area", (), where) if "area" in entry else None
    return [image, number], box, keypoints, area
