"""Reads and writes videos, frame by frame."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError

CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
"""Codec of a written video, by its extension."""
DEFAULT_FRAMES_PER_SECOND = 25.0


def open_video(source: Path | int) -> cv2.VideoCapture:
    """A video file or the camera of that number. Raises InputError."""
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        where = f"--webcam {source}" if isinstance(source, int) else source
        raise InputError(where, "cannot be opened", "a video or camera for OpenCV", "check it")
    return capture


def read_frames(capture: cv2.VideoCapture, name: str) -> Iterator[npt.NDArray[np.uint8]]:
    """The frames (H, W, 3) BGR, turned upright. Raises InputError if there is none."""
    has_frame, image = capture.read()
    if not has_frame:
        raise InputError(name, "no frame can be read", "a video", "try another")
    while has_frame:
        yield np.asarray(image, dtype=np.uint8)
        has_frame, image = capture.read()


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second of a video; the default if it does not say."""
    return capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FRAMES_PER_SECOND


@contextmanager
def write_video(path: Path, capture: cv2.VideoCapture) -> Iterator[cv2.VideoWriter]:
    """Write a video with the size and frame rate of `capture`. Raises InputError.

    It has a temporary name until the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
    width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    writer = cv2.VideoWriter(str(temporary), codec, frame_rate(capture), (width, height))
    if not writer.isOpened():
        raise InputError(path, "OpenCV cannot write it", "a path for a video", "try an .avi")
    try:
        yield writer
    finally:
        writer.release()
        temporary.rename(path)
