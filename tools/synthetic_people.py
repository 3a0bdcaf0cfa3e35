"""Synthetic people: a random pose of a kinematic chain, random clothes, and shapes drawn by OpenCV.

Axes: x right and y down in the picture, z away from the viewer. A body at rest faces the viewer,
so that its own left is +x. Right limbs are red to magenta and plain, left limbs blue to cyan and
banded: every joint can be told from its mirror image by looking. A mirrored picture contradicts
this, so train on these people without flips. Colours are BGR, 0 to 255.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from configs.skeleton import (
    HEAD_TOP,
    L_ANKLE,
    L_ELBOW,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    L_WRIST,
    PELVIS,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
    THORAX,
    UPPER_NECK,
)

Array = NDArray[np.float64]
Pixels = NDArray[Any]
"""uint8; OpenCV's own annotations do not say so."""
Colour = tuple[float, float, float]

# Parts of a body, as written into Canvas.owners (plus the person's first number).
TORSO, BELT, HEAD, R_ARM, R_FOREARM, L_ARM, L_FOREARM, R_THIGH, R_SHIN, L_THIGH, L_SHIN = range(11)
PARTS = 11
TRUNK = (TORSO, BELT)

PARTS_OF_JOINT = {
    R_ANKLE: (R_SHIN,), R_KNEE: (R_SHIN, R_THIGH), R_HIP: (R_THIGH, *TRUNK),
    L_HIP: (L_THIGH, *TRUNK), L_KNEE: (L_SHIN, L_THIGH), L_ANKLE: (L_SHIN,),
    PELVIS: (*TRUNK, R_THIGH, L_THIGH), THORAX: (TORSO, HEAD), UPPER_NECK: (TORSO, HEAD),
    HEAD_TOP: (HEAD,), R_WRIST: (R_FOREARM,), R_ELBOW: (R_FOREARM, R_ARM),
    R_SHOULDER: (R_ARM, *TRUNK), L_SHOULDER: (L_ARM, *TRUNK), L_ELBOW: (L_FOREARM, L_ARM),
    L_WRIST: (L_FOREARM,),
}  # fmt: skip
"""Where a joint is seen: any of these parts on top at its pixel."""

PART_ENDS = {
    TORSO: (THORAX, PELVIS, 0.0), BELT: (THORAX, PELVIS, -0.001),
    HEAD: (HEAD_TOP, UPPER_NECK, -0.02),
    R_ARM: (R_SHOULDER, R_ELBOW, -0.03), R_FOREARM: (R_ELBOW, R_WRIST, -0.04),
    L_ARM: (L_SHOULDER, L_ELBOW, -0.03), L_FOREARM: (L_ELBOW, L_WRIST, -0.04),
    R_THIGH: (R_HIP, R_KNEE, 0.02), R_SHIN: (R_KNEE, R_ANKLE, 0.02),
    L_THIGH: (L_HIP, L_KNEE, 0.02), L_SHIN: (L_KNEE, L_ANKLE, 0.02),
}  # fmt: skip
"""The joints at a part's ends, and a bias of its depth in body heights.

It settles what lies side by side: arms before the chest, the belt over the trousers.
"""

SUBPIXEL_BITS = 4
LIGHT_XY = np.array([-0.45, -0.9])
"""Where the light comes from in the picture; limbs are brighter on this side."""


class Posture(NamedTuple):
    """Ranges of joint angles and the spread of the whole body's turn in the picture, in degrees."""

    share: float
    """How often it is drawn, as a share of all."""
    roll_sd: float
    """Standard deviation; 180 stands for any turn at all."""
    bend: tuple[float, float]
    arm_forward: tuple[float, float]
    arm_out: tuple[float, float]
    elbow: tuple[float, float]
    hip_forward: tuple[float, float]
    hip_out: tuple[float, float]
    knee: tuple[float, float]


POSTURES = (
    Posture(0.13, 25, (-5, 15), (-25, 40), (4, 60), (0, 110), (-8, 14), (2, 18), (0, 15)),  # stand
    Posture(0.16, 25, (-5, 25), (-45, 70), (4, 50), (10, 110), (-30, 55), (0, 12), (0, 75)),  # walk
    Posture(0.14, 30, (-10, 20), (-20, 50), (60, 175), (0, 120), (-15, 25), (2, 30), (0, 30)),
    Posture(
        0.11, 25, (-15, 25), (-20, 80), (4, 70), (0, 120), (60, 100), (3, 35), (50, 110)
    ),  # sit
    Posture(0.10, 25, (5, 45), (-20, 120), (4, 80), (0, 120), (60, 120), (3, 45), (60, 140)),
    Posture(0.09, 30, (30, 80), (0, 140), (4, 60), (0, 100), (-10, 50), (2, 25), (0, 45)),  # lean
    Posture(0.14, 55, (-20, 35), (-50, 150), (5, 160), (0, 130), (-40, 110), (3, 60), (0, 110)),
    Posture(0.13, 180, (-15, 40), (-50, 150), (5, 160), (0, 130), (-20, 90), (3, 35), (0, 110)),
)


@dataclass(frozen=True)
class Body:
    """One posed person.

    joints: (16, 3) x, y, depth. hands, toes: (2, 3) tips, right then left.
    face_3, chest_3: unit vectors, where the face and the chest look. height: standing upright.
    All lengths in one unit: body heights with the pelvis at the origin, or picture pixels.
    """

    joints: Array
    hands: Array
    toes: Array
    face_3: Array
    chest_3: Array
    height: float

    def placed(self, height_px: float, origin_2: Array) -> "Body":
        """This body of body heights in picture pixels, its pelvis at origin_2 (x, y)."""
        origin_3 = np.array([*origin_2, 0.0])
        return Body(
            joints=self.joints * height_px + origin_3,
            hands=self.hands * height_px + origin_3,
            toes=self.toes * height_px + origin_3,
            face_3=self.face_3,
            chest_3=self.chest_3,
            height=self.height * height_px,
        )

    def bounds(self) -> tuple[Array, Array]:
        """(2,) low and (2,) high corner x, y of the box around joints, hands and feet."""
        points = np.concatenate([self.joints, self.hands, self.toes])[:, :2]
        return points.min(0), points.max(0)


def rotation(axis: str, degrees: float) -> Array:
    """(3, 3) rotation about "x", "y" or "z"; positive about x tips what is up to the viewer."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    if axis == "x":
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    if axis == "y":
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def sample_body(rng: np.random.Generator) -> Body:
    """A random body in body heights with its pelvis at (0, 0, 0), its head not seen end on."""
    shares = np.array([posture.share for posture in POSTURES])
    posture = POSTURES[rng.choice(len(POSTURES), p=shares / shares.sum())]
    while True:
        body = _pose_body(rng, posture)
        head_2 = (body.joints[HEAD_TOP] - body.joints[UPPER_NECK])[:2]
        trunk_2 = (body.joints[THORAX] - body.joints[PELVIS])[:2]
        # normalize is this 2D head length: end on, no answer could come within half of it.
        if np.hypot(*head_2) > 0.125 and np.hypot(*trunk_2) > 0.12:
            return body


def _pose_body(rng: np.random.Generator, posture: Posture) -> Body:
    roll = rng.uniform(-180, 180) if posture.roll_sd >= 180 else rng.normal(0, posture.roll_sd)
    yaw = rng.choice([0, 180, 90, -90], p=[0.46, 0.28, 0.13, 0.13]) + rng.normal(0, 28)
    root = rotation("z", roll) @ rotation("x", rng.normal(6, 8)) @ rotation("y", yaw)
    bend = rng.uniform(*posture.bend)
    chest = root @ rotation("x", bend) @ rotation("z", rng.normal(0, 9))
    chest = chest @ rotation("y", rng.normal(0, 12))
    head = chest @ rotation("x", rng.normal(4, 9) - 0.5 * bend) @ rotation("z", rng.normal(0, 9))
    head = head @ rotation("y", rng.normal(0, 22))
    build = rng.normal(1, 0.05, 8).clip(0.87, 1.13)
    up = np.array([0.0, -1.0, 0.0])
    joints = np.zeros((16, 3))
    joints[THORAX] = chest @ up * 0.295 * build[0]
    joints[UPPER_NECK] = joints[THORAX] + chest @ up * 0.042
    joints[HEAD_TOP] = joints[UPPER_NECK] + head @ up * 0.175 * build[1]
    hands, toes = np.zeros((2, 3)), np.zeros((2, 3))
    for row, side in ((0, -1), (1, 1)):
        hands[row] = _pose_arm(rng, posture, joints, chest, side, build)
        toes[row] = _pose_leg(rng, posture, joints, root, side, build)
    front = np.array([0.0, 0.0, -1.0])
    return Body(joints, hands, toes, head @ front, chest @ front, 1.0)


def _pose_arm(
    rng: np.random.Generator, posture: Posture, joints: Array, chest: Array, side: int, build: Array
) -> Array:
    """The (3,) tip of the hand. Fills in shoulder, elbow and wrist. side: -1 right, 1 left."""
    s, e, w = (R_SHOULDER, R_ELBOW, R_WRIST) if side < 0 else (L_SHOULDER, L_ELBOW, L_WRIST)
    out, forward = rng.uniform(*posture.arm_out), rng.uniform(*posture.arm_forward)
    # The rest of the shoulder blade's motion: a raised arm lifts its shoulder.
    lift = 0.03 * np.sin(np.radians(out / 2)) ** 2
    joints[s] = joints[THORAX] + chest @ np.array([side * 0.112 * build[2], 0.018 - lift, 0.0])
    arm = chest @ rotation("z", -side * out) @ rotation("x", -forward)
    arm = arm @ rotation("y", side * rng.uniform(-30, 80))
    forearm = arm @ rotation("x", -rng.uniform(*posture.elbow))
    down = np.array([0.0, 1.0, 0.0])
    joints[e] = joints[s] + arm @ down * 0.172 * build[3]
    joints[w] = joints[e] + forearm @ down * 0.150 * build[4]
    return joints[w] + forearm @ rotation("x", rng.normal(0, 18)) @ down * 0.072


def _pose_leg(
    rng: np.random.Generator, posture: Posture, joints: Array, root: Array, side: int, build: Array
) -> Array:
    """The (3,) tip of the toes. Fills in hip, knee and ankle. side: -1 right, 1 left."""
    h, k, a = (R_HIP, R_KNEE, R_ANKLE) if side < 0 else (L_HIP, L_KNEE, L_ANKLE)
    out, forward = rng.uniform(*posture.hip_out), rng.uniform(*posture.hip_forward)
    joints[h] = root @ np.array([side * 0.062 * build[5], 0.0, 0.0])
    thigh = root @ rotation("z", -side * out) @ rotation("x", -forward)
    thigh = thigh @ rotation("y", -side * rng.uniform(-5, 25))
    shin = thigh @ rotation("x", rng.uniform(*posture.knee))
    down = np.array([0.0, 1.0, 0.0])
    joints[k] = joints[h] + thigh @ down * 0.245 * build[6]
    joints[a] = joints[k] + shin @ down * 0.235 * build[7]
    sole = shin @ rotation("x", rng.normal(0, 10)) @ rotation("y", -side * 12)
    return joints[a] + sole @ np.array([0.0, 0.045, -0.085])


@dataclass(frozen=True)
class SideLook:
    """Clothes of one side of a body."""

    sleeve: Colour
    leg: Colour
    patch: Colour
    cuff: Colour
    hand: Colour
    shoe: Colour
    band: Colour | None
    """Colour of the bands across the limb; None draws none."""


@dataclass(frozen=True)
class Look:
    """Clothes, skin and build of one person. Sides: right, then left."""

    sides: tuple[SideLook, SideLook]
    skin: Colour
    hair: Colour
    shirt: Colour
    belt: Colour
    long_sleeves: bool
    legs: str
    """ "trousers", "shorts" or "skirt"."""
    thickness: float
    """Factor on the width of all limbs."""


def bgr_from_hsv(hue_deg: float, saturation: float, value: float) -> Colour:
    """One BGR colour, 0 to 255, from a hue in degrees and two fractions."""
    k = (np.array([1.0, 3.0, 5.0]) + (hue_deg % 360) / 60) % 6
    b, g, r = 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return float(b), float(g), float(r)


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter, within 0 to 255."""
    return tuple(np.clip(np.array(colour) * factor, 0, 255).tolist())


def sample_look(rng: np.random.Generator) -> Look:
    """Random clothes, right ones in red to magenta and left ones in blue to cyan."""
    skin_value = rng.uniform(0.35, 0.95)
    skin = bgr_from_hsv(rng.uniform(16, 32), rng.uniform(0.25, 0.5), skin_value)
    shirt = bgr_from_hsv(rng.uniform(35, 150), rng.uniform(0, 0.6), rng.uniform(0.25, 1.0))
    hair_kind = rng.choice(3, p=[0.6, 0.2, 0.2])
    hair = (
        bgr_from_hsv(25, 0.5, rng.uniform(0.05, 0.35)),
        bgr_from_hsv(42, 0.55, rng.uniform(0.7, 0.95)),
        bgr_from_hsv(rng.uniform(60, 140), rng.uniform(0.3, 0.9), rng.uniform(0.4, 0.9)),
    )[hair_kind]
    gloves = rng.random() < 0.5
    sides = (
        _sample_side(rng, rng.uniform(-38, 4), skin, gloves, banded=False),
        _sample_side(rng, rng.uniform(186, 226), skin, gloves, banded=True),
    )
    return Look(
        sides=sides,
        skin=skin,
        hair=hair,
        shirt=shirt,
        belt=bgr_from_hsv(30, 0.4, rng.uniform(0.05, 0.2)),
        long_sleeves=bool(rng.random() < 0.55),
        legs=str(rng.choice(["trousers", "shorts", "skirt"], p=[0.6, 0.27, 0.13])),
        thickness=float(rng.uniform(0.85, 1.2)),
    )


def _sample_side(
    rng: np.random.Generator, hue_deg: float, skin: Colour, gloves: bool, banded: bool
) -> SideLook:
    def tone(low: float, high: float) -> Colour:
        return bgr_from_hsv(
            hue_deg + rng.normal(0, 4), rng.uniform(0.65, 0.95), rng.uniform(low, high)
        )

    cuff = tone(0.75, 1.0)
    return SideLook(
        sleeve=tone(0.45, 0.8),
        leg=tone(0.35, 0.7),
        patch=bgr_from_hsv(hue_deg, rng.uniform(0.35, 0.5), 1.0),
        cuff=cuff,
        hand=shade(cuff, 0.8) if gloves else skin,
        shoe=tone(0.5, 0.9),
        band=bgr_from_hsv(hue_deg, 0.2, rng.uniform(0.85, 1.0)) if banded else None,
    )


@dataclass(frozen=True)
class Canvas:
    """A picture under construction.

    picture: (H, W, 3) uint8 BGR. owners: (H, W) uint8, what is on top at a pixel.
    """

    picture: Pixels
    owners: Pixels

    def fill(self, points_K2: Array, colour: Colour, owner: int) -> None:
        """Fill a polygon: antialiased in the picture, whole pixels in the owner map."""
        fixed_K2 = np.round(points_K2 * (1 << SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(self.picture, [fixed_K2], colour, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.fillPoly(self.owners, [fixed_K2], (float(owner),), cv2.LINE_8, SUBPIXEL_BITS)


def ellipse_points(centre_2: Array, axis_2: Array, half_width: float, count: int = 28) -> Array:
    """(count, 2) outline of an ellipse; axis_2 runs from the centre to one end."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)[:, None]
    length = max(float(np.hypot(*axis_2)), 1e-6)
    across_2 = np.array([-axis_2[1], axis_2[0]]) / length * half_width
    return centre_2 + np.cos(t) * axis_2 + np.sin(t) * across_2


def disc_points(centre_2: Array, radius: float) -> Array:
    """(28, 2) outline of a disc."""
    return ellipse_points(centre_2, np.array([radius, 0.0]), radius)


def hull_points(discs: list[tuple[Array, float]]) -> Array:
    """(K, 2) outline of the convex hull of discs, each (centre, radius)."""
    points = np.concatenate([disc_points(centre, radius) for centre, radius in discs])
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)


class Brush(NamedTuple):
    """Draws one person's shapes. first_owner: the person's TORSO number in the owner map."""

    canvas: Canvas
    body: Body
    look: Look
    first_owner: int

    def px(self, heights: float) -> float:
        """Pixels of a width given in body heights."""
        return heights * self.body.height * self.look.thickness

    def fill(self, points_K2: Array, colour: Colour, part: int) -> None:
        """Fill a polygon of one part."""
        self.canvas.fill(points_K2, colour, self.first_owner + part)

    def limb(self, a_2: Array, b_2: Array, ra: float, rb: float, colour: Colour, part: int) -> None:
        """A tapered limb from a to b, lit from one side. ra, rb: radii in body heights."""
        ra, rb = self.px(ra), self.px(rb)
        self.fill(hull_points([(a_2, ra), (b_2, rb)]), shade(colour, 0.7), part)
        lit_a, lit_b = a_2 + LIGHT_XY * 0.2 * ra, b_2 + LIGHT_XY * 0.2 * rb
        self.fill(hull_points([(lit_a, 0.72 * ra), (lit_b, 0.72 * rb)]), colour, part)

    def bands(
        self, a_2: Array, b_2: Array, radii: tuple[float, float], colour: Colour, part: int
    ) -> None:
        """Bands across the limb from a to b, the mark of the left side."""
        along_2 = b_2 - a_2
        length = float(np.hypot(*along_2))
        if length < 1:
            return
        across_2 = np.array([-along_2[1], along_2[0]]) / length
        for t in (0.28, 0.5, 0.72):
            half_2 = across_2 * self.px(radii[0] + (radii[1] - radii[0]) * t) * 0.92
            low_2, high_2 = a_2 + along_2 * (t - 0.05), a_2 + along_2 * (t + 0.05)
            quad = np.array([low_2 - half_2, low_2 + half_2, high_2 + half_2, high_2 - half_2])
            self.fill(quad, colour, part)


def draw_person(canvas: Canvas, body: Body, look: Look, first_owner: int) -> None:
    """Draw a body, its parts from the farthest to the nearest. body: in pixels."""
    brush = Brush(canvas, body, look, first_owner)
    depths = _part_depths(body)
    for part in sorted(depths, key=lambda part: -depths[part]):
        if part == TORSO:
            _draw_torso(brush)
        elif part == BELT:
            _draw_belt(brush)
        elif part == HEAD:
            _draw_head(brush)
        elif part in (R_ARM, R_FOREARM, L_ARM, L_FOREARM):
            _draw_arm(brush, part)
        else:
            _draw_leg(brush, part)


def _part_depths(body: Body) -> dict[int, float]:
    """Depth of each part, in body heights: the middle of its ends and its bias."""
    z = body.joints[:, 2] / body.height
    depths = {part: float((z[a] + z[b]) / 2 + bias) for part, (a, b, bias) in PART_ENDS.items()}
    # Seen from the front the chin is before the collar, seen from the back behind it.
    depths[HEAD] += 0.03 * float(np.sign(body.chest_3[2]))
    return depths


def _draw_torso(brush: Brush) -> None:
    joints = brush.body.joints[:, :2]
    shoulder, hip = brush.px(0.042), brush.px(0.05)
    waist = joints[PELVIS] + 0.35 * (joints[THORAX] - joints[PELVIS])
    chest = hull_points(
        [(joints[R_SHOULDER], shoulder), (joints[L_SHOULDER], shoulder), (waist, brush.px(0.075))]
    )
    loins = hull_points([(joints[R_HIP], hip), (joints[L_HIP], hip), (waist, brush.px(0.075))])
    brush.fill(loins, shade(brush.look.shirt, 0.8), TORSO)
    brush.fill(chest, shade(brush.look.shirt, 0.8), TORSO)
    brush.limb(joints[THORAX], joints[PELVIS], 0.07, 0.06, brush.look.shirt, TORSO)
    front = -brush.body.chest_3[2]
    spine = joints[PELVIS] + np.outer((0.1, 0.97), joints[THORAX] - joints[PELVIS])
    shift = brush.body.chest_3[:2] * brush.px(0.05)
    if front > 0.2:  # a zip from collar to belt
        line = hull_points(
            [(spine[0] + shift, brush.px(0.006)), (spine[1] + shift, brush.px(0.006))]
        )
        brush.fill(line, shade(brush.look.shirt, 0.35), TORSO)
    elif front < -0.2:  # a number patch on the back
        middle, axis = spine.mean(0) - shift, (spine[1] - spine[0]) * 0.24
        brush.fill(
            ellipse_points(middle, axis, brush.px(0.05)), shade(brush.look.shirt, 0.5), TORSO
        )
    collar = brush.px(0.038)
    brush.fill(disc_points(joints[THORAX], collar), shade(brush.look.shirt, 0.45), TORSO)
    brush.limb(joints[THORAX], joints[UPPER_NECK], 0.026, 0.028, shade(brush.look.skin, 0.9), TORSO)


def _draw_belt(brush: Brush) -> None:
    joints = brush.body.joints
    hips = sorted((R_HIP, L_HIP), key=lambda joint: -joints[joint, 2])
    pelvis_2 = joints[PELVIS, :2]
    if brush.look.legs == "skirt":
        thighs = [
            (joints[hip, :2] + 0.5 * (joints[knee, :2] - joints[hip, :2]), brush.px(0.07))
            for hip, knee in ((R_HIP, R_KNEE), (L_HIP, L_KNEE))
        ]
        hips_and_thighs = [*thighs, *[(joints[hip, :2], brush.px(0.055)) for hip in hips]]
        brush.fill(hull_points(hips_and_thighs), shade(brush.look.shirt, 0.6), BELT)
    for hip in hips:
        side = brush.look.sides[hip == L_HIP]
        brush.limb(pelvis_2, joints[hip, :2], 0.04, 0.052, side.leg, BELT)
        brush.fill(disc_points(joints[hip, :2], brush.px(0.024)), side.patch, BELT)
    ends = [(joints[hip, :2], brush.px(0.011)) for hip in hips]
    brush.fill(hull_points(ends), brush.look.belt, BELT)
    brush.fill(disc_points(pelvis_2, brush.px(0.02)), (70.0, 225.0, 245.0), BELT)


def _draw_head(brush: Brush) -> None:
    neck, top = (brush.body.joints[joint, :2] for joint in (UPPER_NECK, HEAD_TOP))
    axis = top - neck
    length = float(np.hypot(*axis))
    look, face = brush.look, brush.body.face_3
    # The skull ends exactly at the head-top joint; the chin reaches down to the neck joint.
    brush.fill(ellipse_points(neck + 0.53 * axis, 0.47 * axis, 0.38 * length), look.hair, HEAD)
    if face[2] > 0.35:
        brush.fill(ellipse_points(neck + 0.2 * axis, 0.16 * axis, 0.2 * length), look.hair, HEAD)
        return
    middle = neck + 0.42 * axis + face[:2] * 0.17 * length
    brush.fill(ellipse_points(middle, 0.36 * axis, 0.29 * length), look.skin, HEAD)
    features = middle + face[:2] * 0.12 * length
    across = np.array([-axis[1], axis[0]]) * max(0.05, -face[2]) * 0.14
    dark = shade(look.skin, 0.2)
    for eye in (features + across + 0.08 * axis, features - across + 0.08 * axis):
        brush.fill(disc_points(eye, 0.045 * length), dark, HEAD)
    mouth = hull_points(
        [(features - 0.17 * axis + s * across * 0.8, 0.02 * length) for s in (-1, 1)]
    )
    brush.fill(mouth, (60.0, 50.0, 140.0), HEAD)
    brush.fill(disc_points(features - 0.03 * axis, 0.04 * length), shade(look.skin, 0.75), HEAD)


def _draw_arm(brush: Brush, part: int) -> None:
    left = part in (L_ARM, L_FOREARM)
    s, e, w = (L_SHOULDER, L_ELBOW, L_WRIST) if left else (R_SHOULDER, R_ELBOW, R_WRIST)
    shoulder, elbow, wrist = (brush.body.joints[joint, :2] for joint in (s, e, w))
    look, side = brush.look, brush.look.sides[left]
    if part in (R_ARM, L_ARM):
        end = elbow if look.long_sleeves else shoulder + 0.6 * (elbow - shoulder)
        brush.limb(shoulder, elbow, 0.032, 0.027, look.skin, part)
        brush.limb(shoulder, end, 0.038, 0.034, side.sleeve, part)
        if side.band:
            brush.bands(shoulder, end, (0.038, 0.034), side.band, part)
        brush.fill(disc_points(shoulder, brush.px(0.024)), side.patch, part)
    else:
        colour = side.sleeve if look.long_sleeves else look.skin
        hand = brush.body.hands[int(left), :2]
        brush.limb(wrist + 0.3 * (hand - wrist), hand, 0.022, 0.016, side.hand, part)
        brush.limb(elbow, wrist, 0.029, 0.021, colour, part)
        if side.band and look.long_sleeves:
            brush.bands(elbow, wrist, (0.029, 0.021), side.band, part)
        brush.limb(wrist - 0.12 * (wrist - elbow), wrist, 0.025, 0.026, side.cuff, part)
    brush.fill(disc_points(elbow, brush.px(0.026)), side.patch, part)


def _draw_leg(brush: Brush, part: int) -> None:
    left = part in (L_THIGH, L_SHIN)
    h, k, a = (L_HIP, L_KNEE, L_ANKLE) if left else (R_HIP, R_KNEE, R_ANKLE)
    hip, knee, ankle = (brush.body.joints[joint, :2] for joint in (h, k, a))
    look, side = brush.look, brush.look.sides[left]
    long = look.legs == "trousers"
    if part in (R_THIGH, L_THIGH):
        end = knee if long else hip + 0.65 * (knee - hip)
        brush.limb(hip, knee, 0.046, 0.036, look.skin, part)
        brush.limb(hip, end, 0.052, 0.04 if long else 0.05, side.leg, part)
        if side.band:
            brush.bands(hip, end, (0.052, 0.04 if long else 0.05), side.band, part)
        brush.fill(disc_points(hip, brush.px(0.024)), side.patch, part)
    else:
        toe = brush.body.toes[int(left), :2]
        colour = side.leg if long else look.skin
        brush.limb(knee, ankle, 0.038, 0.027, colour, part)
        if side.band and long:
            brush.bands(knee, ankle, (0.038, 0.027), side.band, part)
        heel = ankle + 0.35 * (toe - ankle)
        brush.limb(heel, toe, 0.026, 0.02, side.shoe, part)
        brush.limb(ankle - 0.1 * (ankle - knee), ankle, 0.028, 0.03, side.cuff, part)
    brush.fill(disc_points(knee, brush.px(0.03)), side.patch, part)


def visible_joints(owners: Pixels, body: Body, first_owner: int) -> NDArray[np.bool_]:
    """(16,) whether each joint is seen: one of its own parts is on top where it lies.

    body: in pixels. Joints outside the picture are not seen.
    """
    joints = body.joints
    test_J2 = joints[:, :2].copy()
    # The head top lies on the outline itself: look a little inside.
    test_J2[HEAD_TOP] += 0.12 * (joints[UPPER_NECK, :2] - joints[HEAD_TOP, :2])
    test_J2 = np.round(test_J2).astype(int)
    inside = (test_J2 >= 0).all(1) & (test_J2 < owners.shape[::-1]).all(1)
    seen = np.zeros(len(joints), bool)
    for joint in np.flatnonzero(inside):
        part = int(owners[test_J2[joint, 1], test_J2[joint, 0]]) - first_owner
        behind = part in TRUNK and _behind_trunk(joints, int(joint), body.height)
        seen[joint] = part in PARTS_OF_JOINT[int(joint)] and not behind
    return seen


def _behind_trunk(joints: Array, joint: int, height: float) -> bool:
    """Whether a shoulder or hip is the far one of a body seen from its side."""
    middle = {R_SHOULDER: THORAX, L_SHOULDER: THORAX, R_HIP: PELVIS, L_HIP: PELVIS}.get(joint)
    return middle is not None and joints[joint, 2] - joints[middle, 2] > 0.04 * height
