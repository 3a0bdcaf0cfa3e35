"""Follows people through a film: where to look in the next frame, and smoother joints.

Decision 027 says why these rules; docs/predict.md has their numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from configs.skeleton import PIXELS_PER_SCALE
from evaluation.pckh import Floats
from pipelines.boxes import MARGIN, Square, square_about

FAIR = 0.2
"""A joint with a lower score does not count: for the next square, and in a person's score."""
SAME_PERSON = 0.3
"""Least IoU of a detection and the track that it continues."""
STILL = 0.9
"""Up to this IoU with the new square a track's square stays, because joints jitter as it moves."""
DUPLICATE = 0.7
"""Two tracks whose squares have this IoU follow the same person."""


class Smoothing(NamedTuple):
    """Parameters of a `OneEuroFilter`."""

    min_cutoff_hz: float
    """Cutoff frequency of a joint at rest; lower: less jitter."""
    beta_hz: float
    """Added to it at a speed of one side of the person's square per second; higher: less lag."""


class OneEuroFilter:
    """The filter of one person's joints (Casiez, Roussel, Vogel: 1 Euro Filter, CHI 2012).

    A low-pass filter whose cutoff frequency grows with the joint's speed. The paper filters single
    numbers; here x and y of a joint share the cutoff, so that the axes do not matter. Speeds are in
    sides of the person's square, so that the size of the picture does not matter.
    """

    SPEED_CUTOFF_HZ = 1.0
    """The paper's dcutoff."""

    def __init__(self, smoothing: Smoothing, frames_per_second: float):
        self.smoothing, self.rate = smoothing, frames_per_second
        self.restart()

    def restart(self) -> None:
        """The next joints are returned unchanged."""
        self.points_J2: Floats | None = None
        self.speed_J2: Floats | float = 0.0

    def __call__(self, points_J2: Floats, side_px: float) -> Floats:
        """The smoothed joints (px) of the next frame. side_px: of the person's square."""
        if self.points_J2 is None:
            self.points_J2 = points_J2
        change_J2 = points_J2 - self.points_J2
        speed_J2 = change_J2 * self.rate / side_px
        self.speed_J2 += self._weight(self.SPEED_CUTOFF_HZ) * (speed_J2 - self.speed_J2)
        speed_J1 = np.linalg.norm(self.speed_J2, axis=1, keepdims=True)
        cutoff_J1 = self.smoothing.min_cutoff_hz + self.smoothing.beta_hz * speed_J1
        self.points_J2 = self.points_J2 + self._weight(cutoff_J1) * change_J2
        return self.points_J2

    def _weight(self, cutoff_hz: Floats | float) -> Floats | float:
        """Weight of the new value in exponential smoothing; the paper's alpha."""
        return 1 / (1 + self.rate / (2 * np.pi * cutoff_hz))


class Track:
    """One person in consecutive frames."""

    def __init__(self, identity: int, smooth: OneEuroFilter | None):
        self.identity, self.smooth = identity, smooth
        self.square: Square | None = None
        """Where the person is looked for; None while the person is lost."""
        self.given: int | None = None
        """Index of `square` among the given ones; None: it is about the last joints."""
        self.places_J2: Floats | None = None
        """Where the joints are, px; NaN if a joint has not been found since the person was lost."""

    def place(self, keypoints_J2: Floats, scores_J: Floats) -> Square | None:
        """The square about the person's joints, now that these were found (px).

        A joint whose score is not fair moves as the others do on average; so the square does not
        shrink to the joints that are found. None, which is lost, if fewer than half are fair.
        """
        is_fair_J = scores_J >= FAIR
        if is_fair_J.mean() < 0.5:
            self.places_J2 = None
            return None
        if self.places_J2 is None:
            self.places_J2 = np.full_like(keypoints_J2, np.nan)
        moved_K2 = (keypoints_J2 - self.places_J2)[is_fair_J & ~np.isnan(self.places_J2[:, 0])]
        move_2 = moved_K2.mean(axis=0) if len(moved_K2) else 0.0
        self.places_J2 = np.where(is_fair_J[:, None], keypoints_J2, self.places_J2 + move_2)
        return square_of_joints(self.places_J2[~np.isnan(self.places_J2[:, 0])])


class Tracker:
    """The tracks of a film.

    are_fixed: the same squares are given in each frame, one for each person, who is looked for
    there at first and while lost. Otherwise they are detections: each continues the track that it
    overlaps most, or begins one. follow: look about the last joints where no square is given.
    """

    def __init__(
        self, are_fixed: bool, follow: bool, smoothing: Smoothing | None, frames_per_second: float
    ):
        self.are_fixed, self.follow = are_fixed, follow
        self.smoothing, self.rate = smoothing, frames_per_second
        self.tracks: list[Track] = []
        self.begun = 0

    def look(self, squares: Sequence[Square]) -> list[Track]:
        """The people to find in the next frame, each with its square. squares: the given ones."""
        followed = self.followed()
        if self.are_fixed:
            self.tracks = self.tracks or [self._begin() for _ in squares]
            placed = {i: t for i, t in enumerate(self.tracks) if t not in followed}
        else:
            owners, taken = match(squares, followed), [*squares]
            self.tracks = [owners.get(i) or self._begin() for i in range(len(squares))]
            placed = dict(enumerate(self.tracks))
            for track, square in followed.items() if self.follow else ():
                if track not in self.tracks and all(iou(square, t) < DUPLICATE for t in taken):
                    self.tracks.append(track)
                    taken.append(square)
        for i, track in placed.items():
            track.square, track.given = squares[i], i
        return self.tracks

    def followed(self) -> dict[Track, Square]:
        """The people who are not lost, and where they are."""
        return {track: track.square for track in self.tracks if track.square}

    def update(self, track: Track, keypoints_J2: Floats, scores_J: Floats) -> Floats:
        """Take the joints (px) that were found in the track's square; returns them smoothed."""
        square = track.place(keypoints_J2, scores_J)
        if self.follow:
            is_still = square and track.square and iou(square, track.square) >= STILL
            track.square, track.given = track.square if is_still else square, None
        if track.smooth is None:
            return keypoints_J2
        if square is None:
            track.smooth.restart()
            return keypoints_J2
        return track.smooth(keypoints_J2, PIXELS_PER_SCALE * square.scale)

    def _begin(self) -> Track:
        smooth = OneEuroFilter(self.smoothing, self.rate) if self.smoothing else None
        self.begun += 1
        return Track(self.begun - 1, smooth)


def square_of_joints(keypoints_K2: Floats) -> Square | None:
    """The square about joints (px), MARGIN x the longer side; None for fewer than two places."""
    if len(np.unique(keypoints_K2, axis=0)) < 2:
        return None
    return square_about([*keypoints_K2.min(axis=0), *(np.ptp(keypoints_K2, axis=0) + 1)], MARGIN)


def match(squares: Sequence[Square], followed: dict[Track, Square]) -> dict[int, Track]:
    """The track of each index of `squares` that continues one: the largest IoU first."""
    pairs = [
        (iou(new, last), i, t) for i, new in enumerate(squares) for t, last in followed.items()
    ]
    owners: dict[int, Track] = {}
    for overlap, i, track in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= SAME_PERSON and i not in owners and track not in owners.values():
            owners[i] = track
    return owners


def iou(a: Square, b: Square) -> float:
    """Intersection over union of two squares."""
    sides = [PIXELS_PER_SCALE * square.scale for square in (a, b)]
    overlap = 1.0
    for p, q in ((a.x, b.x), (a.y, b.y)):
        ends = min(p + sides[0] / 2, q + sides[1] / 2), max(p - sides[0] / 2, q - sides[1] / 2)
        overlap *= max(0.0, ends[0] - ends[1])
    return overlap / (sides[0] ** 2 + sides[1] ** 2 - overlap)
