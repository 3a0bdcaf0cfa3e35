"""Follows people through a video: where to look in the next frame, and smoother joints.

Decision 027 says why these rules; docs/predict.md has their numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np

from configs.skeleton import PIXELS_PER_SCALE
from evaluation.pckh import Floats
from pipelines.boxes import MARGIN, Square, square_about

MIN_JOINT_SCORE = 0.2
"""A joint with a lower score does not count: for the next square, and in a person's score."""
SAME_PERSON = 0.3
"""Least IoU of a detection and the track that it continues."""
STILL = 0.9
"""Up to this IoU with the new square a track's square stays, because joints jitter as it moves."""
SMALLEST_PX = 16.0
"""Smallest side of a square; joints in a smaller one have fallen onto one point."""
DUPLICATE = 0.7
"""Two tracks whose squares have this IoU follow the same person."""


class OneEuroFilter:
    """Smooths one person's joints (Casiez, Roussel, Vogel: 1 Euro Filter, CHI 2012).

    A low-pass filter whose cutoff frequency grows with the joint's speed. The paper filters single
    numbers; here x and y of a joint share the cutoff, and speeds are in sides of the person's
    square per second, so that neither the axes nor the picture's size matter.
    """

    SPEED_CUTOFF_HZ = 1.0
    """The paper's dcutoff."""

    def __init__(self, min_cutoff_hz: float, beta_hz: float, frames_per_second: float):
        """min_cutoff_hz: for a joint at rest. beta_hz: added at one side per second."""
        self.min_cutoff_hz, self.beta_hz, self.rate = min_cutoff_hz, beta_hz, frames_per_second
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
        cutoff_J1 = self.min_cutoff_hz + self.beta_hz * speed_J1
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
        """Where the person is looked for; None: the person is lost."""
        self.joints_J2: Floats = np.full((1, 2), np.nan)
        """Where the joints are, px; NaN if a joint has not been found yet."""

    def next_square(self, keypoints_J2: Floats, scores_J: Floats) -> Square | None:
        """The square about the joints found now (px).

        None if fewer than half were, or if they are at one place. A joint that was not found moves
        as the others do on average.
        """
        is_found_J = scores_J >= MIN_JOINT_SCORE
        if is_found_J.mean() < 0.5:
            return None
        moves_J2 = keypoints_J2 - self.joints_J2
        moves_K2 = moves_J2[is_found_J & ~np.isnan(moves_J2[:, 0])]
        mean_2 = moves_K2.mean(axis=0) if len(moves_K2) else 0.0
        self.joints_J2 = np.where(is_found_J[:, None], keypoints_J2, self.joints_J2 + mean_2)
        square = square_of_joints(self.joints_J2[~np.isnan(self.joints_J2[:, 0])])
        return square if square and PIXELS_PER_SCALE * square.scale >= SMALLEST_PX else None


class Tracker:
    """The tracks of a video; one that is lost ends, and a new one gets the lowest free identity."""

    def __init__(self, follow: bool, new_filter: Callable[[], OneEuroFilter | None]):
        """follow: look about the last joints; otherwise only where people are given."""
        self.follow, self.new_filter = follow, new_filter
        self.tracks: list[Track] = []

    def look(self, given: Sequence[Square]) -> list[Track]:
        """The people to find in the next frame: all who are given, and those who are followed.

        A given square continues the track that it overlaps most, or begins one.
        """
        last = {track: track.square for track in self.tracks if track.square}
        owners = match(given, last)
        tracks, taken = [*owners.values()], [*given]
        for track, square in last.items() if self.follow else ():
            overlaps = (iou(square, other) for other in taken)
            if track not in tracks and max(overlaps, default=0.0) < DUPLICATE:
                tracks.append(track)
                taken.append(square)
        for i, square in enumerate(given):
            if i not in owners:
                used = {track.identity for track in tracks}
                free = min(set(range(len(used) + 1)) - used)
                owners[i] = Track(free, self.new_filter())
                tracks.append(owners[i])
            owners[i].square = square
        self.tracks = sorted(tracks, key=lambda track: track.identity)
        return self.tracks

    def identities(self) -> set[int]:
        """The people who are followed into the next frame."""
        return {track.identity for track in self.tracks if self.follow and track.square}

    def update(self, track: Track, keypoints_J2: Floats, scores_J: Floats) -> Floats:
        """Take the joints (px) that were found in the track's square; returns them smoothed."""
        square = track.next_square(keypoints_J2, scores_J)
        if self.follow and not (square and track.square and iou(square, track.square) >= STILL):
            track.square = square
        if square is None:
            track.smooth = self.new_filter()
        elif track.smooth:
            return track.smooth(keypoints_J2, PIXELS_PER_SCALE * square.scale)
        return keypoints_J2


def square_of_joints(keypoints_K2: Floats) -> Square | None:
    """The square about joints (px), MARGIN x the longer side; None for fewer than two places."""
    if len(np.unique(keypoints_K2, axis=0)) < 2:
        return None
    return square_about([*keypoints_K2.min(axis=0), *(np.ptp(keypoints_K2, axis=0) + 1)], MARGIN)


def match(given: Sequence[Square], last: dict[Track, Square]) -> dict[int, Track]:
    """The track of each index of `given` that continues one: the largest IoU first."""
    pairs = [(iou(a, b), i, track) for i, a in enumerate(given) for track, b in last.items()]
    owners: dict[int, Track] = {}
    for overlap, i, track in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= SAME_PERSON and i not in owners and track not in owners.values():
            owners[i] = track
    return owners


def iou(a: Square, b: Square) -> float:
    """Intersection over union of two squares."""
    half_a, half_b = (PIXELS_PER_SCALE * square.scale / 2 for square in (a, b))
    overlap = 1.0
    for p, q in ((a.x, b.x), (a.y, b.y)):
        overlap *= max(0.0, min(p + half_a, q + half_b) - max(p - half_a, q - half_b))
    return overlap / (4 * half_a**2 + 4 * half_b**2 - overlap)
