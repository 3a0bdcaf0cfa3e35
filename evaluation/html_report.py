"""The result as one HTML page that needs nothing else: numbers, curves, bars and pictures.

Everything that the page shows is in one block of JSON inside it, `results` being what --json
writes; page.js draws from that block alone. Text from data gets into the page as JSON, and from
there as text, never as markup.
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from common.cli import progress
from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from evaluation import pckh, visualize
from evaluation.report import ReferenceRun, data_mismatch
from pipelines import geometry
from pipelines.annotations import People
from pipelines.opencv_loader import Source

PER_GALLERY = 24
_WORST_OF_JOINTS = 64
"""Further people, shared out among the joints: those who are worst at each of them."""
_WORST_OF_A_JOINT = 4
_PICTURE_BYTES = 3_500_000
_QUALITIES = (80, 65, 50, 35, 20, 10)
"""Of JPEG; the first with which all pictures fit into _PICTURE_BYTES as base64."""


class ReportData(NamedTuple):
    """Whose pictures are on the page, and what was predicted for them."""

    people: People
    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    skeleton: Skeleton
    source: Source | None
    """None where no pictures are at hand: skeletons alone are shown."""
    samples: npt.NDArray[np.int64]
    """(N,) number in the source of each person."""


def html_report(
    facts: dict[str, Any],
    results: dict[str, dict[str, Any]],
    other: ReferenceRun | None,
    shown: ReportData,
    per_gallery: int = PER_GALLERY,
) -> str:
    """The page. facts: of the run, as in --json. results: a name and a `pckh.summary` each.

    per_gallery: people in each of the galleries worst, median, best.
    """
    errors = pckh.normalized_errors(shown.keypoints_NJ2, shown.people)
    galleries = choose_people(errors, per_gallery)
    rows = sorted({row for chosen in galleries.values() for row in chosen})
    skeleton = shown.skeleton
    data = {
        "facts": facts,
        "results": results,
        "other": other._asdict() if other else None,
        "doubt": data_mismatch(next(iter(results.values())), other.result) if other else None,
        "skeleton": {
            "names": [name or f"joint {j}" for j, name in enumerate(skeleton.names)],
            "sides": skeleton.sides,
            "limbs": skeleton.limbs,
            "groups": skeleton.groups,
        },
        "tile_px": visualize.TILE_PX,
        "galleries": galleries,
        "people": {
            row: {**_person(shown, errors, row), "jpeg": jpeg}
            for row, jpeg in zip(rows, _pictures(shown, rows), strict=True)
        },
    }
    return _fill(data)


def choose_people(errors_NJ: pckh.Floats, per_gallery: int) -> dict[str, list[int]]:
    """Rows of the galleries worst, median, best by mean error, and of each joint's worst people.

    Those of joint 3 are under "3". Each list begins with the largest error.
    """
    means = pckh.person_errors(errors_NJ)
    order = _worst_first(means)
    middle = max(0, (len(order) - per_gallery) // 2)
    galleries = {
        "worst": order[:per_gallery],
        "median": order[middle : middle + per_gallery],
        "best": order[-per_gallery:],
    }
    joints = errors_NJ.shape[1]
    each = min(_WORST_OF_A_JOINT, _WORST_OF_JOINTS // joints)
    return galleries | {str(j): _worst_first(errors_NJ[:, j])[:each] for j in range(joints)}


def _worst_first(errors_N: pckh.Floats) -> list[int]:
    known = np.flatnonzero(np.isfinite(errors_N))
    return known[np.argsort(-errors_N[known], kind="stable")].tolist()


def _person(shown: ReportData, errors_NJ: pckh.Floats, row: int) -> dict[str, Any]:
    """One person as the page draws it; points are in px of the tile."""
    people = shown.people
    side = PIXELS_PER_SCALE * people.scale[row]
    center = people.center[row]
    tile_from_image = geometry.input_from_image(center, people.scale[row], visualize.TILE_PX)
    truth, found = (
        np.clip(np.round(geometry.transform(tile_from_image, points), 1), -9999, 9999).tolist()
        for points in (people.joints[row], shown.keypoints_NJ2[row])
    )
    return pckh.plain(
        {
            "picture": people.images[row],
            "person": int(people.person[row]),
            "box_px": float(side),
            "length": float(people.normalize[row] * visualize.TILE_PX / side),
            "error": float(pckh.person_errors(errors_NJ[row : row + 1])[0]),
            "errors": errors_NJ[row].tolist(),
            "marked": people.marked[row].tolist(),
            "visible": people.visible[row].tolist(),
            "truth": truth,
            "found": found,
        }
    )


def _pictures(shown: ReportData, rows: list[int]) -> list[str | None]:
    """A JPEG in base64 for each row, in the best quality that fits; None without pictures."""
    if shown.source is None:
        return [None] * len(rows)
    tiles = [
        visualize.person_tile(shown.source, int(shown.samples[row]), shown.people, row)
        for row in progress(rows, "pictures of the report", "pictures")
    ]
    for quality in _QUALITIES:
        encoded = [_jpeg(tile, quality) for tile in tiles]
        if sum(map(len, encoded)) <= _PICTURE_BYTES:
            break
    return list(encoded)


def _jpeg(tile: npt.NDArray[np.uint8], quality: int) -> str:
    _, jpeg = cv2.imencode(".jpg", tile, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return base64.b64encode(jpeg.tobytes()).decode("ascii")


def _fill(data: dict[str, Any]) -> str:
    """The template with style, script and data in their places."""
    template, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    colors = {
        "right": visualize.RIGHT_BGR,
        "left": visualize.LEFT_BGR,
        "middle": visualize.MIDDLE_BGR,
    }
    sides = "".join(f"--{side}: rgb({r} {g} {b}); " for side, (b, g, r) in colors.items())
    # A `<` in a string could end the script element; in JSON it may be written by its number.
    block = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # The data come last, so that nothing is looked for inside them.
    parts = (
        ("/*STYLE*/", f":root {{ {sides}}}\n{style}"),
        ("/*SCRIPT*/", script),
        ("/*DATA*/", block),
    )
    for place, text in parts:
        template = template.replace(place, text, 1)
    return template
