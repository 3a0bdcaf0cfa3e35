"""Positions of people in pictures: a box, MPII's centre and scale, or the whole picture.

Boxes are (x, y, width, height) in px, as in COCO and OpenCV: (0, 0, W, H) is a whole picture of
W x H px. docs/conventions.md says how a box becomes the network's input square.
"""

import csv
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import info
from common.errors import InputError
from common.files import parse_json, read_bytes
from configs.skeleton import BOX_SCALE, PIXELS_PER_SCALE
from pipelines.coco import ImageIndex, read_image_index

MARGIN = BOX_SCALE
"""Side of the square / longer side of a tight box around the person, as in MPII."""

_LARGEST = 4
"""Maximum of half the square's side / the picture's longer side; above it the unit is wrong."""
_LARGEST_FILE = 64 << 20
_BOX, _CENTER = ("x", "y", "width", "height"), ("center_x", "center_y")
_COLUMNS = (
    "image (or frame, of a video), and x, y, width, height, or center_x, center_y, scale; "
    "optional image_id, score"
)


class Square(NamedTuple):
    """The part of a picture that the network sees."""

    x: float
    """Centre, image px, as is `y`."""
    y: float
    scale: float
    """Side / 200 px."""


class Person(NamedTuple):
    """One person to find in a picture."""

    image: str
    """File name of the picture, relative to the folder of pictures."""
    square: Square | None
    """None: the whole picture."""
    image_id: int | None = None
    """COCO's number of the picture, if the user gave one."""
    score: float | None = None
    """The detector's confidence in the box, if the file has one."""
    frame: int = 0
    """Number of the video's frame, from 0."""


def square_about(box: Sequence[float], margin: float = MARGIN) -> Square:
    """The square about the middle of a box x, y, width, height (px); side: margin x longer side."""
    x, y, width, height = box
    # A box of width 1 at x covers only pixel x, whose centre is x.
    middle = x + (width - 1) / 2, y + (height - 1) / 2
    return Square(*middle, margin * max(width, height) / PIXELS_PER_SCALE)


def whole_picture(width: int, height: int) -> Square:
    """The square about a whole picture, without a margin."""
    return square_about((0, 0, width, height), margin=1.0)


def check_square(square: Square, width: int, height: int, where: str) -> None:
    """Raise InputError unless the square overlaps a picture of this size (px)."""
    half = PIXELS_PER_SCALE * square.scale / 2
    is_sane = math.isfinite(sum(square)) and 0 < half < _LARGEST * max(width, height)
    overlaps = -half < square.x < width - 1 + half and -half < square.y < height - 1 + half
    if not (is_sane and overlaps):
        raise InputError(
            where,
            f"a square of {2 * half:g} px about ({square.x:g}, {square.y:g})",
            f"a square that overlaps the picture, {width} x {height} px, of less than 8 x its side",
            "correct the box, or centre and scale (side / 200 px), in px of the upright picture",
        )


def read_people(
    path: Path, margin: float = MARGIN, *, annotations: Path | None = None, in_video: bool = False
) -> list[Person]:
    """The people in a CSV or JSON file, in its order. Raises InputError.

    CSV: a header and one line per person. JSON: a list of objects with the same names, or with
    `box` (four numbers) or `center` (two) and `scale`; or COCO detections, whose file names are in
    `annotations`, COCO's file. Without a box or centre: the whole picture. margin: applied to
    boxes, not to centre and scale. in_video: rows have a `frame` instead of an `image`; the
    `image_id` of COCO detections is the frame's number.
    """
    coco = read_image_index(annotations) if annotations else None
    people, others = [], 0
    for number, row in enumerate(_read_rows(path)):
        try:
            if isinstance(row, dict) and "bbox" in row and "image" not in row:
                if coco and coco.categories and row.get("category_id") not in coco.categories:
                    others += 1
                    continue
                row = _from_detection(row, coco, in_video)
            people.append(_person(row, margin, in_video))
        except ValueError as error:
            where, advice = f"{path}: person {number}", "correct it (people count from 0)"
            raise InputError(where, str(error), _COLUMNS, advice) from error
    if others:
        info(f"{path}: {others:,} detections of other categories are not used")
    if not people:
        raise InputError(path, "no people", "detections of people", "give another file")
    return people


def _from_detection(row: dict[str, Any], coco: ImageIndex | None, in_video: bool) -> dict[str, Any]:
    """A detection in COCO's result format with the names of a people file. Raises ValueError."""
    if in_video:
        return {"frame": row.get("image_id"), "box": row["bbox"] or [], "score": row.get("score")}
    if coco is None:
        raise ValueError("a COCO detection, but no --annotations FILE with the pictures' names")
    image_id = row.get("image_id")
    if not isinstance(image_id, int) or image_id not in coco.names:
        raise ValueError(f"image_id {image_id!r:.50} is not in the annotation file")
    kept: dict[str, Any] = {name: row[name] for name in ("image_id", "score") if name in row}
    return {**kept, "image": coco.names[image_id], "box": row["bbox"] or []}


def _read_rows(path: Path) -> list[Any]:
    expected = f"a .csv or .json with a list of people: {_COLUMNS}"
    try:
        data = read_bytes(path, _LARGEST_FILE)
        if path.suffix == ".json":
            rows = parse_json(data)
        else:
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
        if not isinstance(rows, list):
            raise ValueError("no list")
    except (FileNotFoundError, ValueError, csv.Error) as error:
        raise InputError(path, f"not readable ({error})", expected, "correct it") from error
    return rows


def _person(row: Any, margin: float, in_video: bool) -> Person:
    """Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not an object with names")
    given = {name: value for name, value in row.items() if value not in (None, "")}
    for name, parts in (("box", _BOX), ("center", _CENTER)):
        values = given.pop(name, None)
        if values is not None:
            if not isinstance(values, list) or len(values) != len(parts):
                raise ValueError(f"{name} is not a list of {len(parts)} numbers")
            given |= zip(parts, values, strict=True)
    image = given.pop("image", "" if in_video else None)
    if not isinstance(image, str):
        raise ValueError("no image")
    if in_video != ("frame" in given):
        raise ValueError("a frame, but the input is no video" if "frame" in given else "no frame")
    numbers = {name: _number(name, value) for name, value in given.items()}
    image_id, frame = (_whole(name, numbers.pop(name, None)) for name in ("image_id", "frame"))
    score = numbers.pop("score", None)
    return Person(image, _square(numbers, margin), image_id, score, frame or 0)


def _square(numbers: dict[str, float], margin: float) -> Square | None:
    """The square of a row's other numbers; None for the whole picture. Raises ValueError."""
    if not numbers:
        return None
    if numbers.keys() == {*_BOX}:
        box = [numbers[name] for name in _BOX]
        if not min(box[2:]) > 0:
            raise ValueError(f"a box of {box[2]:g} x {box[3]:g} px")
        return square_about(box, margin)
    if numbers.keys() == {*_CENTER, "scale"}:
        return Square(numbers["center_x"], numbers["center_y"], numbers["scale"])
    raise ValueError(f"neither a box nor centre and scale: {', '.join(map(str, numbers))}")


def _whole(name: str, number: float | None) -> int | None:
    """Raises ValueError for a number below 0 or with a fraction."""
    if number is not None and not (number >= 0 and number.is_integer()):
        raise ValueError(f"{name} {number:g} is not a whole number of 0 or more")
    return None if number is None else int(number)


def _number(name: str, value: Any) -> float:
    """The number in a cell of a CSV file or in a JSON value. Raises ValueError."""
    with suppress(ValueError):
        if type(value) in (str, int, float) and len(str(value)) <= 300:
            return float(value)
    raise ValueError(f"{name} is not a number: {value!r:.50}")
