"""Signs that a run is not learning, in plain words and with what to do.

The thresholds separate good runs from runs with a rate that is too high, with shuffled pictures, or
on a plateau of zeros (docs/experiments.md).
"""

import numpy as np

from evaluation import pckh
from pipelines.annotations import People

FROM_STEP = 1_000
"""Validations before this step, or before half of a shorter run, are not judged."""
_ZEROS_PEAK = 0.05
"""Mean peak of the heatmaps below which the network predicts only zeros."""
_LEAST_GROWTH = 1.1


class LearningCheck:
    """Compares a run with the mean pose as the answer for everybody, and with its own past."""

    def __init__(self, people: People, steps: int):
        """people: of the validation. steps: of the whole run."""
        errors_NJ = pckh.normalized_errors(pckh.mean_pose(people), people)
        counts = max(1, np.isfinite(errors_NJ).sum())
        self.mean_pose_pck = float((errors_NJ < 0.5).sum() / counts)
        """PCK@0.5 of the mean pose, which needs no picture."""
        self._box_warning = people.box_warning
        self._from_step = min(FROM_STEP, steps // 2)
        self._last_pck = 0.0

    def check_labels(self) -> list[str]:
        """A warning before the first step, if there is one."""
        return [f"WARNING: in valid {self._box_warning}"] if self._box_warning else []

    def check_validation(self, step: int, pck: float, peak: float) -> str:
        """A warning after a validation, or "". pck: pooled, at 0.5. peak: mean of the heatmaps'."""
        last, self._last_pck = self._last_pck, pck
        if step < self._from_step:
            return ""
        if not peak >= _ZEROS_PEAK:
            advice = "if this stays, lower optim.lr or set model.head_scale 0.1"
            return f"WARNING: the network predicts almost only zeros; {advice}"
        few = self.mean_pose_pck + min(self.mean_pose_pck, (1 - self.mean_pose_pck) / 4)
        text = (
            f"WARNING: the network hardly uses the pictures: it finds {100 * pck:.1f} % of the "
            f"joints, the mean pose {100 * self.mean_pose_pck:.1f} % without a picture; check that "
            "labels and pictures belong together (tools/show_batch.py), or divide optim.lr by ten"
        )
        return text if pck < few and pck <= _LEAST_GROWTH * last else ""
