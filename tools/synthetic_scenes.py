"""Synthetic scenes: a cluttered place, people at several depths, things before them, their rows.

Everything about picture n of a split follows from np.random.default_rng([seed, split, n]).
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from configs.skeleton import (
    BOX_SCALE,
    BOX_SHIFT_Y_PX,
    HEAD_LENGTH_FROM_NECK_TO_TOP,
    HEAD_TOP,
    PELVIS,
    PIXELS_PER_SCALE,
    THORAX,
    UPPER_NECK,
)
from tools.synthetic_people import (
    PARTS,
    Array,
    Body,
    Canvas,
    Colour,
    Pixels,
    bgr_from_hsv,
    draw_person,
    ellipse_points,
    hull_points,
    sample_body,
    sample_look,
    shade,
    visible_joints,
)

SIZES_WH = {
    (640, 360): 0.24,
    (640, 480): 0.24,
    (480, 640): 0.12,
    (480, 360): 0.10,
    (854, 480): 0.15,
    (1280, 720): 0.15,
}
"""Width and height of pictures in px, and how often they are drawn."""

MIN_JOINTS = 8
UNMARKED_SHARE = 0.035
THING = 255
"""What the owner map holds where a thing covers people; 0 is background."""


class Row(NamedTuple):
    """One annotated person, as one row of MPII's h5 file. Pixels count from 0."""

    part: Array
    visible: Array
    center: Array
    scale: float
    normalize: float
    torsoangle: float


class Actor(NamedTuple):
    """A person in a scene. body: in pixels. rows come from annotated ones only."""

    body: Body
    annotated: bool


def draw_scene(
    rng: np.random.Generator, annotated: int, max_width_px: int
) -> tuple[Pixels, list[Row]]:
    """One picture, (H, W, 3) uint8 BGR, and `annotated` rows."""
    width, height = _sample_size(rng, max_width_px)
    actors = sample_actors(rng, annotated, width, height)
    canvas = Canvas(draw_background(rng, width, height), np.zeros((height, width), np.uint8))
    # Small people are far away: the farthest is drawn first.
    order = sorted(range(len(actors)), key=lambda n: actors[n].body.height)
    for n in order:
        draw_person(canvas, actors[n].body, sample_look(rng), 1 + n * PARTS)
        if rng.random() < 0.22:
            draw_thing_before(rng, canvas, actors[n].body)
    rows = [
        annotate(rng, actor.body, canvas.owners, 1 + n * PARTS)
        for n, actor in enumerate(actors)
        if actor.annotated
    ]
    return finish_picture(rng, canvas.picture), rows


def _sample_size(rng: np.random.Generator, max_width_px: int) -> tuple[int, int]:
    sizes = [size for size in SIZES_WH if size[0] <= max_width_px]
    shares = np.array([SIZES_WH[size] for size in sizes])
    return sizes[rng.choice(len(sizes), p=shares / shares.sum())]


def sample_actors(rng: np.random.Generator, annotated: int, width: int, height: int) -> list[Actor]:
    """Annotated people first, then up to two who are not; none right on top of another."""
    bystanders = int(rng.choice(3, p=[0.7, 0.22, 0.08]))
    actors: list[Actor] = []
    height_px = height * rng.uniform(0.55, 1.05)
    for n in range(annotated + bystanders):
        is_annotated = n < annotated
        smaller = 1.0 if n == 0 else rng.uniform(0.55, 1.0)
        for attempt in range(400):
            # A crowded picture makes room by letting people be smaller.
            px = height_px * smaller * 0.995**attempt
            body = _place_body(rng, px, width, height, free=not is_annotated)
            if body is not None and all(_apart(body, other.body) for other in actors):
                actors.append(Actor(body, is_annotated))
                break
        else:
            assert not is_annotated, "an annotated person found no room"
    return actors


def _place_body(
    rng: np.random.Generator, height_px: float, width: int, height: int, free: bool
) -> Body | None:
    """A body in the picture, or None where it must be annotated (not `free`) and cannot be."""
    body = sample_body(rng)
    low, high = (corner * height_px for corner in body.bounds())
    slack = (high - low) * (rng.uniform(0.05, 0.35) if rng.random() < 0.3 else 0.0)
    size_2 = np.array([width, height])
    first, last = -low - slack, size_2 - high + slack
    # A body longer than the picture hangs out at both ends.
    body = body.placed(height_px, rng.uniform(np.minimum(first, last), np.maximum(first, last)))
    inside = _inside(body.joints[:, :2], width, height)
    whole = inside[HEAD_TOP] and inside[UPPER_NECK] and inside.sum() >= MIN_JOINTS + 2
    return body if whole or free else None


def _inside(points_K2: Array, width: int, height: int) -> NDArray[np.bool_]:
    inside_K2 = (points_K2 >= 0) & (points_K2 <= [width - 1, height - 1])
    return np.all(inside_K2, axis=1)


def _apart(a: Body, b: Body) -> bool:
    middles = [np.mean(body.bounds(), axis=0) for body in (a, b)]
    return float(np.hypot(*(middles[0] - middles[1]))) > 0.38 * max(a.height, b.height)


def annotate(rng: np.random.Generator, body: Body, owners: Pixels, first_owner: int) -> Row:
    """The row of one drawn person. body: in pixels. owners: the finished owner map."""
    joints_J2 = body.joints[:, :2]
    height, width = owners.shape
    marked = _inside(joints_J2, width, height)
    forgotten = rng.random(len(joints_J2)) < UNMARKED_SHARE
    forgotten[[UPPER_NECK, HEAD_TOP]] = False
    if (marked & ~forgotten).sum() >= MIN_JOINTS:
        marked &= ~forgotten
    visible = marked & visible_joints(owners, body, first_owner)
    low, high = body.bounds()
    raw_scale = (high - low).max() / PIXELS_PER_SCALE * rng.uniform(0.95, 1.05)
    jitter = rng.normal(0, 0.02, 2) * raw_scale * PIXELS_PER_SCALE
    head_px = float(np.hypot(*(joints_J2[HEAD_TOP] - joints_J2[UPPER_NECK])))
    return Row(
        part=np.where(marked[:, None], joints_J2, 0.0),
        visible=visible.astype(float),
        center=(low + high) / 2 + jitter + [0.0, BOX_SHIFT_Y_PX * raw_scale],
        scale=float(BOX_SCALE * raw_scale),
        normalize=HEAD_LENGTH_FROM_NECK_TO_TOP * head_px,
        torsoangle=torso_angle(joints_J2) if marked[[PELVIS, THORAX]].all() else 0.0,
    )


def torso_angle(joints_J2: Array) -> float:
    """Degrees from upright to pelvis-thorax, positive to the right, in [-90, 270) as in MPII."""
    x, y = joints_J2[THORAX] - joints_J2[PELVIS]
    return float((np.degrees(np.arctan2(x, -y)) + 90) % 360 - 90)


def dull_colour(rng: np.random.Generator) -> Colour:
    """A colour of things and places: any hue, mostly little saturated."""
    saturation = rng.uniform(0, 0.35) if rng.random() < 0.93 else rng.uniform(0.35, 0.7)
    return bgr_from_hsv(rng.uniform(0, 360), saturation, rng.uniform(0.1, 0.95))


def draw_background(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """(height, width, 3) uint8: smooth colours, a floor, texture, furniture and clutter."""
    grid = np.array([dull_colour(rng) for _ in range(9)], np.float32).reshape(3, 3, 3)
    grid = grid * 0.6 + grid.mean((0, 1)) * 0.4
    picture = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    canvas = Canvas(picture, np.zeros((height, width), np.uint8))
    size_2 = np.array([width, height], float)
    if rng.random() < 0.7:
        left, right = rng.uniform(0.45, 0.9) * height + rng.normal(0, 0.04, 2) * height
        floor = np.array([[0, left], [width, right], [width, height], [0, height]], float)
        canvas.fill(floor, dull_colour(rng), 0)
    for _ in range(rng.integers(0, 4)):
        _draw_furniture(rng, canvas, size_2)
    for _ in range(rng.integers(6, 34)):
        _draw_clutter(rng, canvas, size_2)
    return _with_texture(rng, picture)


def _with_texture(rng: np.random.Generator, picture: Pixels) -> Pixels:
    """Adds grain at one coarse and one fine scale, the same to all colours."""
    height, width = picture.shape[:2]
    grain = np.zeros((height, width), np.float32)
    for cells in (rng.integers(6, 24), rng.integers(40, 120)):
        noise = rng.normal(0, rng.uniform(1, 11), (cells, cells)).astype(np.float32)
        grain += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.add(picture, cv2.merge([grain] * 3), dtype=cv2.CV_8U)


def _draw_clutter(rng: np.random.Generator, canvas: Canvas, size_2: Array) -> None:
    """One polygon, ellipse, line or limb-like shape."""
    at_2 = rng.uniform(-0.05, 1.05, 2) * size_2
    reach = size_2[1] * float(np.clip(rng.lognormal(-2.3, 0.6), 0.02, 0.5))
    angle = rng.uniform(0, 2 * np.pi)
    axis_2 = reach * np.array([np.cos(angle), np.sin(angle)])
    colour = dull_colour(rng)
    kind = rng.choice(4, p=[0.3, 0.2, 0.25, 0.25])
    if kind == 0:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))[:, None]
        corners = np.hstack([np.cos(angles), np.sin(angles)]) * rng.uniform(0.5, 1, angles.shape)
        canvas.fill(at_2 + corners * reach, colour, 0)
    elif kind == 1:
        canvas.fill(ellipse_points(at_2, axis_2, reach * rng.uniform(0.2, 1)), colour, 0)
    elif kind == 2:
        end = at_2 + axis_2 * 4
        canvas.fill(hull_points([(at_2, 0.6), (end, rng.uniform(0.6, 3))]), colour, 0)
    else:
        _draw_false_limb(rng, canvas, at_2, axis_2 * 1.3, colour)


def _draw_false_limb(
    rng: np.random.Generator, canvas: Canvas, at_2: Array, axis_2: Array, colour: Colour
) -> None:
    """Two tapered segments with a bend, like an arm without a body."""
    width = float(np.hypot(*axis_2)) * rng.uniform(0.12, 0.25)
    middle_2, turn = at_2 + axis_2, rng.uniform(-2, 2)
    c, s = np.cos(turn), np.sin(turn)
    end_2 = middle_2 + 0.9 * np.array([[c, -s], [s, c]]) @ axis_2
    canvas.fill(hull_points([(at_2, width), (middle_2, 0.8 * width)]), colour, 0)
    canvas.fill(
        hull_points([(middle_2, 0.8 * width), (end_2, 0.6 * width)]), shade(colour, 0.85), 0
    )


def _draw_furniture(rng: np.random.Generator, canvas: Canvas, size_2: Array) -> None:
    """A table, a shelf or a window, upright."""
    low = rng.uniform(-0.1, 0.8, 2) * size_2
    extent = rng.uniform(0.12, 0.45, 2) * size_2[1]
    colour, other = dull_colour(rng), dull_colour(rng)
    kind = rng.choice(3)
    if kind == 0:
        canvas.fill(box_points(low, extent * [1, 0.15]), colour, 0)
        for x in (0.04, 0.88):
            canvas.fill(
                box_points(low + extent * [x, 0.15], extent * [0.08, 0.85]), shade(colour, 0.7), 0
            )
        return
    canvas.fill(box_points(low, extent), colour, 0)
    panes = rng.integers(2, 5)
    for n in range(panes):
        step = extent * ([0, 1 / panes] if kind == 1 else [1 / panes, 0])
        pane = extent * ([0.9, 0.7 / panes] if kind == 1 else [0.8 / panes, 0.9])
        canvas.fill(box_points(low + n * step + 0.05 * extent, pane), other, 0)


def box_points(low_2: Array, extent_2: Array) -> Array:
    """(4, 2) corners of an upright box."""
    return low_2 + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * extent_2


def draw_thing_before(rng: np.random.Generator, canvas: Canvas, body: Body) -> None:
    """A pole, a box or a plant that covers some of a body. body: in pixels."""
    low, high = body.bounds()
    extent = high - low
    at = low + rng.uniform(0.0, 0.8, 2) * extent
    at[1] = max(at[1], low[1] + 0.3 * extent[1])
    colour = dull_colour(rng)
    kind = rng.choice(3)
    if kind == 0:
        pole = np.array([body.height * rng.uniform(0.03, 0.07), body.height * 3])
        canvas.fill(box_points(at - [0.0, body.height], pole), colour, THING)
    elif kind == 1:
        box = body.height * rng.uniform(0.1, 0.28, 2)
        canvas.fill(box_points(at, box), colour, THING)
        canvas.fill(box_points(at + 0.15 * box, 0.7 * box), shade(colour, 1.2), THING)
    else:
        for _ in range(7):
            angle = rng.uniform(0, 2 * np.pi)
            leaf = np.array([np.cos(angle), np.sin(angle)]) * body.height * rng.uniform(0.04, 0.09)
            green = bgr_from_hsv(rng.uniform(80, 130), 0.45, rng.uniform(0.25, 0.6))
            canvas.fill(
                ellipse_points(at + leaf, leaf, 0.35 * float(np.hypot(*leaf))), green, THING
            )


def finish_picture(rng: np.random.Generator, picture: Pixels) -> Pixels:
    """Uneven light, a cast of colour, sometimes blur, and a little noise of the sensor."""
    height, width = picture.shape[:2]
    light = rng.uniform(0.8, 1.35) * rng.uniform(0.85, 1.15, (2, 3, 1)) * rng.uniform(0.94, 1.06, 3)
    gain = cv2.resize(light.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    picture = cv2.multiply(picture, gain, dtype=cv2.CV_8U)
    if rng.random() < 0.4:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.0))
    strength = int(rng.integers(1, 9))
    noise = rng.integers(-strength, strength + 1, (height, width), np.int8).astype(np.int16)
    return cv2.add(picture, cv2.merge([noise] * 3), dtype=cv2.CV_8U)
