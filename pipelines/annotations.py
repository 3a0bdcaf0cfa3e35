"""Reads annotation files into People: the only place that handles pixel base and missing joints.

Reads the h5 files of princeton-vl (train.h5, valid.h5), mpii_annotations.json(.gz), COCO's JSON
(coco.py), and labels of DeepLabCut, Lightning Pose and YOLO-pose (label_files.py): a Format each.
Raises InputError for a bad file.
"""

import gzip
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import LARGEST_JSON, bounded, json_numbers, parse_json
from configs.skeleton import (
    BOX_SCALE,
    BOX_SHIFT_Y_PX,
    MPII,
    MPII_HEAD_LENGTH,
    PIXELS_PER_SCALE,
    Skeleton,
)
from pipelines import label_files
from pipelines.boxes import read_people, square_about, whole_picture
from pipelines.coco import Floats, parse_coco, skeleton_of
from pipelines.jpeg import read_header
from pipelines.label_files import PROJECT, Labels, own_dataset

Boxes = Literal["auto", "keypoints", "picture"] | Path
"""How people in label files get boxes (`_from_labels`); a path: a file for `boxes.read_people`."""
Exif = Literal["auto", "turned", "stored"]
"""How pictures with an EXIF orientation were labelled (`_with_pictures`)."""

_SUFFIXES = (".h5", ".json", ".json.gz")
_FROM_PRINCETON = "an annotation file of princeton-vl/pytorch_stacked_hourglass (data/MPII/annot)"
_TOO_FAR_PX = 131_072
"""A coordinate or length that no picture has."""
_LEAST_INSIDE = 0.5
_REQUIRED, _OPTIONAL = ("center", "scale", "part", "visible"), ("normalize", "index", "person")


class People(NamedTuple):
    """N annotated people, one per row. Units and meaning of the fields: docs/conventions.md."""

    images: tuple[str, ...]
    """N file names, relative to the folder of pictures and inside it."""
    index: npt.NDArray[np.int64]  # type: ignore[assignment]
    """(N,) number of the picture in the source; -1 if the file has none."""
    person: npt.NDArray[np.int64]
    """(N,) number of the person in the picture; -1 if the file has none."""
    center: Floats
    """(N, 2) image px."""
    scale: Floats
    """(N,) box side / 200 px."""
    normalize: Floats
    """(N,) length that errors are divided by, px; 0 if unknown."""
    joints: Floats
    """(N, J, 2) image px."""
    marked: npt.NDArray[np.bool_]
    """(N, J)"""
    visible: npt.NDArray[np.bool_]
    """(N, J) True for a joint that is not marked: ignored by loss and metrics (shard_format.py)."""
    area: Floats | None = None
    """(N,) px^2 of the person, for OKS; None if the source does not give all."""
    ignored: npt.NDArray[np.object_] | None = None
    """(N,) lists of `coco.Region`: the picture's people who are not scored; None as for `area`."""
    size: Any = None
    """(N, 2) width and height of the picture as it was labelled, px; 0 or None if unknown."""
    turned: Any = None
    """(N,) 1 labelled as EXIF turns the picture, 0 as stored, -1 in neither size; without meaning
    for pictures without an EXIF orientation."""

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.images)

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """(N,) whether a person counts in PCK: it has a length to divide by and a marked joint."""
        return (self.normalize > 0) & self.marked.any(axis=1)

    @property
    def box_warning(self) -> str:
        """A warning if less than half of the marked joints are inside of their person's square."""
        offset_NJ = np.abs(self.joints - self.center[:, None]).max(axis=2)
        inside_NJ = (offset_NJ <= PIXELS_PER_SCALE * self.scale[:, None] / 2) & self.marked
        share = inside_NJ.sum() / max(1, self.marked.sum())
        text = (
            f"only {100 * share:.0f} % of the joints are inside of their person's box; check that "
            "keypoints and bbox (or center and scale) are in px, then tools/show_batch.py"
        )
        return text if inside_NJ.sum() < _LEAST_INSIDE * self.marked.sum() else ""

    def select(self, rows: npt.ArrayLike) -> "People":
        """The people of these rows, in this order."""
        rows = np.asarray(rows)
        images = tuple(self.images[row] for row in rows)
        columns: Any = (None if each is None else each[rows] for each in self[1:])
        return People(images, *columns)


def scored_text(scored: int, people: int) -> str:
    """How many people a score counts: "1,000 people", or "797 of 1,000 people"."""
    return f"{people:,} people" if scored == people else f"{scored:,} of {people:,} people"


class Format(NamedTuple):
    """How annotations of one kind are recognised and read, given their main file."""

    what: str  # the main file, for messages
    fits: Callable[[Path], bool]  # whether a look at a file finds this format
    read: Callable[[Path, str, Skeleton | None], "Labels | People"]  # the people of a split
    files: Callable[[Path], list[Path]] = lambda file: [file]  # all that contain annotations
    pictures: Callable[[Path], Path | None] = lambda file: None  # folder that names are relative to
    has_splits: bool = False  # whether one file describes both
    has_videos: bool = False  # whether the pictures of a folder are frames of a video


def find_annotations(path: Path, split: str, name: str = "auto") -> tuple[Path, Format]:
    """The main file of a split's annotations, and their format. Raises InputError.

    path: this file or its folder. name: of FORMATS; "auto": the first that fits the file.
    """
    file = split_file(path, split)
    fitting = [each for each in FORMATS if FORMATS[each].fits(file)]
    chosen = fitting[0] if name == "auto" and fitting else name
    if chosen not in (fitting or FORMATS):
        found = f"a file in the format {fitting[0]}" if fitting else "a file of an unknown kind"
        known = [name] if fitting else FORMATS
        expected = "; ".join(f"{each}: {FORMATS[each].what}" for each in known)
        raise InputError(file, found, expected, "give the right --format (tools/make_shards.py)")
    return file, FORMATS[chosen]


def read_annotations(
    path: Path,
    split: str,
    skeleton: Skeleton | None = None,
    images: Path | None = None,
    boxes: Boxes = "auto",
    name: str = "auto",
    exif: Exif = "auto",
) -> tuple[People, Skeleton]:
    """People of one split ("train" or "valid") and their joints. Raises InputError.

    path, name: as `find_annotations` takes them. skeleton: the file's joints, by default those that
    the file names, or MPII's; its length, if it has one, replaces the file's. images: the folder of
    pictures, for their sizes. exif: see `_with_pictures`.
    """
    path, kind = find_annotations(path, split, name)
    found, images = kind.read(path, split, skeleton), images or kind.pictures(path)
    if isinstance(found, Labels):
        joints = skeleton or found.skeleton
        if joints.names != found.skeleton.names:
            named, expected = (", ".join(each.names) for each in (joints, found.skeleton))
            raise InputError("--skeleton", named, f"{expected}, as in {path}", "correct its joints")
        people = _from_labels(found, images, boxes, exif)
    elif boxes != "auto":
        expected = "auto, because these annotations have boxes"
        raise InputError("--boxes", str(boxes), expected, "leave it out")
    else:
        joints, people = skeleton or MPII, found
        people = _with_pictures(people, images, exif) if images else people
    if joints.length or np.isnan(people.normalize).all():
        people = people._replace(normalize=normalizing_length(people, joints, path))
    _check(people, path)
    return _with_settings(people, joints), joints


def _with_pictures(people: People, folder: Path, exif: Exif) -> People:
    """Set `size` and `turned` by the rule of docs/conventions.md. People.size: in the labels."""
    names = [name for name in set(people.images) if stays_inside(folder, name)]
    header = {name: read_header(folder / name) for name in names}
    headers_N3 = np.array([header.get(name, (1, 1, 1)) for name in people.images]).reshape(-1, 3)
    stored_N2 = headers_N3[:, :2]
    turned_N2 = np.where(headers_N3[:, 2:] >= 5, stored_N2[:, ::-1], stored_N2)
    label_N2 = 0 * stored_N2 if people.size is None else people.size
    is_turned_N, is_stored_N = ((label_N2 == px_N2).all(axis=1) for px_N2 in (turned_N2, stored_N2))
    others = exif != "stored"
    if exif == "auto":
        told_N = is_turned_N[is_turned_N != is_stored_N]
        outside = [(people.joints > px[:, None] - 0.5).sum() for px in (turned_N2, stored_N2)]
        others = told_N.mean() >= 0.5 if len(told_N) else outside[0] <= outside[1]
    turned_N = np.where(is_turned_N == is_stored_N, others, is_turned_N).astype(np.int8)
    turned_N[(label_N2 > 0).all(axis=1) & ~is_turned_N & ~is_stored_N] = -1
    size_N2 = np.where(turned_N[:, None] == 1, turned_N2, stored_N2)
    return people._replace(size=size_N2, turned=turned_N)


def _with_settings(people: People, skeleton: Skeleton) -> People:
    """Apply the skeleton's `occluded`, `outside` and `unmarked`. Raises InputError.

    Ignored joints become visible, but not marked (shard_format.py).
    """
    marked, visible = people.marked, people.visible
    ignored_NJ = marked & ~visible & (skeleton.occluded == "ignore")
    ignored_NJ |= ~marked & (skeleton.unmarked == "ignore")
    if skeleton.outside != "use":
        if people.turned is None:
            found, why = f"outside: {skeleton.outside}", "the folder of pictures, for their sizes"
            raise InputError(skeleton.name, found, why, "give it with --images")
        is_inside = (people.joints >= -0.5) & (people.joints <= people.size[:, None] - 0.5)
        outside_NJ = marked & ~is_inside.all(axis=-1)
        marked = marked & ~outside_NJ
        ignored_NJ |= outside_NJ & (skeleton.outside == "ignore")
    marked = marked & ~ignored_NJ
    return people._replace(marked=marked, visible=visible & marked | ignored_NJ)


def split_file(path: Path, split: str) -> Path:
    """The path itself or, of a folder, the file of its project or split. Raises InputError."""
    path = next((path / name for name in (PROJECT, "data.yaml") if (path / name).is_file()), path)
    files = [path / f"{split}{suffix}" for suffix in _SUFFIXES] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise InputError(path, names, f"one file for {split}", "give one of them")
    if not found:
        expected = f"{_FROM_PRINCETON}, mpii_annotations.json, or COCO's JSON"
        advice = "give the file or its folder with --annotations (make_shards.py: or one --splits)"
        names = ", ".join(file.name for file in files)
        raise InputError(path, f"no {names}" if path.is_dir() else "no such file", expected, advice)
    return found[0]


def _json_type(path: Path) -> type | None:
    """dict or list, as a JSON file begins; None for other names."""
    opener, start = gzip.open if path.name.endswith(".gz") else open, b""
    with suppress(OSError, EOFError, zlib.error), opener(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    is_json = path.name.endswith((".json", ".json.gz"))
    return (dict if start.startswith(b"{") else list) if is_json else None


def _is_h5(path: Path) -> bool:
    return path.suffix == ".h5" and not path.match("CollectedData*")


def _read_h5(path: Path, split: str, skeleton: Skeleton | None) -> People:
    try:
        columns = _h5_columns(path, (skeleton or MPII).joint_count)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        found = f"not a readable HDF5 file of people ({str(error)[:120]})"
        advice = "give --skeleton FILE.yaml for other joints than MPII's, or another --format"
        raise InputError(path, found, _FROM_PRINCETON, advice) from error
    unknown = np.full(len(columns["imgname"]), -1.0)
    return People(
        images=tuple(columns["imgname"]),
        index=_whole_numbers(columns.get("index", unknown), f"{path}: dataset index"),
        person=_whole_numbers(columns.get("person", unknown), f"{path}: dataset person"),
        center=columns["center"],
        scale=columns["scale"],
        normalize=columns.get("normalize", np.nan * unknown),
        joints=columns["part"],
        marked=columns["part"][..., 0] != 0,
        visible=columns["visible"] > 0,
    )


def _h5_columns(path: Path, joints: int) -> dict[str, npt.NDArray[Any]]:
    """The datasets that are used: imgname as (N,) text, others float64 with their shapes checked.

    Optional ones may be missing. Raises what h5py raises, or ValueError.
    """
    shapes = {"imgname": (), "center": (2,), "part": (joints, 2), "visible": (joints,)}
    columns: dict[str, npt.NDArray[Any]] = {}
    with h5py.File(path) as file:
        for name in ("imgname", *_REQUIRED, *_OPTIONAL):
            if name in _OPTIONAL and file.get(name, getlink=True) is None:
                continue
            data = own_dataset(file, name)
            is_text = h5py.check_string_dtype(data.dtype) is not None
            count = len(columns.get("imgname", data))
            expected = (count, *shapes.get(name, ()))
            right_type = is_text if name == "imgname" else data.dtype.kind in "fiub"
            if data.shape != expected or not right_type:
                raise ValueError(f"{name}: {data.dtype} of shape {data.shape}, not {expected}")
            columns[name] = data.asstr()[()] if is_text else data[()].astype(np.float64)
    return columns


def _whole_numbers(values: Floats, where: str) -> npt.NDArray[np.int64]:
    fits = np.abs(values) < 2**53  # False for NaN
    if not fits.all():
        row = fits.argmin()
        raise InputError(where, f"{values[row]} in row {row}", "whole numbers", "correct this row")
    return values.astype(np.int64)


def _load_json(path: Path, kind: type) -> Any:
    """MPII's list of people or COCO's dict."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            data = parse_json(bounded(file.read(LARGEST_JSON + 1), LARGEST_JSON))
        is_coco = isinstance(data, dict) and {"images", "annotations"} <= data.keys()
        if not data or not isinstance(data, kind) or not (is_coco or kind is list):
            keys = f" with {', '.join(map(str, data))}"[:80] if isinstance(data, dict) else ""
            raise ValueError(f"a JSON {type(data).__name__}{keys}")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        expected = "a JSON list of people, or COCO's dict of images and annotations"
        found = f"not usable ({error})"
        raise InputError(path, found, expected, "correct the file") from error
    return data


def _read_mpii(path: Path, split: str, skeleton: Skeleton | None) -> People:
    """MPII's own scale and centre, enlarged here as in the h5 files."""
    images, numbers, joints, joint_count = [], [], [], (skeleton or MPII).joint_count
    for number, entry in enumerate(_load_json(path, list)):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("img_paths"), str):
            raise InputError(where, str(entry)[:100], "a dict with img_paths", "correct the file")
        if bool(json_numbers(entry, "isValidation", (), where)) != (split == "valid"):
            continue
        entry = {"annolist_index": -1, "people_index": -1, **entry}
        images.append(entry["img_paths"])
        joints.append(json_numbers(entry, "joint_self", (joint_count, 3), where))
        keys = ("annolist_index", "people_index", "scale_provided")
        center = json_numbers(entry, "objpos", (2,), where)
        numbers.append([*(json_numbers(entry, key, (), where) for key in keys), *center])
    joints_NJ3 = np.array(joints).reshape(-1, joint_count, 3)
    index, person, raw_scale, x, y = np.array(numbers, dtype=np.float64).reshape(-1, 5).T
    marked = joints_NJ3[..., 0] != 0
    return People(
        images=tuple(images),
        index=_whole_numbers(index, f"{path}: annolist_index"),
        person=_whole_numbers(person, f"{path}: people_index"),
        center=np.stack([x, y + BOX_SHIFT_Y_PX * raw_scale], axis=1),
        scale=BOX_SCALE * raw_scale,
        normalize=np.nan * raw_scale,
        joints=joints_NJ3[..., :2],
        marked=marked,
        visible=marked & (joints_NJ3[..., 2] > 0),
    )


def _read_coco(path: Path, split: str, skeleton: Skeleton | None) -> Labels:
    data = _load_json(path, dict)
    joints = skeleton or skeleton_of(data, path)
    images, box_N4, keypoints_NJ3, columns = parse_coco(data, path, joints)
    return Labels(images, box_N4, keypoints_NJ3, joints, columns=columns)


def _from_labels(labels: Labels, images: Path | None, boxes: Boxes, exif: Exif) -> People:
    """The people of label files.

    boxes: "auto" uses the file's boxes, or the whole picture if it has none; "picture" the whole
    picture; "keypoints" the box around the marked joints; a path the boxes in that file. People
    without a marked joint or a box with an area are not used, and counted on stderr.
    """
    v_NJ, unknown = labels.keypoints_NJ3[..., 2], np.full(len(labels.images), -1)
    people = People(
        images=labels.images,
        center=labels.box_N4[:, :2],
        scale=labels.box_N4[:, 2],
        normalize=np.nan * unknown,
        joints=labels.keypoints_NJ3[..., :2],
        marked=v_NJ > 0,
        # A file without a 2 does not say which joints are occluded.
        visible=v_NJ > (1 if (v_NJ == 2).any() else 0),
        **{"index": unknown, "person": unknown, **labels.columns},
    )
    people = _with_pictures(people, images, exif) if images else people
    box_N4 = labels.box_N4
    if labels.is_relative:
        box_N4 = box_N4 * np.tile(people.size, 2)
        people = people._replace(joints=people.joints * people.size[:, None])
    squares_N3 = np.array(_squares(people, box_N4, boxes), dtype=np.float64).reshape(-1, 3)
    is_kept = people.marked.any(axis=1) & (squares_N3[:, 2] > 0)
    if not is_kept.all():
        count = (~is_kept).sum()
        print(f"labels not used: {count:,} without a marked joint or a box", file=sys.stderr)
    people = people._replace(center=squares_N3[:, :2], scale=squares_N3[:, 2])
    return people.select(np.flatnonzero(is_kept))


def _squares(people: People, box_N4: Floats, boxes: Boxes) -> list[tuple[float, ...]]:
    """x, y and scale of each person; the scale is 0 or less if it has no box."""
    if isinstance(boxes, Path):
        given = {person.image: person.square for person in read_people(boxes)}
        return [given.get(image) or (0, 0, 0) for image in people.images]
    if boxes == "picture" or (boxes == "auto" and np.isnan(box_N4).all()):
        return [whole_picture(*size) for size in people.size.tolist()]
    # Box corners are counted from the picture's corner; square_about counts from pixel centres.
    if boxes == "keypoints":
        is_marked = people.marked[..., None]
        low = people.joints.min(axis=1, where=is_marked, initial=np.inf)
        high = people.joints.max(axis=1, where=is_marked, initial=-np.inf)
        box_N4 = np.concatenate([low + 0.5, high - low], axis=1)
    return [square_about(box) for box in box_N4.tolist()]


def normalizing_length(people: People, skeleton: Skeleton, path: Path) -> Floats:
    """(N,) the length that errors are divided by, px; 0 if one of its two joints is unmarked.

    From the skeleton's rule, or the head for MPII's joints without a rule. Else raises InputError.
    """
    rule = skeleton.length or (MPII_HEAD_LENGTH if skeleton.same_joints(MPII) else None)
    if rule is None:
        expected, advice = "`normalize` in the skeleton's file", "add it (docs/custom-data.md)"
        raise InputError(path, "no length to divide errors by", expected, advice)
    if not rule.joints:
        return rule.factor * people.scale * PIXELS_PER_SCALE / BOX_SCALE
    a, b = rule.joints
    length = rule.factor * np.linalg.norm(people.joints[:, a] - people.joints[:, b], axis=-1)
    return np.where(people.marked[:, a] & people.marked[:, b], length, 0.0)


def safe_name(name: str) -> bool:
    """Whether a file name stays in the folder that it is joined to, and file systems accept it."""
    parts = re.split(r"[/\\]", name)
    inside = not {"", ".", ".."} & {*parts} and ":" not in parts[0]
    return inside and name.isprintable() and max(len(part.encode()) for part in parts) <= 255


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a name stays in the folder when links are followed."""
    try:
        return safe_name(name) and (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # circular links
        return False


def _check(people: People, path: Path) -> None:
    """Raise one InputError that names the first rows with impossible values."""
    if people.count == 0:
        raise InputError(path, "no people in this split", "at least one", "check the file")
    unsafe = np.array([not safe_name(name) for name in people.images])
    side_px = PIXELS_PER_SCALE * people.scale
    checks = {
        f"file name that leaves the folder ({people.images[unsafe.argmax()]!r})": unsafe,
        "center out of range": ~(np.abs(people.center) < _TOO_FAR_PX).all(axis=1),
        "scale out of range": ~((side_px > 0) & (side_px < _TOO_FAR_PX)),
        "normalize not a length": ~((people.normalize >= 0) & (people.normalize < _TOO_FAR_PX)),
        "joints out of range": ~(np.abs(people.joints) < _TOO_FAR_PX).all(axis=(1, 2)),
    }
    faults = [
        f"{text} in {rows.sum()} row(s), the first {rows.argmax()}"
        for text, rows in checks.items()
        if rows.any()
    ]
    if faults:
        expected = f"px below {_TOO_FAR_PX:,}, scale above 0, names inside the folder of pictures"
        raise InputError(path, "; ".join(faults), expected, "correct them (rows count from 0)")


FORMATS = {
    "yolo": Format(
        "data.yaml with kpt_shape",
        label_files.is_yolo,
        label_files.read_yolo,
        label_files.yolo_files,
        label_files.yolo_root,
        has_splits=True,
    ),
    "coco": Format("a JSON dict", lambda file: _json_type(file) is dict, _read_coco),
    "mpii": Format(
        "a JSON list", lambda file: _json_type(file) is list, _read_mpii, has_splits=True
    ),
    "h5": Format("an .h5 file as docs/custom-data.md describes it", _is_h5, _read_h5),
    "deeplabcut": Format(
        "a project's config.yaml, or its table, .csv or .h5",
        lambda file: label_files.is_table(file) or file.name == PROJECT,
        label_files.read_deeplabcut,
        label_files.deeplabcut_files,
        lambda file: file.parent,
        has_videos=True,
    ),
    "lightning-pose": Format(
        "a .csv table",
        lambda file: file.suffix == ".csv",
        label_files.read_table,
        pictures=lambda file: file.parent,
        has_videos=True,
    ),
}
"""The formats by name. Of several that fit a file, the first is taken."""
