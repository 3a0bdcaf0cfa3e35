"""Where people are in pictures, as a user says it: a box, or MPII's centre and scale, or nothing.

Boxes are (x, y, width, height) in px, as COCO's and OpenCV's: (0, 0, W, H) is a whole picture of
W x H px. docs/conventions.md says how a box becomes the square that the network sees.
"""

import codecs
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import parse_json, read_bytes
from configs.skeleton import BOX_SCALE, PIXELS_PER_SCALE

MARGIN = BOX_SCALE
"""Side of the square over the longer side of a box drawn tightly about a person: MPII's own."""

_LARGEST = 4
"""Half the side of a square over the picture's longer side; more is a mistake in the unit."""
_LARGEST_FILE = 64 << 20
_COLUMNS = "image, and x, y, width, height, or center_x, center_y, scale; image_id if wanted"


class Square(NamedTuple):
    """The part of a picture that the network sees."""

    x: float
    """Of the centre, image px."""
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
    """Number of the picture in a COCO data set, if the user gave one."""


def square_about(box: Sequence[float], margin: float = MARGIN) -> Square:
    """The square about the middle of a box x, y, width, height (px); side: margin x longer side."""
    x, y, width, height = box
    # A box counts pixels: one of width 1 at x covers the pixel x alone, whose centre is x.
    middle = x + (width - 1) / 2, y + (height - 1) / 2
    return Square(*middle, margin * max(width, height) / PIXELS_PER_SCALE)


def whole_picture(width: int, height: int) -> Square:
    """The square about a whole picture, without a margin."""
    return square_about((0, 0, width, height), margin=1.0)


def check_square(square: Square, width: int, height: int, where: str) -> None:
    """Raise InputError if a square does not fit a picture of that size (px)."""
    half = PIXELS_PER_SCALE * square.scale / 2
    if not (math.isfinite(sum(square)) and 0 < half < _LARGEST * max(width, height)):
        raise InputError(
            where,
            f"centre ({square.x:g}, {square.y:g}), scale {square.scale:g}",
            f"finite numbers, and a square of 200 px x scale that is above 0 px and less than "
            f"{2 * _LARGEST} times the picture, which is {width} x {height} px",
            "correct the box, or the centre and scale",
        )
    inside_x = -half < square.x < width - 1 + half
    inside_y = -half < square.y < height - 1 + half
    if not (inside_x and inside_y):
        raise InputError(
            where,
            f"a square of {2 * half:g} px about ({square.x:g}, {square.y:g})",
            f"one that shows some of the picture, which is {width} x {height} px",
            "correct the box, or the centre and scale; they count in px of the picture as shown",
        )


def read_people(path: Path, margin: float = MARGIN) -> list[Person]:
    """The people that a CSV or JSON file names, in its order. Raises InputError.

    CSV: a header and a line a person. JSON: a list of objects with the same names, or with `box`
    (four numbers) or `center` (two) and `scale`. Values that are left out: the whole picture.
    margin: of boxes; centre and scale are taken as they are.
    """
    people = []
    for number, row in enumerate(_read_rows(path)):
        try:
            people.append(_person(row, margin))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path}: person {number}",
                f"{type(error).__name__}: {error}",
                _COLUMNS,
                "correct it (people count from 0)",
            ) from error
    return people


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(path, "no such file", "a .csv or .json of people", "give its path")
    try:
        data = read_bytes(path, _LARGEST_FILE).removeprefix(codecs.BOM_UTF8)
        if path.suffix == ".json":
            rows = parse_json(data)
        else:
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    except (ValueError, csv.Error) as error:
        raise InputError(
            path, f"not readable ({error})", f"a .csv or .json with {_COLUMNS}", "correct it"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise InputError(path, "nobody in it", f"a list of people with {_COLUMNS}", "correct it")
    return rows


def _person(row: dict[str, Any], margin: float) -> Person:
    given = {name: value for name, value in row.items() if value not in (None, "")}
    unknown = given.keys() - {
        "image", "image_id", "box", "x", "y", "width", "height",
        "center", "center_x", "center_y", "scale",
    }  # fmt: skip
    if unknown:
        raise ValueError(f"unknown {', '.join(map(str, unknown))}")
    image_id = int(given["image_id"]) if "image_id" in given else None
    return Person(str(given["image"]), _square(given, margin), image_id)


def _square(given: dict[str, Any], margin: float) -> Square | None:
    box = given.get("box") or [
        given[name] for name in ("x", "y", "width", "height") if name in given
    ]
    center = given.get("center") or [
        given[name] for name in ("center_x", "center_y") if name in given
    ]
    if box and not center and "scale" not in given:
        x, y, width, height = map(float, box)
        if width <= 0 or height <= 0:
            raise ValueError(f"a box of {width:g} x {height:g} px")
        return square_about((x, y, width, height), margin)
    if center and not box:
        x, y = map(float, center)
        return Square(x, y, float(given["scale"]))
    if box or "scale" in given:
        raise ValueError("a box, or a centre with its scale, and not both")
    return None
