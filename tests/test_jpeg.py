"""Which JPEGs pass the check before packing, and why others are refused."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import noise_picture
from helpers import exif, with_segment
from PIL import Image, ImageOps

from pipelines.jpeg import PictureError, check_jpeg, check_picture, convert, kind_to_convert


def jpeg(*options: int, size: tuple[int, int] = (160, 120), seed: int = 5) -> bytes:
    image = noise_picture(np.random.default_rng(seed), *size)
    return cv2.imencode(".jpg", image, list(options))[1].tobytes()


@pytest.mark.parametrize("ending", [".png", ".webp", ".bmp", ".tiff"])
def test_other_kinds_become_rgb_jpegs_of_the_same_size_and_damaged_ones_are_refused(ending) -> None:
    picture = noise_picture(np.random.default_rng(1), 60, 40)
    data = cv2.imencode(ending, picture)[1].tobytes()
    assert kind_to_convert(data) == {".webp": "WebP"}.get(ending, ending[1:5].upper())
    assert check_jpeg(convert(data)) == (60, 40)
    with pytest.raises(PictureError):
        convert(data[:30])


# From black to a colour: red up to the largest value of its type, green to half, blue to a fifth.
RAMP_HW3 = np.linspace(0, 1, 64)[None, :, None].repeat(32, axis=0) * [1.0, 0.5, 0.2]
RAMP = np.round(255 * RAMP_HW3).astype(np.uint8)
GREY = RAMP[..., 0]
BLACK_WHITE = np.where(GREY > 127, np.uint8(255), np.uint8(0))


def saved(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def png16(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", np.round(65535 * image).astype(np.uint16))[1].tobytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png16(RAMP_HW3[..., ::-1]), RAMP),  # scaled to 8 bits, not cut off at 255
        (png16(RAMP_HW3[..., 0]), GREY),
        (saved(Image.fromarray(GREY)), GREY),
        (saved(Image.fromarray(np.dstack([RAMP, GREY[:, ::-1]]))), RAMP),  # alpha is left out
        (saved(Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA")), GREY),
        (saved(Image.fromarray(RAMP).quantize(64)), RAMP),
        (saved(Image.fromarray(RAMP).quantize(64), transparency=3), RAMP),
        (saved(Image.fromarray(BLACK_WHITE).convert("1")), BLACK_WHITE),
    ],
    ids=["16 bits", "grey, 16 bits", "grey", "alpha", "grey and alpha", "palette",
         "palette with transparency", "1 bit"],
)  # fmt: skip
def test_pngs_of_every_kind_keep_their_colours(data: bytes, expected: np.ndarray) -> None:
    stored = cv2.imdecode(np.frombuffer(convert(data), np.uint8), cv2.IMREAD_COLOR_RGB)
    channels = expected if expected.ndim == 3 else expected[..., None].repeat(3, axis=2)
    difference = np.abs(stored.astype(int) - channels)
    assert difference.mean() < 2 and np.percentile(difference, 99) <= 12  # a JPEG of quality 95


def test_cmyk_becomes_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (60, 40), (255, 0, 0, 0)).save(buffer, "JPEG")
    assert kind_to_convert(buffer.getvalue()) == "CMYK JPEG"
    stored = cv2.imdecode(np.frombuffer(convert(buffer.getvalue()), np.uint8), cv2.IMREAD_COLOR)
    assert stored.mean(axis=(0, 1))[2] < 60 < 200 < stored.mean(axis=(0, 1))[0]  # cyan: no red


def jpeg_of(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


KINDS = [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 3)]


def frame_at(data: bytes) -> int:
    """Where the body of the frame header begins: precision, height, width, components."""
    return data.index(b"\xff\xc0") + 4


def reason_of(data: bytes) -> str:
    with pytest.raises(PictureError) as caught:
        check_jpeg(data)
    return str(caught.value)


@pytest.mark.parametrize("options", KINDS)
def test_whole_jpegs_of_every_usual_kind_pass(options: tuple[int, ...]) -> None:
    assert check_jpeg(jpeg(*options)) == (160, 120)


@pytest.mark.parametrize("tail", [b"\0", bytes(700), b"\xff\xff", jpeg()])
def test_bytes_after_the_end_marker_are_ignored(tail: bytes) -> None:
    assert check_jpeg(jpeg() + tail) == (160, 120)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("tail", [b"", bytes(64)])
def test_jpeg_cut_anywhere_is_refused(options: tuple[int, ...], tail: bytes) -> None:
    data = jpeg(*options)
    cuts = [*range(3, 700, 23), *range(700, len(data) - 2, 211), len(data) - 2, len(data) - 1]
    assert len(cuts) > 40
    for cut in cuts:
        reason = reason_of(data[:cut] + tail)
        assert reason.startswith("truncated") or tail


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_cut_jpeg_is_not_saved_by_the_end_of_its_thumbnail(part: float) -> None:
    whole = with_segment(jpeg(), exif(1, more=jpeg(size=(40, 30))))
    assert check_jpeg(whole) == (160, 120)
    start = len(whole) - len(jpeg())
    cut = whole[: start + int(part * len(jpeg()))]
    assert b"\xff\xd9" in cut
    assert reason_of(cut).startswith("truncated")


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_overwritten_middle_is_refused(options: tuple[int, ...], part: float) -> None:
    data = bytearray(jpeg(*options))
    place = int(len(data) * part)
    data[place : place + 400] = bytes(400)
    assert reason_of(bytes(data)).startswith("damaged")


def test_scan_that_ends_early_is_refused_silently(capfd: pytest.CaptureFixture[str]) -> None:
    data = jpeg()
    assert "premature end" in reason_of(data[: len(data) // 2] + b"\xff\xd9")
    assert capfd.readouterr().err == ""  # libjpeg's own warning


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_stored_picture_may_not_have_an_exif_orientation(order: str) -> None:
    for orientation in (2, 3, 6, 8):
        data = with_segment(jpeg(), exif(orientation, order))
        assert reason_of(data) == "an EXIF orientation"
    # OpenCV reads the same tag, and rotates the picture when it may.
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (160, 120)
    for orientation in (0, 1, 9):
        assert check_jpeg(with_segment(jpeg(), exif(orientation, order))) == (160, 120)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_converted_as_pillow_and_opencv_turn_it(
    tmp_path: Path, orientation: int
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(with_segment(jpeg(), exif(orientation)))
    stored = cv2.imdecode(np.frombuffer(jpeg(), np.uint8), cv2.IMREAD_COLOR)
    with Image.open(path) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))[..., ::-1]
    assert np.abs(cv2.imread(str(path)).astype(int) - upright).mean() < 1
    for turned, expected in ((1, upright), (0, stored)):
        picture = check_picture(tmp_path, "a.jpg", turned)
        data = path.read_bytes()
        data = convert(data, picture.converted) if picture.converted else data
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert found.shape == expected.shape == (picture.height, picture.width, 3)
        assert np.abs(found.astype(int) - expected).mean() < 4  # another turn gives about 80
        assert check_jpeg(data) == (picture.width, picture.height)
    assert ("another size" in check_picture(tmp_path, "a.jpg", -1).fault) == (orientation > 1)


@pytest.mark.parametrize("body", [b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_passes(body: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    assert check_jpeg(with_segment(jpeg(), segment)) == (160, 120)


def test_huge_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(jpeg())
    place = frame_at(bytes(data))
    data[place + 1 : place + 5] = struct.pack(">HH", 65_000, 64_000)
    monkeypatch.setattr(cv2, "imdecode", None)
    assert reason_of(bytes(data)) == "a header that says 64000 x 65000"


def test_rare_kinds_of_jpeg_are_refused() -> None:
    data = jpeg()
    arithmetic = data.replace(b"\xff\xc0", b"\xff\xc9", 1)
    assert reason_of(arithmetic) == "a JPEG of a rare kind (SOF9)"
    deep = bytearray(data)
    deep[frame_at(data)] = 12
    assert reason_of(bytes(deep)) == "12 bits a channel"


@pytest.mark.parametrize(("mode", "reason"), [("L", "1 components"), ("CMYK", "4 components")])
def test_pictures_of_other_colours_are_refused(mode: str, reason: str) -> None:
    stream = io.BytesIO()
    Image.new(mode, (40, 30)).save(stream, "JPEG")
    assert reason_of(stream.getvalue()) == reason


def test_real_photographs_pass(shared: Path) -> None:
    paths = sorted((shared / "data/lspet/images").iterdir())[:100]
    paths += sorted((shared / "data/mpii_sample/images").iterdir())
    assert len(paths) == 105
    for path in paths:
        check_jpeg(path.read_bytes())
