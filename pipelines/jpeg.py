"""Which JPEGs may be packed: whole ones that every decoder turns into the same picture.

Refused are, beside what is missing or damaged:

- grey (1 component) and CMYK (4 components): the bytes are packed as they are, and OpenCV, nvJPEG
  and libjpeg differ in how they make RGB of them;
- an EXIF orientation of 2 to 8: annotations were made on the stored pixels, and decoders disagree
  on whether to turn them;
- lossless, hierarchical and arithmetic-coded JPEGs, which the decoder of the GPU does not read.

The structure is checked before anything is decoded, because a decoder fills what is missing with
grey and says so on stderr at most. Damage that leaves a valid JPEG, as one bit can, stays unseen.
"""

import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np

from common.errors import InputError

MOST_PIXELS = 64_000_000
"""More than any camera of the data sets; a header that claims more is an attack or an accident."""

_MOST_SCANS = 100
"""Each costs a decoder a pass over the whole picture; photographs have 10 or so."""
_START, _END, _SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
# In a scan's data 0xFF comes before 0x00, a restart marker or another 0xFF; else the scan is over.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_LIBJPEG_WARNING = re.compile(rb"^(Corrupt|Premature end|Inconsistent|Invalid).*$", re.MULTILINE)


class Picture(NamedTuple):
    """A file as found on the disk. A changed file is another Picture."""

    path: str
    bytes: int
    mtime_ns: int
    found: bool = True


class Verdict(NamedTuple):
    """What the check of a picture came to."""

    picture: Picture
    width: int
    """px; 0 for a bad picture."""
    height: int
    fault: str
    """Empty for a good picture."""


class PictureError(Exception):
    """A picture that is not packed. `reason` says why, in a few words."""

    def __init__(self, reason: str):
        """Keep the reason."""
        self.reason = reason
        super().__init__(reason)


class BadSamplesError(InputError):
    """People of a data set whose pictures cannot be used. The message names the first."""

    faults: dict[int, str]
    """What is wrong with each, by the number of the sample."""

    @classmethod
    def of(cls, faults: dict[int, str], where: object, found: str) -> "BadSamplesError":
        """The error of one or more samples. where: the first one."""
        error = cls(
            where,
            found,
            "a whole JPEG",
            "restore the picture; if it lies in a tar, restore the tar, or pack the split again "
            "with tools/make_shards.py, whose --skip-bad leaves out what cannot be mended",
        )
        error.faults = faults
        return error

    def advise_to_skip(self) -> None:
        """Name the way out that training has, and validation, which never skips, has not."""
        self.next_step += "; or train on without it: --data.on_bad_sample skip"


class _Frame(NamedTuple):
    """What a JPEG's header claims."""

    width: int
    height: int
    components: int


def find_picture(folder: Path, name: str) -> Picture:
    """Look a picture up, without reading it."""
    path = folder / name
    try:
        stat = path.stat()
    except OSError:
        return Picture(str(path), 0, 0, found=False)
    return Picture(str(path), stat.st_size, stat.st_mtime_ns)


def inspect_picture(folder: Path, picture: Picture) -> Verdict:
    """Read and check one picture, which must lie in that folder."""
    path = Path(picture.path)
    try:
        if not picture.found or not path.is_file():
            raise PictureError("missing")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PictureError("a link that leads out of the folder of pictures")
        return Verdict(picture, *check_jpeg(path.read_bytes()), "")
    except PictureError as error:
        return Verdict(picture, 0, 0, error.reason)
    except OSError as error:
        return Verdict(picture, 0, 0, f"not readable ({error.strerror})")


def check_jpeg(data: bytes) -> tuple[int, int]:
    """Width and height, px, of a JPEG that may be packed. Decodes it; raises PictureError."""
    frame = _walk(data)
    if frame.components == 1:
        raise PictureError("grey (1 component)")
    if frame.components == 4:
        raise PictureError("CMYK (4 components)")
    if frame.components != 3:
        raise PictureError(f"{frame.components} components")
    with _stderr_captured() as messages:
        image = _decode(data)
        messages.seek(0)
        warning = _LIBJPEG_WARNING.search(messages.read())
    if warning:
        raise PictureError(f"damaged ({warning[0].decode(errors='replace')})")
    if image is None:
        raise PictureError("damaged (cannot be decoded)")
    if image.shape[:2] != (frame.height, frame.width):
        decoded = f"{image.shape[1]} x {image.shape[0]}"
        raise PictureError(f"decoded to {decoded}, header says {frame.width} x {frame.height}")
    return frame.width, frame.height


def require_sane_size(data: bytes, where: object, most: int = MOST_PIXELS) -> None:
    """Raise InputError if a JPEG or PNG claims more pixels than that, or a JPEG has too many scans.

    data: for the size its first bytes may do. Decodes nothing. OpenCV itself refuses more than 2^30
    pixels of any kind.
    """
    width, height = claimed_size(data) or (0, 0)
    if width * height > most:
        raise InputError(
            where,
            f"a header that says {width} x {height}",
            f"{most:,} pixels at most",
            "make the picture smaller, or replace it if it is damaged",
        )
    if _count_scans(data) > _MOST_SCANS:
        raise InputError(where, f"over {_MOST_SCANS} scans", "a photograph, which has 10 or so",
                         "save the picture again, or replace it")  # fmt: skip


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height, px, that a JPEG's or PNG's header gives; None if none is found."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    for marker, place in _markers(data):
        if marker in _FRAMES | _OTHER_FRAMES and place + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, place + 3)
            return width, height
        if marker in (_SCAN, _END):
            return None
    return None


def _count_scans(data: bytes) -> int:
    """Scans that libjpeg decodes; it goes through those of the kinds that need several."""
    scans, components, progressive = 0, b"", False
    for marker, place in _markers(data):
        if marker == _END:
            break
        if marker in _FRAMES | _OTHER_FRAMES:
            components, progressive = data[place + 7 : place + 8], marker in _PROGRESSIVE
        scans += marker == _SCAN
        if marker == _SCAN and not progressive and data[place + 2 : place + 3] == components:
            break  # all of the picture is in this one
    return scans


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of its body's length, as libjpeg finds them.

    It passes over whatever lies between segments, a scan's data among it.
    """
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while found := _NEXT_MARKER.search(data, place):
        marker, place = data[found.start() + 1], found.end()
        if marker in _STANDALONE:
            continue
        yield marker, place
        place += max(int.from_bytes(data[place : place + 2], "big"), 2)


def _walk(data: bytes) -> _Frame:
    """Follow the markers from the first to the end of the picture; trailing bytes are let be."""
    if not data:
        raise PictureError("empty")
    if data[:3] != b"\xff\xd8\xff":
        raise PictureError("not a JPEG")
    frame, scans = None, 0
    for marker, body, start in _segments(data):
        if marker in _OTHER_FRAMES:
            raise PictureError(f"a JPEG of a rare kind (SOF{marker - 0xC0})")
        if marker in _FRAMES and frame is None:
            frame = _frame(body)
        elif marker in _FRAMES:
            raise PictureError("damaged (two frame headers)")
        elif marker == _APP1 and 2 <= _orientation(body) <= 8:
            raise PictureError(f"EXIF orientation {_orientation(body)}")
        elif marker == _SCAN and frame is None:
            raise PictureError(f"damaged (a scan before the frame header, at byte {start})")
        scans += marker == _SCAN
        if scans > _MOST_SCANS:
            raise PictureError(f"over {_MOST_SCANS} scans")
    if frame is None or not scans:
        raise PictureError("damaged (no picture in it)")
    return frame


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(marker, body, offset) of each segment up to the end marker. A thumbnail's lie in a body."""
    place = 2
    while True:
        if data[place : place + 1] not in (b"\xff", b""):
            raise PictureError(f"damaged (no marker at byte {place})")
        while data[place + 1 : place + 2] == b"\xff":
            place += 1
        if place + 2 > len(data):
            raise PictureError("truncated (no end marker)")
        marker, start = data[place + 1], place
        if marker == _END:
            return
        if marker == _START or marker == 0:
            raise PictureError(f"damaged (marker {marker:#04x} at byte {start})")
        place += 2
        if marker in _STANDALONE:
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        if place + max(length, 2) > len(data):
            raise PictureError("truncated (no end marker)")
        if length < 2:
            raise PictureError(f"damaged (a segment of {length} bytes at byte {start})")
        yield marker, data[place + 2 : place + length], start
        place += length
        if marker == _SCAN:
            after = _NEXT_MARKER.search(data, place)
            if not after:
                raise PictureError("truncated (no end marker)")
            place = after.start()


def _frame(body: bytes) -> _Frame:
    if len(body) < 6:
        raise PictureError("damaged (a short frame header)")
    precision, height, width, components = struct.unpack(">BHHB", body[:6])
    if precision != 8:
        raise PictureError(f"{precision} bits a channel")
    if not width or not height:
        raise PictureError(f"header says {width} x {height}")
    if width * height > MOST_PIXELS:
        raise PictureError(f"header says {width} x {height}, over {MOST_PIXELS:,} pixels")
    return _Frame(width, height, components)


def _orientation(body: bytes) -> int:
    """The orientation that an APP1 segment gives, 1 (as stored) where it gives none."""
    if not body.startswith(_EXIF):
        return 1
    tiff = body[len(_EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(
                order + "HHIH", tiff, directory + 2 + 12 * entry
            )
            if tag == _ORIENTATION_TAG and kind == _SHORT:
                return value
    except struct.error:  # cut short: no decoder finds an orientation beyond the end
        pass
    return 1


def _decode(data: bytes) -> np.ndarray | None:
    """(H, W, 3), or None where OpenCV cannot."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


@contextmanager
def _stderr_captured() -> Iterator[IO[bytes]]:
    """What stderr gets meanwhile, as a file: libjpeg gives its warnings nowhere else."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
