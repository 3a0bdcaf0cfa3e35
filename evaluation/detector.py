"""Finds people or animals in pictures with an ONNX detector (docs/predict.md has its layout)."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError
from model.export import open_session
from pipelines.boxes import Square, square_about

LAYOUT = "one input (1, 3, H, W) and one output (1, N, 6): x1, y1, x2, y2, score, class"
PADDING_GREY = 114
"""Grey level beside the picture, as in Ultralytics' letterbox."""


class Detector:
    """Gives the boxes of class 0 as squares."""

    def __init__(self, path: Path, margin: float, min_score: float):
        """margin: side of the square / longer side of the box. Raises InputError."""
        self.path, self.margin, self.min_score = path, margin, min_score
        self.session = open_session(path)
        (self.input, *others) = self.session.get_inputs()
        sizes = [n for n in self.input.shape if isinstance(n, int)]
        if others or len(self.session.get_outputs()) != 1 or len(sizes) != 4:
            raise self._unusable(f"{1 + len(others)} inputs, the first {self.input.shape}")
        self.height, self.width = sizes[2:]

    def __call__(self, image_HW3: npt.NDArray[np.uint8]) -> list[Square]:
        """image: BGR. Raises InputError for an output of another layout."""
        height, width = image_HW3.shape[:2]
        factor = min(self.height / height, self.width / width)
        w, h = round(factor * width), round(factor * height)
        left, top = (self.width - w) // 2, (self.height - h) // 2
        canvas = np.full((self.height, self.width, 3), PADDING_GREY, np.uint8)
        small = cv2.resize(image_HW3, (w, h), interpolation=cv2.INTER_AREA)
        canvas[top : top + h, left : left + w] = small
        images_N3HW = canvas[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
        (rows,) = self.session.run(None, {self.input.name: images_N3HW})
        if rows.ndim != 3 or rows.shape[::2] != (1, 6):
            raise self._unusable(f"an output of shape {rows.shape}")
        is_used_N = (rows[0, :, 4] >= self.min_score) & (rows[0, :, 5] == 0)
        corners_N22 = (rows[0, is_used_N, :4].reshape(-1, 2, 2) - [left, top]) / factor
        boxes = [(*a, *(b - a)) for a, b in corners_N22.clip(0, [width, height]) if (b > a).all()]
        return [square_about(box, self.margin) for box in boxes]

    def _unusable(self, found: str) -> InputError:
        return InputError(self.path, found, LAYOUT, "export the detector in this layout")
