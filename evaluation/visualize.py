"""People drawn on their pictures."""

import cv2
import numpy as np
import numpy.typing as npt

from configs.skeleton import Side, Skeleton
from pipelines import geometry
from pipelines import opencv_loader as opencv_crops
from pipelines.annotations import People
from pipelines.opencv_loader import Source
from pipelines.shard_format import unpack_records

RIGHT_BGR, LEFT_BGR, MIDDLE_BGR = (70, 70, 255), (255, 160, 40), (80, 220, 80)
TRUTH_BGR = (255, 255, 255)
TILE_PX = 256


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
    tile = person_tile(source, sample, people, row)
    tile_from_image = geometry.input_from_image(people.center[row], people.scale[row], TILE_PX)
    truth = geometry.transform(tile_from_image, people.joints[row])
    found = geometry.transform(tile_from_image, keypoints_J2)
    draw_skeleton(tile, truth, people.marked[row], skeleton, 2, plain=True)
    draw_skeleton(tile, found, np.ones(skeleton.joint_count, dtype=bool), skeleton, 2)
    return cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255))  # type: ignore[return-value]


def person_tile(source: Source, sample: int, people: People, row: int) -> npt.NDArray[np.uint8]:
    """A person's box as a picture, (TILE_PX, TILE_PX, 3) BGR."""
    image = opencv_crops.decode(source.jpeg(sample), source.where(sample))
    image_from_stored = opencv_crops.image_from_stored(unpack_records(source.record(sample)[None]))
    tile_from_image = geometry.input_from_image(people.center[row], people.scale[row], TILE_PX)
    tile_from_stored = tile_from_image @ image_from_stored
    shrink = 1 / np.sqrt(np.linalg.det(tile_from_stored[:2, :2]))
    if shrink > 2:  # a bilinear warp alone would alias
        image = cv2.GaussianBlur(image, (0, 0), shrink / 3)  # type: ignore[assignment]
    return cv2.warpAffine(image, tile_from_stored[:2], (TILE_PX, TILE_PX))  # type: ignore[return-value]


def draw_skeleton(
    image_HW3: npt.NDArray,
    joints_J2: npt.NDArray,
    drawn_J: npt.NDArray,
    skeleton: Skeleton,
    line_px: int,
    plain: bool = False,
) -> None:
    """Draw one person onto a BGR picture. joints: px of it. drawn: which of them are shown.

    The person's right is red, the left blue. plain: white lines of twice the width and no joints.
    """
    shift = 4  # fractional bits of OpenCV's drawing coordinates
    far = 2**15 - 1  # px; what is farther away would overflow them
    points = np.round(np.clip(joints_J2, -far, far) * 2**shift).astype(int)
    sides = skeleton.sides
    for a, b in skeleton.limbs:
        if drawn_J[a] and drawn_J[b]:
            color = TRUTH_BGR if plain else color_of(sides[a], sides[b])
            ends = (points[a].tolist(), points[b].tolist())
            cv2.line(image_HW3, *ends, color, line_px * (1 + plain), cv2.LINE_AA, shift)
    if not plain:
        radius = round(1.5 * line_px * 2**shift)
        for j in np.flatnonzero(drawn_J):
            color = color_of(sides[j])
            cv2.circle(image_HW3, points[j].tolist(), radius, color, -1, cv2.LINE_AA, shift)


def color_of(*sides: Side) -> tuple[int, int, int]:
    """Colour of a joint, or of a limb by the sides of its ends."""
    beside = set(sides) - {"middle"}
    if len(beside) != 1:
        return MIDDLE_BGR
    return RIGHT_BGR if "right" in beside else LEFT_BGR
