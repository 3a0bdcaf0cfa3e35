"""PCKh as a table, and predictions as a picture."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from configs.skeleton import Skeleton
from pipelines import geometry, opencv_crops
from pipelines.annotations import People
from pipelines.opencv_crops import Source
from pipelines.shards import unpack_records

RIGHT_BGR, LEFT_BGR, MIDDLE_BGR = (70, 70, 255), (255, 160, 40), (80, 220, 80)
TRUTH_BGR = (255, 255, 255)
TILE_PX = 256


def table(rows: dict[str, dict[str, Any]], skeleton: Skeleton) -> str:
    """Lines of PCKh in per cent, one a row. rows: a name and a `pckh.summary` each."""
    groups = [name for name, _ in skeleton.groups]
    grouped = len({joint for _, joints in skeleton.groups for joint in joints})
    means = [
        f"pooled {skeleton.joint_count} (<)",
        f"mean {grouped} (<)",
        f"weighted {grouped} (<=)",
        "AUC",
    ]
    label = max(len(name) for name in [*rows, "PCKh@0.5"]) + 6
    columns = [*groups, *means]
    lines = [" " * label + "  ".join(f"{c:>8}" for c in columns)]
    for name, result in rows.items():
        for threshold, score in result["pckh"].items():
            values = [score["groups"][group] for group in groups]
            values += [score["pooled"], score["unweighted"], score["weighted"]]
            values.append(result["auc"] if threshold == "0.5" else None)
            cells = [
                f"{'-' if v is None else format(100 * v, '.2f'):>{max(8, len(c))}}"
                for v, c in zip(values, columns, strict=True)
            ]
            lines.append(f"{name + ' @' + threshold:<{label}}" + "  ".join(cells))
    return "\n".join(lines)


def explain(result: dict[str, Any]) -> str:
    """What was counted, in two lines."""
    seen, hidden = result["visible"], result["occluded"]
    text = (
        f"{result['people']} people, {result['joints_counted']} marked joints. "
        f"Visible ones {_percent(seen['pooled'])} ({seen['joints_counted']}), "
        f"occluded ones {_percent(hidden['pooled'])} ({hidden['joints_counted']}), pooled @0.5."
    )
    if result["people_without_length"]:
        unknown = result["people_without_length"]
        text += f"\n{unknown} people have no known head length and do not count."
    return text


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def draw_people(
    source: Source,
    samples: npt.NDArray[np.int64],
    people: People,
    keypoints_NJ2: npt.NDArray[np.float64],
    skeleton: Skeleton,
    columns: int = 6,
) -> npt.NDArray[np.uint8]:
    """A contact sheet (H, W, 3) BGR: a tile a person, predictions in colour on white annotations.

    samples: (N,) of the source; people and keypoints (image px) in the same order. The person's
    right is red, the left blue.
    """
    tiles = [
        _tile(source, int(sample), people, row, keypoints_NJ2[row], skeleton)
        for row, sample in enumerate(samples)
    ]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return np.vstack(rows)


def _tile(
    source: Source,
    sample: int,
    people: People,
    row: int,
    keypoints_J2: npt.NDArray,
    skeleton: Skeleton,
) -> npt.NDArray[np.uint8]:
    image = opencv_crops.decode(source.jpeg(sample), source.where(sample))
    image_from_stored = opencv_crops.image_from_stored(unpack_records(source.record(sample)[None]))
    tile_from_image = geometry.input_from_image(people.center[row], people.scale[row], TILE_PX)
    tile_from_stored = tile_from_image @ image_from_stored
    shrink = 1 / np.sqrt(np.linalg.det(tile_from_stored[:2, :2]))
    if shrink > 2:  # a bilinear warp alone would alias
        image = cv2.GaussianBlur(image, (0, 0), shrink / 3)  # type: ignore[assignment]
    tile = cv2.warpAffine(image, tile_from_stored[:2], (TILE_PX, TILE_PX))
    truth = geometry.transform(tile_from_image, people.joints[row])
    found = geometry.transform(tile_from_image, keypoints_J2)
    _draw_skeleton(tile, truth, people.marked[row], skeleton, plain=True)
    _draw_skeleton(tile, found, np.ones(skeleton.joint_count, dtype=bool), skeleton, plain=False)
    return cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255))  # type: ignore[return-value]


def _draw_skeleton(
    tile: npt.NDArray, joints_J2: npt.NDArray, drawn_J: npt.NDArray, skeleton: Skeleton, plain: bool
) -> None:
    shift = 4  # fractional bits of OpenCV's drawing coordinates
    points = np.round(np.clip(joints_J2, -4096, 4096) * 2**shift).astype(int)
    for a, b in skeleton.limbs:
        if drawn_J[a] and drawn_J[b]:
            color = TRUTH_BGR if plain else _side_color(skeleton.names[a], skeleton.names[b])
            ends = (points[a].tolist(), points[b].tolist())
            cv2.line(tile, *ends, color, 4 if plain else 2, cv2.LINE_AA, shift)
    if not plain:
        for j in np.flatnonzero(drawn_J):
            color = _side_color(skeleton.names[j], skeleton.names[j])
            cv2.circle(tile, points[j].tolist(), 3 << shift, color, -1, cv2.LINE_AA, shift)


def _side_color(first: str, second: str) -> tuple[int, int, int]:
    """Colour of a limb by the side that its joints' names begin with."""
    for prefixes, color in ((("r_", "right"), RIGHT_BGR), (("l_", "left"), LEFT_BGR)):
        if first.startswith(prefixes) or second.startswith(prefixes):
            return color
    return MIDDLE_BGR
