"""What the height of a heatmap's peak means: a table that `evaluate.py --calibrate` measures."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Calibration(NamedTuple):
    """Monotone maps of each joint's peak, linear between K knots and constant outside of them.

    Below the lowest knot the probability falls to 0 at a peak of 0. The maps hold for
    the settings of the evaluation that measured them (flip test, crops).
    """

    peaks_JK: Floats
    """The knots, rising: heights of peaks."""
    probabilities_JK: Floats
    """That the joint is less than half the length of `normalize` from its annotation; rising."""
    errors_JK: Floats
    """Expected distance from the annotation, in sides of the person's box; falling."""

    def probabilities(self, scores_NJ: Floats) -> Floats:
        """(N, J) probabilities of these heights of peaks."""
        knots_JK, values_JK = (
            np.insert(np.maximum(table_JK, 0.0), 0, 0.0, axis=1)
            for table_JK in (self.peaks_JK, self.probabilities_JK)
        )
        return _interpolate(scores_NJ, knots_JK, values_JK)

    def errors(self, scores_NJ: Floats) -> Floats:
        """(N, J) expected distances of these heights of peaks, in sides of the box."""
        return _interpolate(scores_NJ, self.peaks_JK, self.errors_JK)


def _interpolate(x_NJ: Floats, knots_JK: Floats, values_JK: Floats) -> Floats:
    each = zip(x_NJ.T, knots_JK, values_JK, strict=True)
    return np.stack([np.interp(x, knots, values) for x, knots, values in each], axis=1)
