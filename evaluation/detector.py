"""Boxes of people or animals by an ONNX detector (its layout: docs/predict.md)."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from evaluation.estimator import PoseEstimator
from evaluation.tracking import Track
from model.export import open_session
from pipelines.boxes import Person, Square, square_about

LAYOUT = "one input (1, 3, H, W) and one output (1, N, 6): x1, y1, x2, y2, score, class"
PADDING_GREY = 114
"""Grey level beside the picture, as in Ultralytics' letterbox."""


class Detector:
    """The boxes of one class in a picture."""

    def __init__(self, path: Path, margin: float, class_number: int = 0):
        """margin: side of the square / longer side of the box. Raises InputError."""
        self.path, self.margin, self.class_number = path, margin, class_number
        self.session = open_session(path)
        (self.input, *others), outputs = self.session.get_inputs(), self.session.get_outputs()
        sizes = [n for n in self.input.shape if isinstance(n, int)]
        if others or len(outputs) != 1 or sizes[:2] != [1, 3] or len(sizes) != 4:
            raise self._unusable(f"{1 + len(others)} inputs, the first {self.input.shape}")
        _, _, self.height, self.width = sizes

    def __call__(self, image_HW3: npt.NDArray[np.uint8]) -> list[Person]:
        """The people, the surest first. image: BGR. Raises InputError for another output."""
        height, width = image_HW3.shape[:2]
        factor = min(self.height / height, self.width / width)
        size_wh = round(factor * width), round(factor * height)
        left, top = (self.width - size_wh[0]) // 2, (self.height - size_wh[1]) // 2
        canvas = np.full((self.height, self.width, 3), PADDING_GREY, np.uint8)
        inside = canvas[top : top + size_wh[1], left : left + size_wh[0]]
        inside[:] = cv2.resize(image_HW3, size_wh, interpolation=cv2.INTER_AREA)
        images_N3HW = canvas[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
        (rows,) = self.session.run(None, {self.input.name: images_N3HW})
        if rows.ndim != 3 or rows.shape[::2] != (1, 6):
            raise self._unusable(f"an output of shape {rows.shape}")
        rows_N6 = rows[0][rows[0][:, 5] == self.class_number].astype(np.float64)
        corners_N22 = (rows_N6[:, :4].reshape(-1, 2, 2) - [left, top]) / factor
        corners_N22 = corners_N22.clip(0, [width, height])
        return [
            Person("", square_about([*low, *(high - low)], self.margin), score=score)
            for (low, high), score in zip(corners_N22, rows_N6[:, 4].tolist(), strict=True)
            if (high > low).all()
        ]

    def _unusable(self, found: str) -> InputError:
        return InputError(self.path, found, LAYOUT, "export the detector in this layout")


def square_by_joints(estimator: PoseEstimator, image_HW3: npt.NDArray[np.uint8]) -> Square | None:
    """The square about the one person or animal in a picture, by a network for whole pictures.

    image: BGR. None if fewer than half of the joints are fair.
    """
    found = estimator(image_HW3)
    return Track(0, None).place(found.keypoints_NJ2[0], found.scores_NJ[0])
