"""Frames of a video or a webcam, a video that is written, and a window: parts of predict.py."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import InputError

CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
"""Kinds of video that are written, with their codecs."""
_FRAMES_PER_SECOND = 25.0
"""Where a source does not say."""

Image = npt.NDArray[np.uint8]


class Frames:
    """Frames (H, W, 3) BGR of a video file (a path) or a webcam (its number), turned upright."""

    def __init__(self, source: Path | int):
        """Open it. Raises InputError."""
        if isinstance(source, Path) and not source.is_file():
            raise InputError(source, "no such file", "a video", "give its path")
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else self.name)
        if not self._capture.isOpened():
            raise InputError(
                self.name, "cannot be opened", "a video or camera that OpenCV reads", "try another"
            )
        self.per_second = self._capture.get(cv2.CAP_PROP_FPS) or _FRAMES_PER_SECOND
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if isinstance(source, Path) and count > 0 else None
        """How many the file says it has; None where it does not."""

    def __iter__(self) -> Iterator[Image]:
        read = 0
        while True:
            whole, frame = self._capture.read()
            if not whole:
                break
            read += 1
            yield frame  # type: ignore[misc]
        if not read:
            raise InputError(self.name, "no frame can be read", "a video", "try another")
        if self.count and read < self.count:
            print(f"{self.name}: {read} of {self.count} frames can be read", file=sys.stderr)

    def close(self) -> None:
        """Give file or camera back."""
        self._capture.release()


class VideoFile:
    """A video that is whole after `close`, however many frames it got; without any there is none.

    It is written beside and renamed. The first frame decides the size.
    """

    def __init__(self, path: Path, per_second: float):
        """path: its ending decides the kind (CODECS)."""
        self.path, self.per_second = path, per_second
        self._temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: Image) -> None:
        """Add a frame. Raises InputError if the file cannot be written."""
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*CODECS[self.path.suffix.lower()])
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._temporary), codec, self.per_second, size)
            if not self._writer.isOpened():
                raise InputError(
                    self.path, "OpenCV cannot write it", "a place for a video", "try an .avi"
                )
        self._writer.write(frame)

    def close(self) -> None:
        """End the file and give it its name."""
        if self._writer is not None:
            self._writer.release()
            self._temporary.rename(self.path)


def check_window() -> None:
    """Raise InputError if no window can be opened."""
    built = "GUI:                           NONE" not in cv2.getBuildInformation()
    seen = sys.platform != "linux" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    if not (built and seen):
        raise InputError(
            "--webcam",
            "no display" if built else "an OpenCV without windows (opencv-python-headless)",
            "a window to show the frames in, or --overlay",
            "give --overlay OUT.avi" + ("" if built else ", or pip install opencv-python"),
        )


def show(frame: Image) -> bool:
    """Show a frame in the window. Returns False when the user pressed q."""
    cv2.imshow("joints (q leaves)", frame)
    return cv2.waitKey(1) & 0xFF != ord("q")
