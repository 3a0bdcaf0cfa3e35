"""Synthetic people in MPII's layout: articulated figures on clutter, with exact joints.

Axes: x right and y down in the picture, z away from the viewer. A body at rest faces the viewer, so
its own left is +x. Right arms are red and right legs magenta, left arms blue and left legs cyan:
every joint differs from its mirror image, so train on these people without mirroring.
"""

import colorsys
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import h5py
import numpy as np
from numpy.random import Generator

from common.cli import progress
from configs import skeleton
from pipelines.packing import worker_pool

Array = np.ndarray
Color = tuple[float, float, float]
"""BGR, 0 to 255."""
Person = dict[str, Any]
"""One row of MPII's h5 files by their keys. Pixels count from 0."""
VERSION = 2
"""Increased whenever the same options draw other pictures."""
SIZES_WH = ((640, 480), (640, 360), (480, 640), (480, 360), (854, 480), (1280, 720))
TRUNK_LENGTH = 0.295
"""Distance from pelvis to thorax / height of the standing body."""
JOINTS, POINTS = 16, 22
"""Points of a body: MPII's joints, then hands, toes, the skull's middle and the face."""
PELVIS, THORAX, NECK, HEAD_TOP, SKULL, FACE = 6, 7, 8, 9, 20, 21
# The right arm, the left arm, the right leg and the left leg, from the trunk to the tip.
LIMBS = np.array([[12, 11, 10, 16], [13, 14, 15, 17], [2, 1, 0, 18], [3, 4, 5, 19]])
LIMB_HUES_DEG = (2.0, 225.0, 312.0, 182.0)
LIMB_RADII: tuple = ((0.042, 0.04, 0.038, 0.02), (0.052, 0.046, 0.042, 0.024))
"""Radii of arms and legs at the four points / body height."""


class Canvas(NamedTuple):
    """A picture under construction, and a map of the joint that is on top at each pixel."""

    image_HW3: Array
    joints_HW: Array

    def hull(self, centers_K2: Array, radii_K: Array, color: Color, joint: int = 0) -> None:
        """Fill the convex hull of discs: two make a limb, one is a disc. joint: 0 for no joint."""
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        points = centers_K2[:, None] + radii_K[:, None, None] * circle
        fixed = np.round(16 * cv2.convexHull(points.reshape(-1, 2).astype(np.float32)))
        cv2.fillPoly(self.image_HW3, [fixed.astype(np.int32)], color, cv2.LINE_AA, 4)
        cv2.fillPoly(self.joints_HW, [fixed.astype(np.int32)], (float(joint),), cv2.LINE_8, 4)


def color_of(hue_deg: float, saturation: float, value: float) -> Color:
    """A colour from a hue in degrees and two fractions."""
    r, g, b = colorsys.hsv_to_rgb(hue_deg / 360 % 1, saturation, value)
    return 255 * b, 255 * g, 255 * r


def rotation(z_deg: float, x_deg: float, y_deg: float = 0.0) -> Array:
    """(3, 3) rotation about y, then x, then z. A positive x tips the top towards the viewer."""
    (cz, cx, cy), (sz, sx, sy) = (f(np.radians([z_deg, x_deg, y_deg])) for f in (np.cos, np.sin))
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return about_z @ about_x @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])


def sample_body(rng: Generator) -> Array:
    """(POINTS, 3) x, y, depth of a random body / its height; the pelvis is the origin.

    `wild` scales most of the angles.
    """
    wild, build = rng.uniform(0.15, 1), rng.uniform(0.9, 1.1, 4)
    yaw = rng.choice([0, 180, 90, -90], p=[0.5, 0.26, 0.12, 0.12]) + rng.normal(0, 28)
    root = rotation(rng.normal(0, 100 * wild**2), rng.normal(6, 8), yaw)
    chest = root @ rotation(rng.normal(0, 9), wild * rng.uniform(-20, 60))
    head = chest @ rotation(rng.normal(0, 9), rng.normal(0, 12), rng.normal(0, 22))
    points_P3 = np.zeros((POINTS, 3))
    points_P3[THORAX] = chest @ [0, -TRUNK_LENGTH, 0]
    points_P3[NECK] = points_P3[THORAX] + chest @ [0, -0.042, 0]
    from_neck = build[0] * np.array([[0, -0.175, 0], [0, -0.105, 0], [0, -0.085, -0.055]])
    points_P3[[HEAD_TOP, SKULL, FACE]] = points_P3[NECK] + from_neck @ head.T
    for limb, side in ((0, -1), (1, 1)):
        out, forward, bend = wild * rng.uniform([5, -50, 0], [170, 130, 120])
        upper = chest @ rotation(-side * out, -forward, side * rng.uniform(-30, 80))
        shoulder = points_P3[THORAX] + chest @ [side * 0.112 * build[1], 0.01, 0]
        bones = build[2] * np.array([[0, 0.172, 0], [0, 0.15, 0], [0, 0.065, 0]])
        points_P3[LIMBS[limb]] = pose_limb(shoulder, upper, -bend, bones)
        out, forward, bend = wild * rng.uniform([4, -40, 0], [45, 115, 130])
        upper = root @ rotation(-side * out, -forward, -side * rng.uniform(-5, 25))
        hip = root @ [side * 0.066 * build[1], 0, 0]
        bones = build[3] * np.array([[0, 0.245, 0], [0, 0.235, 0], [0, 0.045, -0.085]])
        points_P3[LIMBS[2 + limb]] = pose_limb(hip, upper, bend, bones)
    return points_P3


def pose_limb(start_3: Array, upper: Array, bend_deg: float, bones_33: Array) -> Array:
    """(4, 3) points. upper: (3, 3) rotation of the first bone; the others bend together."""
    lower = upper @ rotation(0, bend_deg)
    steps = np.stack([upper @ bones_33[0], lower @ bones_33[1], lower @ bones_33[2]])
    return start_3 + np.concatenate([np.zeros((1, 3)), steps.cumsum(0)])


def height_of(points_P3: Array) -> float:
    """Height of the body if it stood upright, px."""
    return float(np.linalg.norm(points_P3[THORAX] - points_P3[PELVIS])) / TRUNK_LENGTH


def draw_body(rng: Generator, canvas: Canvas, points_P3: Array, first: int) -> None:
    """Draw a body in pixels, its farthest part first. first: number of its joint 0 in the map."""
    height = height_of(points_P3)
    skin = color_of(rng.uniform(16, 32), rng.uniform(0.25, 0.5), rng.uniform(0.35, 0.95))
    shirt = color_of(rng.uniform(45, 140), rng.uniform(0, 0.6), rng.uniform(0.25, 1.0))
    hair = color_of(rng.uniform(20, 50), 0.5, rng.uniform(0.05, 0.7))
    marks: dict[int, Color] = {
        THORAX: (40, 40, 40), PELVIS: (70, 225, 245), NECK: (230, 240, 230), HEAD_TOP: (60, 200, 90)
    }  # fmt: skip
    # Hulls of discs: points, radii, bias of the depth / height (arms are in front of the chest).
    shapes: list[tuple[Any, tuple[float, ...], float, Color]] = [
        ([NECK, SKULL, HEAD_TOP], (0.036, 0.07, 0.034), -0.02, hair),
        ([FACE], (0.045,), -0.03, skin),
        ([*LIMBS[:, 0], THORAX, PELVIS], (0.042,) * 6, 0.0, shirt),
    ]
    for limb, hue in enumerate(rng.normal(LIMB_HUES_DEG, 5)):
        for row, saturation in enumerate((0.6, 0.25, 0.95)):
            marks[LIMBS[limb, row]] = color_of(hue, saturation, 1.0)
            color = color_of(hue, rng.uniform(0.65, 0.95), rng.uniform(0.4, 0.8))
            ends, bias = slice(row, row + 2), (-0.03, 0.02)[limb // 2] - 0.01 * row
            shapes.append((LIMBS[limb, ends], LIMB_RADII[limb // 2][ends], bias, color))
    shapes.sort(key=lambda shape: -points_P3[shape[0], 2].mean() / height - shape[2])
    for points, radii, _, color in shapes:
        centers, px = points_P3[points, :2], height * np.array(radii)
        canvas.hull(centers, px, (0.7 * color[0], 0.7 * color[1], 0.7 * color[2]))
        canvas.hull(centers - px[:, None] * [0.1, 0.2], 0.72 * px, color)
        for row in np.argsort(-points_P3[points, 2]):
            if points[row] in marks:
                at, radius, joint = centers[[row]], px[[row]], first + points[row]
                canvas.hull(at, radius, (40, 40, 40), joint)
                canvas.hull(at, 0.7 * radius, marks[points[row]], joint)


def draw_scene(
    rng: Generator, annotated: int, size_wh: tuple[int, int]
) -> tuple[Array, list[Person]]:
    """A (H, W, 3) uint8 BGR picture and its annotated people; up to two more are not annotated."""
    colors = rng.uniform(30, 220, (3, 3, 1)) + rng.normal(0, 18, (3, 3, 3))
    background = cv2.resize(colors.clip(0, 255).astype(np.uint8), size_wh)
    canvas = Canvas(background, np.zeros(size_wh[::-1], np.uint8))
    for _ in range(rng.integers(8, 40)):
        draw_clutter(rng, canvas, rng.uniform(-0.05, 1.05, 2) * size_wh, 0.4)
    bodies = place_bodies(rng, annotated, size_wh)
    # Small people are far away.
    for number in np.argsort([height_of(body) for body in bodies]):
        draw_body(rng, canvas, bodies[number], 1 + JOINTS * int(number))
        if rng.random() < 0.2:
            draw_clutter(rng, canvas, bodies[number][rng.integers(JOINTS), :2], 0.12)
    people = [
        annotate(rng, body, canvas.joints_HW, 1 + JOINTS * number)
        for number, body in enumerate(bodies[:annotated])
    ]
    return add_light_and_noise(rng, canvas.image_HW3), people


def place_bodies(rng: Generator, annotated: int, size_wh: tuple[int, int]) -> list[Array]:
    """Bodies in px, annotated ones first; head and ten joints are in the picture, bodies apart."""
    bodies: list[Array] = []
    wanted = annotated + rng.choice(3, p=[0.8, 0.15, 0.05])
    height = size_wh[1] * rng.uniform(0.55, 1.05)
    while len(bodies) < wanted:
        height *= 0.997  # until all bodies fit
        body = sample_body(rng) * height * rng.uniform(0.6, 1)
        low, high = body[:, :2].min(0), body[:, :2].max(0)
        # Some people extend beyond the picture.
        slack = (high - low) * (rng.uniform(0.05, 0.3) if rng.random() < 0.25 else 0.0)
        body[:, :2] += rng.uniform(*np.sort([-low - slack, size_wh - high + slack], axis=0))
        joints_J2 = body[:JOINTS, :2]
        inside = np.all((joints_J2 >= 0) & (joints_J2 <= np.array(size_wh) - 1), axis=1)
        gaps = [np.hypot(*(body - other)[:, :2].mean(0)) for other in bodies]
        apart = min(gaps, default=np.inf) > 0.42 * height
        # Errors are divided by the head's length in the picture, which must not be near 0.
        head_px = np.hypot(*(body[HEAD_TOP] - body[NECK])[:2])
        whole = inside[[NECK, HEAD_TOP]].all() and inside.sum() >= 10
        if apart and whole and head_px > 0.125 * height_of(body):
            bodies.append(body)
    return bodies


def annotate(rng: Generator, points_P3: Array, map_HW: Array, first: int) -> Person:
    """The row of a drawn body; a few joints are left unmarked, as annotators do."""
    joints_J2, last_xy = points_P3[:JOINTS, :2], np.array(map_HW.shape[::-1]) - 1
    inside = np.all((joints_J2 >= 0) & (joints_J2 <= last_xy), axis=1)
    kept = inside & (rng.random(JOINTS) > 0.03)
    kept[[NECK, HEAD_TOP]] = True
    marked = kept if kept.sum() >= 8 else inside
    x_J, y_J = np.where(marked, joints_J2.round().astype(int).T, 0)
    low, high = points_P3[:, :2].min(0), points_P3[:, :2].max(0)
    box_px = (high - low).max() * rng.uniform(0.95, 1.05)
    scale = box_px / skeleton.PIXELS_PER_SCALE
    shift = rng.normal(0, 0.02, 2) * box_px + [0.0, skeleton.BOX_SHIFT_Y_PX * scale]
    return {
        "part": np.where(marked[:, None], joints_J2, 0.0),
        "visible": (marked & (map_HW[y_J, x_J] == first + np.arange(JOINTS))).astype(float),
        "center": (low + high) / 2 + shift,
        "scale": skeleton.BOX_SCALE * scale,
        "normalize": skeleton.MPII_HEAD_LENGTH.factor
        * np.hypot(*(joints_J2[HEAD_TOP] - joints_J2[NECK])),
        "torsoangle": 0.0,
    }


def draw_clutter(rng: Generator, canvas: Canvas, at_2: Array, largest: float) -> None:
    """A disc, a shape like a limb, or a polygon. largest: share of the picture's height."""
    size = len(canvas.image_HW3) * float(np.clip(rng.lognormal(-2.1, 0.6), 0.02, largest))
    corners = at_2 + size * rng.uniform(-1, 1, (rng.choice([1, 2, 3, 5]), 2))
    radii = size * rng.uniform(0.03, 0.2) * rng.uniform(0.7, 1, len(corners))
    saturation = rng.uniform(0, 0.35) if rng.random() < 0.93 else rng.uniform(0.35, 0.7)
    color = color_of(rng.uniform(0, 360), saturation, rng.uniform(0.1, 0.95))
    canvas.hull(corners, radii, color)


def add_light_and_noise(rng: Generator, image_HW3: Array) -> Array:
    """Add uneven light, a colour cast and noise."""
    height, width = image_HW3.shape[:2]
    light = rng.uniform(0.8, 1.3) * rng.uniform(0.88, 1.12, (2, 3, 1)) * rng.uniform(0.95, 1.05, 3)
    gain = cv2.resize(light.astype(np.float32), (width, height))
    image = cv2.multiply(image_HW3, gain, dtype=cv2.CV_8U)
    for cells in (rng.integers(6, 24), rng.integers(40, 120), max(width, height)):
        noise = rng.normal(0, rng.uniform(1, 6), (cells, cells)).astype(np.float32)
        image = cv2.add(image, cv2.merge([cv2.resize(noise, (width, height))] * 3), dtype=cv2.CV_8U)
    return image


def draw_data_set(output: Path, options: dict[str, int], workers: int) -> None:
    """Write images/*.jpg, annot/train.h5 and annot/valid.h5, and the options into synthetic.json.

    options: "train" and "valid", the numbers of people, "seed" and "max_width", px. The output does
    not depend on the number of workers. The folder is renamed to `output` when it is complete.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as parent,
        worker_pool(workers) as map_tasks,
    ):
        folder = Path(parent) / "complete"
        (folder / "images").mkdir(parents=True)
        (folder / "annot").mkdir()
        for split, name in enumerate(("train", "valid")):
            # Every third picture has two people.
            people = np.bincount(np.arange(options[name]) * 3 // 4).tolist()
            draw = functools.partial(draw_picture, folder / "images", options, split)
            drawn = map_tasks(draw, enumerate(people))
            shown = progress(drawn, f"drawing {name}", "pictures", len(people))
            rows = [person for of_picture in shown for person in of_picture]
            write_annotations(folder / "annot" / f"{name}.h5", rows)
        (folder / "synthetic.json").write_text(json.dumps(options, indent=2) + "\n")
        folder.rename(output)


def draw_picture(
    folder: Path, options: dict[str, int], split: int, picture: tuple[int, int]
) -> list[Person]:
    """Draw and write one picture, (number, people). Returns its people."""
    number, annotated = picture
    rng = np.random.default_rng([options["seed"], split, number])
    sizes = [size for size in SIZES_WH if size[0] <= options["max_width"]]
    image, people = draw_scene(rng, annotated, sizes[rng.integers(len(sizes))])
    name = f"{split}{number:08d}.jpg"  # 13 characters, as MPII's
    cv2.imwrite(str(folder / name), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    facts = {"imgname": name.encode(), "index": float(number)}
    return [person | facts | {"person": float(n)} for n, person in enumerate(people)]


def write_annotations(path: Path, people: list[Person]) -> None:
    """Write an h5 file with the keys and types of MPII's valid.h5."""
    with h5py.File(path, "w") as file:
        for key in people[0]:
            # Time stamps would make the bytes differ from run to run.
            file.create_dataset(key, data=np.array([p[key] for p in people]), track_times=False)
