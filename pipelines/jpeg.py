"""Checks JPEGs for packing: they must be complete, and every decoder must give the same picture.

Other kinds of pictures (PNG, WebP, BMP, TIFF; grey and CMYK JPEGs, which OpenCV, nvJPEG and libjpeg
convert to RGB differently) are decoded by OpenCV and stored as RGB JPEGs of QUALITY. So are JPEGs
with an EXIF orientation of 2 to 8, as they were labelled, turned or as stored, because decoders
disagree on whether to turn them. Besides missing and damaged files, these are refused: lossless,
hierarchical and arithmetic-coded JPEGs, which the GPU decoder does not read. Some damage leaves a
valid JPEG and is not detected.
"""

import hashlib
import io
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from common.errors import InputError

MAX_PIXELS = 64_000_000
"""More than any picture of the data sets has."""
QUALITY = 95
"""JPEG quality of stored crops and of converted pictures."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_SIGNATURES = {b"\x89PNG": "PNG", b"RIFF": "WebP", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
EXIF_KINDS = ("JPEG kept as stored, against its EXIF", "JPEG turned as its EXIF says")
_COMPONENTS = {1: "grey JPEG", 4: "CMYK JPEG"}
_MAX_SCANS = 100
"""Each scan makes the decoder process the whole picture; photographs have about 10."""
_END, _SCAN = 0xD9, 0xDA
_USUAL_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_FRAMES = {0xC0 + kind for kind in range(16)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_WITHOUT_BODY = {0x01, *range(0xD0, 0xD9)}
# In a scan's data 0xFF is followed by 0x00, a restart marker or another 0xFF.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_LIBJPEG_WARNING = re.compile(rb"^(Corrupt|Premature end|Inconsistent|Invalid).*$", re.MULTILINE)


class Picture(NamedTuple):
    """A checked file."""

    path: str
    bytes: int
    mtime_ns: int
    width: int
    """px; 0 for a bad picture, as is `height`."""
    height: int
    sha256: str
    """SHA-256 of the file; empty for a bad picture."""
    converted: str
    """The kind of file that is converted to a JPEG; empty for a JPEG that is stored unchanged."""
    fault: str
    """Empty for a good picture."""


class PictureError(Exception):
    """A picture that cannot be packed; its text is the reason."""


class BadSamplesError(InputError):
    """Samples whose pictures cannot be used. The message names the first."""

    faults: dict[int, str]
    """Sample number -> fault."""

    @classmethod
    def of(cls, faults: dict[int, str], where: object, found: str) -> "BadSamplesError":
        """where, found: of the first sample, for the message."""
        advice = "restore it, pack again with --skip-bad, or train with --data.on_bad_sample skip"
        error = cls(where, found, "a complete picture", advice)
        error.faults = faults
        return error


class _Frame(NamedTuple):
    """A JPEG's frame header."""

    marker: int
    bits: int
    height: int
    width: int
    components: int


def find_picture(folder: Path, name: str) -> Path:
    """The picture of that name or, if there is none, with the same stem and another extension."""
    path = folder / name
    others = [path.with_suffix(e) for ending in ENDINGS for e in (ending, ending.upper())]
    return next((each for each in (path, *others) if each.is_file()), path)


def read_header(path: Path) -> tuple[int, int, int]:
    """Width, height (px, as stored) and EXIF orientation of a picture; 1, 1, 1 if unreadable."""
    try:
        path = find_picture(path.parent, path.name)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            return *picture.size, _exif_orientation(path)
    except (OSError, Image.DecompressionBombError):
        return 1, 1, 1


def check_picture(folder: Path, name: str, turned: int) -> Picture:
    """Read and check one picture, which must lie in the folder. turned: as People.turned."""
    path, sha256, converted, fault = folder / name, "", "", ""
    size = mtime = width = height = 0
    try:
        path = find_picture(folder, name)
        stat = path.stat()
        size, mtime = stat.st_size, stat.st_mtime_ns
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PictureError("a link that leads out of the folder of pictures")
        data = path.read_bytes()
        converted = _kind_by_exif(data, turned) or kind_to_convert(data)
        width, height = check_jpeg(convert(data, converted) if converted else data)
        sha256 = hashlib.sha256(data).hexdigest()
    except PictureError as error:
        fault = str(error)
    except FileNotFoundError:
        fault = "missing"
    except OSError as error:
        fault = f"not readable ({error.strerror})"
    return Picture(str(path), size, mtime, width, height, sha256, converted, fault)


def kind_to_convert(data: bytes) -> str:
    """The kind of a picture that `convert` turns into a JPEG; empty for other content."""
    if data[:2] == b"\xff\xd8":
        frame, _ = _frame_and_scans(data)
        return _COMPONENTS.get(frame.components, "") if frame else ""
    return next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), "")


def _kind_by_exif(data: bytes, turned: int) -> str:
    """How a JPEG with an EXIF orientation is converted; empty without one. Raises PictureError."""
    orientation = _exif_orientation(io.BytesIO(data)) if b"Exif\0\0" in data else 1
    if not 2 <= orientation <= 8:
        return ""
    if turned < 0:
        raise PictureError(f"EXIF orientation {orientation}, and labels for another size")
    return EXIF_KINDS[turned]


def convert(data: bytes, kind: str = "") -> bytes:
    """An RGB JPEG of the picture as decoded by OpenCV; alpha is dropped. Raises PictureError.

    kind: Picture.converted.
    """
    if data[:2] == b"\xff\xd8":
        _check_header(data, components=(3, *_COMPONENTS))
    image = _decoded(data, turned=kind == EXIF_KINDS[1])
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def check_jpeg(data: bytes) -> tuple[int, int]:
    """Width and height, px, of a JPEG that may be packed. Decodes it; raises PictureError."""
    _check_header(data, components=(3,))
    if _kind_by_exif(data, turned=0):
        raise PictureError("an EXIF orientation")
    image = _decoded(data)
    return image.shape[1], image.shape[0]


def _decoded(data: bytes, turned: bool = False) -> npt.NDArray[np.uint8]:
    """(H, W, 3) BGR of an undamaged picture. Raises PictureError. turned: as its EXIF says."""
    try:
        with _stderr_captured() as messages:
            image = decode(data, "", turned)
            messages.seek(0)
            warning = _LIBJPEG_WARNING.search(messages.read())
    except InputError as error:
        raise PictureError(error.found) from error
    if warning:
        raise PictureError(f"damaged ({warning[0].decode(errors='replace')})")
    return image


def decode(
    data: bytes, where: object, turned: bool = False, limit: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) BGR of a picture, as stored or `turned` as its EXIF says. Raises InputError.

    limit: of pixels, before anything is decoded (`require_sane_size`).
    """
    has_header = require_sane_size(data, where, limit)
    flags = cv2.IMREAD_COLOR | (0 if turned else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # more pixels than OpenCV reads, in a format whose header Pillow cannot read
        image = None
    if image is None:
        kind = "a damaged picture, such as a truncated one" if has_header else "no picture"
        found = f"{kind} ({len(data):,} bytes)"
        raise InputError(where, found, "a file that OpenCV reads", "replace it")
    return np.asarray(image, np.uint8)


def _check_header(data: bytes, components: tuple[int, ...]) -> None:
    """Raise PictureError for a JPEG that can be refused without decoding."""
    if data[:3] != b"\xff\xd8\xff":
        raise PictureError("not a JPEG" if data else "empty")
    if all(marker != _END for marker, _ in _markers(data)):
        raise PictureError("truncated (no end marker)")
    frame, scans = _frame_and_scans(data)
    if frame is None or not scans:
        raise PictureError("damaged (no picture in it)")
    if frame.marker not in _USUAL_FRAMES:
        raise PictureError(f"a JPEG of a rare kind (SOF{frame.marker - 0xC0})")
    if frame.bits != 8:
        raise PictureError(f"{frame.bits} bits a channel")
    if frame.components not in components:
        raise PictureError(f"{frame.components} components")


def _exif_orientation(file: Path | IO[bytes]) -> int:
    """The EXIF orientation of a JPEG; 1 (as stored) if none can be read, and of other pictures."""
    exif = Image.Exif()
    with suppress(OSError, SyntaxError, ValueError, struct.error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exif.load(JpegImageFile(file).info.get("exif", b""))
        return int(exif.get(ExifTags.Base.Orientation, 1))
    return 1


def require_sane_size(data: bytes, where: object, limit: int = MAX_PIXELS) -> bool:
    """Raise InputError if the header claims more than `limit` pixels, or a JPEG has too many scans.

    data: a file of any format that Pillow can identify; others pass (OpenCV itself refuses more
    than 2^30 pixels). A JPEG may be cut off after its header. Returns whether a header was found.
    Decodes nothing: 7 us for a JPEG.
    """
    advice = "make the picture smaller, or replace it if it is damaged"
    try:
        width, height, scans = _claims(data)
    except Image.DecompressionBombError as error:
        raise InputError(where, str(error), f"{limit:,} pixels at most", advice) from error
    if width * height > limit:
        found = f"a header that says {width} x {height}"
        raise InputError(where, found, f"{limit:,} pixels at most", advice)
    if scans > _MAX_SCANS:
        expected = "a photograph, which has about 10"
        raise InputError(where, f"over {_MAX_SCANS} scans", expected, "save the picture again")
    return width > 0


def _claims(data: bytes) -> tuple[int, int, int]:
    """Width and height, px, in the header of a picture (0: none found), and a JPEG's scans."""
    if data[:2] == b"\xff\xd8":
        frame, scans = _frame_and_scans(data)
        return (frame.width, frame.height, scans) if frame else (0, 0, scans)
    Image.init()
    # Image.open does the same, but applies its own limit to large pictures.
    for open_with, accepts in Image.OPEN.values():
        with suppress(OSError, SyntaxError, ValueError, IndexError, struct.error):
            if accepts is None or accepts(data[:16]):
                return (*open_with(io.BytesIO(data), "").size, 0)
    return 0, 0, 0


def _frame_and_scans(data: bytes) -> tuple[_Frame | None, int]:
    """The frame header (None: there is none) and the number of scans that libjpeg would decode."""
    frame, scans = None, 0
    for marker, start in _markers(data):
        if marker == _END:
            break
        if marker in _FRAMES and frame is None and start + 8 <= len(data):
            frame = _Frame(marker, *struct.unpack_from(">BHHB", data, start + 2))
        if marker == _SCAN:
            scans += 1
            if frame is None or frame.marker in _PROGRESSIVE:
                continue
            if data[start + 2 : start + 3] == bytes([frame.components]):
                break  # the whole picture is in this scan
    return frame, scans


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker with the offset of its segment's length field, as libjpeg finds them.

    Like libjpeg, skips whatever lies between segments, including a scan's data.
    """
    place = 2
    while found := _NEXT_MARKER.search(data, place):
        marker, place = data[found.start() + 1], found.end()
        if marker in _WITHOUT_BODY:
            continue
        yield marker, place
        place += max(int.from_bytes(data[place : place + 2], "big"), 2)


@contextmanager
def _stderr_captured() -> Iterator[IO[bytes]]:
    """Capture stderr in a file, because libjpeg prints its warnings there only."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
