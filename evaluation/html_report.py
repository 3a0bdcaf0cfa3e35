"""The evaluation as one self-contained HTML page: numbers, curves, bars and pictures.

The page contains one block of JSON, whose `results` are those of --json; page.js draws everything
from it. Strings of the data reach the page as JSON and are shown as text nodes, never as markup.
"""

import base64
from pathlib import Path
from typing import Any, get_args

import cv2
import jinja2
import numpy as np

from common.cli import progress
from configs.skeleton import PIXELS_PER_SCALE, Side
from evaluation import pckh, visualize
from evaluation.report import ReferenceRun, Summary, data_mismatch
from evaluation.visualize import PredictedPeople
from pipelines.annotations import scored_text
from pipelines.geometry import input_from_image, transform

_JOINT_PEOPLE = 64
"""Maximum of additional people: the worst of each joint, at most _WORST_OF_A_JOINT each."""
_WORST_OF_A_JOINT = 4
_PICTURE_BYTES = 3_500_000
_QUALITIES = (80, 65, 50, 35, 20, 10)
"""JPEG qualities; the first with which all pictures fit into _PICTURE_BYTES (base64) is used."""


def html_report(
    facts: dict[str, Any],
    results: dict[str, Summary],
    reference: ReferenceRun | None,
    data: PredictedPeople,
    people_per_gallery: int,
    first_galleries: dict[str, list[int]],
) -> str:
    """The page. facts, results: as in --json. Galleries: the worst, the median, the best people.

    first_galleries: rows by name, shown before these and in their order.
    """
    skeleton, first = data.skeleton, next(iter(results.values()))
    errors = pckh.normalized_errors(data.keypoints_NJ2, data.people)
    galleries = first_galleries | choose_people(errors, people_per_gallery)
    rows = sorted({row for gallery in galleries.values() for row in gallery})
    pictures = encode_pictures(data, rows)
    content = {
        "facts": facts,
        "results": results,
        "scored": scored_text(first["people_scored"], first["people"]),
        "other": reference._asdict() if reference else None,
        "warning": data_mismatch(first, reference.result) if reference else None,
        "skeleton": {
            "names": [name or f"joint {j}" for j, name in enumerate(skeleton.names)],
            "sides": skeleton.sides,
            "limbs": skeleton.limbs,
            "groups": skeleton.groups,
        },
        "tile_px": visualize.TILE_PX,
        "galleries": galleries,
        "first_galleries": list(first_galleries),
        "people": {
            row: {**_person(data, errors, row), "jpeg": jpeg}
            for row, jpeg in zip(rows, pictures, strict=True)
        },
    }
    environment = jinja2.Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    html, css, js = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    return environment.from_string(html).render(
        style=css,
        script=js,
        colors={side: visualize.color_of(side) for side in get_args(Side)},
        data=content,
    )


def choose_people(errors_NJ: pckh.Floats, per_gallery: int) -> dict[str, list[int]]:
    """Rows of the worst, median and best people by mean error, and of each joint's worst people.

    Those of joint 3 have the key "3". Each list begins with the largest error.
    """
    order = _worst_first(pckh.person_errors(errors_NJ))
    middle = max(0, (len(order) - per_gallery) // 2)
    joints = errors_NJ.shape[1]
    each = min(_WORST_OF_A_JOINT, _JOINT_PEOPLE // joints)
    return {
        "worst": order[:per_gallery],
        "median": order[middle : middle + per_gallery],
        "best": order[-per_gallery:],
        **{str(j): _worst_first(errors_NJ[:, j])[:each] for j in range(joints)},
    }


def _worst_first(errors_N: pckh.Floats) -> list[int]:
    known = np.flatnonzero(np.isfinite(errors_N))
    return known[np.argsort(-errors_N[known], kind="stable")].tolist()


def _person(data: PredictedPeople, errors_NJ: pckh.Floats, row: int) -> dict[str, Any]:
    """One person as page.js draws it; points in px of the tile."""
    people, tile_px = data.people, visualize.TILE_PX
    side = float(PIXELS_PER_SCALE * people.scale[row])
    tile_from_image = input_from_image(people.center[row], people.scale[row], tile_px)
    truth, found = (
        np.clip(np.round(transform(tile_from_image, points), 1), -9999, 9999).tolist()
        for points in (people.joints[row], data.keypoints_NJ2[row])
    )
    return pckh.json_values(
        {
            "picture": people.images[row],
            "person": int(people.person[row]),
            "box_px": side,
            "length": float(people.normalize[row] * tile_px / side),
            "error": float(pckh.person_errors(errors_NJ[row : row + 1])[0]),
            "errors": errors_NJ[row].tolist(),
            "marked": people.marked[row].tolist(),
            "visible": people.visible[row].tolist(),
            "truth": truth,
            "found": found,
        }
    )


def encode_pictures(data: PredictedPeople, rows: list[int]) -> list[str] | list[None]:
    """Each person's box as a base64 JPEG of the best quality that fits; None without source."""
    if data.source is None:
        return [None] * len(rows)
    tiles = [
        visualize.person_tile(data.source, int(data.samples[row]))
        for row in progress(rows, "pictures of the report", "pictures")
    ]
    encoded: list[str] = []
    for quality in _QUALITIES:
        jpegs = [cv2.imencode(".jpg", t, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for t in tiles]
        encoded = [base64.b64encode(jpeg.tobytes()).decode("ascii") for jpeg in jpegs]
        if sum(map(len, encoded)) <= _PICTURE_BYTES:
            break
    return encoded
