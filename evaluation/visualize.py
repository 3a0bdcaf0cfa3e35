"""People drawn on their pictures: the person's right is red, the left blue, the middle green."""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from configs.skeleton import Side, Skeleton
from pipelines.annotations import People
from pipelines.augment import PRESETS, Draw
from pipelines.geometry import input_from_image, transform
from pipelines.opencv_loader import Source, crop_person, stored_picture
from pipelines.shard_format import unpack_records

RIGHT_BGR, LEFT_BGR, MIDDLE_BGR = (70, 70, 255), (255, 160, 40), (80, 220, 80)
TRUTH_BGR, EDGE_BGR = (255, 255, 255), (0, 0, 0)
LEGEND = "white: annotation    red, blue, green: prediction, the person's right, left, middle"
TILE_PX, COLUMNS = 256, 6


class PredictedPeople(NamedTuple):
    """N people with pictures, and the predictions for them."""

    people: People
    keypoints_NJ2: npt.NDArray[np.float64]
    """Image px."""
    skeleton: Skeleton
    source: Source | None
    """Source of the pictures; None: only skeletons are shown."""
    samples: npt.NDArray[np.int64]
    """(N,) each person's number in the source."""


def draw_people(data: PredictedPeople, count: int) -> npt.NDArray[np.uint8]:
    """A contact sheet (H, W, 3) BGR: a tile for each of `count` people, evenly spaced in their
    order; predictions over white annotations; a legend above."""
    people, skeleton = data.people, data.skeleton
    all_joints = np.ones(skeleton.joint_count, dtype=bool)
    tiles: list[npt.NDArray] = []
    for row in np.unique(np.linspace(0, people.count - 1, count).astype(int)):
        assert data.source is not None
        tile = person_tile(data.source, int(data.samples[row]))
        tile_from_image = input_from_image(people.center[row], people.scale[row], TILE_PX)
        truth = transform(tile_from_image, people.joints[row])
        found = transform(tile_from_image, data.keypoints_NJ2[row])
        draw_skeleton(tile, truth, people.marked[row], skeleton, 2, is_truth=True)
        draw_skeleton(tile, found, all_joints, skeleton, 2)
        tiles.append(np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=255))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    legend = np.full((24, COLUMNS * tiles[0].shape[1], 3), 255, dtype=np.uint8)
    cv2.putText(legend, LEGEND, (8, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, EDGE_BGR, 1, cv2.LINE_AA)
    rows = [np.hstack(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    return np.vstack([legend, *rows])


def person_tile(source: Source, sample: int) -> npt.NDArray[np.uint8]:
    """A person's box as a picture, (TILE_PX, TILE_PX, 3) BGR."""
    record, preset = unpack_records(source.record(sample)[None]), PRESETS["none"]
    crop, _ = crop_person(stored_picture(source, sample), record, Draw(), preset, TILE_PX)
    return np.ascontiguousarray(crop[..., ::-1])


def draw_skeleton(
    image_HW3: npt.NDArray,
    joints_J2: npt.NDArray,
    drawn_J: npt.NDArray,
    skeleton: Skeleton,
    line_px: int,
    is_truth: bool = False,
) -> None:
    """Draw one person onto a BGR picture. joints: px. drawn: bool, the joints to draw.

    Limbs and joints have a black edge, to be seen on any picture. is_truth: an annotation: white,
    and wide enough to be seen around a prediction at the same place.
    """
    shift, far = 4, 2**15 - 1  # fractional bits of OpenCV's coordinates; beyond far they overflow
    points = np.round(np.clip(joints_J2, -far, far) * 2**shift).astype(int).tolist()
    limbs = [(a, b) for a, b in skeleton.limbs if drawn_J[a] and drawn_J[b]]
    edge = max(1, line_px // 2)
    for wider, only in [(2 * edge, TRUTH_BGR)] if is_truth else [(edge, EDGE_BGR), (0, None)]:
        for a, b in limbs:
            color = only or color_of(skeleton.sides[a], skeleton.sides[b])
            width = line_px + 2 * wider
            cv2.line(image_HW3, points[a], points[b], color, width, cv2.LINE_AA, shift)
        radius = round((1.5 * line_px + wider) * 2**shift)
        for j in np.flatnonzero(drawn_J):
            color = only or color_of(skeleton.sides[j])
            cv2.circle(image_HW3, points[j], radius, color, -1, cv2.LINE_AA, shift)


def color_of(*sides: Side) -> tuple[int, int, int]:
    """BGR of a joint, or of a limb from the sides of its two ends."""
    left_right = set(sides) - {"middle"}
    if len(left_right) != 1:
        return MIDDLE_BGR
    return RIGHT_BGR if "right" in left_right else LEFT_BGR
