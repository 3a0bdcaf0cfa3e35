"""Raw pictures: their bytes, their colours, their crops, and shards of them."""

import io
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import noise_picture, pack_arguments
from helpers import crop_sample, make_spec, place_of
from PIL import Image

from common.errors import InputError
from evaluation.visualize import person_tile
from pipelines import geometry, i420
from pipelines.augment import PRESETS, draw, draw_rng
from pipelines.jpeg import BadSamplesError, decode
from pipelines.loader import TrainLoader
from pipelines.shards import ShardSet
from tools import check_shards
from tools.make_shards import main


@pytest.fixture(scope="module")
def raw_shards(tiny_set, tmp_path_factory):
    """The tiny set as raw crops of at most 64 px a person; sizes are even and odd."""
    output = tmp_path_factory.mktemp("raw") / "tiny"
    assert main(pack_arguments(tiny_set, output, "--packing", "raw", "--person-px", 64)) == 0
    return output


@pytest.fixture(scope="module")
def crop_shards(tiny_set, tmp_path_factory):
    """The same crops as JPEGs."""
    output = tmp_path_factory.mktemp("crops") / "tiny"
    assert main(pack_arguments(tiny_set, output, "--packing", "crop", "--person-px", 64)) == 0
    return output


def test_bytes_of_an_odd_size_are_y_then_cb_then_cr_with_the_edge_taken_twice():
    """Grey 10 everywhere but a pure blue pixel at the lower right: JFIF's Y 29, Cb 255, Cr 107."""
    image = np.full((3, 3, 3), 10, np.uint8)
    image[2, 2] = (255, 0, 0)
    y, cb, cr = [10] * 8 + [29], [128, 128, 128, 255], [128, 128, 128, 107]
    assert list(i420.from_bgr(image)) == [*y, *cb, *cr]
    assert i420.byte_count(3, 3) == 17


def test_colors_equal_pillows_jpeg_conversion():
    bgr = np.random.default_rng(0).integers(0, 256, (64, 1, 3), np.uint8).repeat(2, 1).repeat(2, 0)
    planes = i420.planes_of(i420.from_bgr(bgr), 2, 128)
    ycc = np.array(Image.fromarray(bgr[..., ::-1]).convert("YCbCr"))
    for plane, expected in zip(
        planes, (ycc[..., 0], ycc[::2, :1, 1], ycc[::2, :1, 2]), strict=True
    ):
        np.testing.assert_allclose(plane.astype(int), expected, atol=1)


def test_a_jpegs_picture_survives_a_round_trip():
    """Y within a grey level of Pillow's decoder of the same file."""
    picture = noise_picture(np.random.default_rng(1), 75, 53)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    image = Image.open(io.BytesIO(jpeg))
    image.draft("YCbCr", image.size)
    y_HW = np.asarray(image)[..., 0].astype(int)
    planes = i420.planes_of(i420.from_bgr(decode(jpeg, "made")), 75, 53)
    assert np.abs(planes.y_HW - y_HW).mean() < 0.5
    rgb = np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)
    assert np.abs(i420.warp_to_rgb(planes, np.eye(3), 52) - rgb[:52, :52]).mean() < 2


# Crops


def colour_edges() -> np.ndarray:
    """(90, 141, 3) BGR: a soft noise with oblique edges of saturated colours; an odd width."""
    picture = noise_picture(np.random.default_rng(3), 141, 90)
    y, x = np.mgrid[:90, :141]
    stripe = ((x + y // 2) // 18 % 3)[..., None]
    return np.where(
        stripe == 0, (60, 60, 190), np.where(stripe == 1, (190, 120, 50), picture)
    ).astype(np.uint8)


def plain_crop(
    planes: i420.Planes, input_from_stored: np.ndarray, input_px: int, chroma_shift_px: float
) -> np.ndarray:
    """The whole picture in RGB and float by JFIF's formula, then one warp.

    chroma_shift_px: moves Cb and Cr to the right, px of theirs.
    """
    y_HW = planes.y_HW.astype(np.float32)
    rows, columns = np.mgrid[: y_HW.shape[0], : y_HW.shape[1]].astype(np.float32)
    at = (columns / 2 - 0.25 - np.float32(chroma_shift_px), rows / 2 - 0.25)
    border = cv2.BORDER_REPLICATE
    cb, cr = (
        cv2.remap(p.astype(np.float32), *at, cv2.INTER_LINEAR, borderMode=border) - 128
        for p in (planes.cb_hw, planes.cr_hw)
    )
    rgb = np.stack([y_HW + 1.402 * cr, y_HW - 0.344136 * cb - 0.714136 * cr, y_HW + 1.772 * cb], -1)
    return cv2.warpAffine(rgb.clip(0, 255), input_from_stored[:2], (input_px, input_px))


@pytest.mark.parametrize(
    ("chroma_shift_px", "agrees"), [(0.0, True), (0.5, False), (-0.5, False), (0.25, False)]
)
def test_a_rotated_crop_equals_the_whole_pictures_and_detects_half_a_chroma_pixel_of_shift(
    chroma_shift_px, agrees
):
    """0.25 chroma px to the left or right is the siting of MPEG-2."""
    planes = i420.planes_of(i420.from_bgr(colour_edges()), 141, 90)
    matrix = geometry.input_from_image((61.3, 40.8), 0.42, 128, 1.1, 27.0, True)
    crop = i420.warp_to_rgb(planes, matrix, 128).astype(float)
    assert 0.02 < (crop == 0).all(-1).mean() < 0.6  # the border of the picture is in the crop
    difference = np.abs(crop - plain_crop(planes, matrix, 128, chroma_shift_px)).mean()
    assert (difference <= 1) == agrees, difference


@pytest.mark.parametrize("split", ["train", "valid"])
def test_crops_of_raw_shards_are_those_of_jpeg_shards(raw_shards, crop_shards, split):
    """The pictures are noise, which JPEGs of quality 95 change by about 2 grey levels."""
    raw, jpegs = ShardSet(raw_shards / split), ShardSet(crop_shards / split)
    np.testing.assert_array_equal(raw.records(), jpegs.records())
    sizes = raw.records()[:, 5:7]
    assert (sizes % 2 == 1).any() and (sizes % 2 == 0).any()
    for sample in range(len(raw)):
        drawn = draw(PRESETS["hrnet"], draw_rng(0, 0, sample))
        one, other = (crop_sample(s, sample, drawn, PRESETS["hrnet"], 64) for s in (raw, jpegs))
        difference = one.images_NHW3.int() - other.images_NHW3
        assert difference.abs().float().mean() < 4
        assert torch.equal(one.input_from_image_N23, other.input_from_image_N23)


def test_a_report_tile_of_a_raw_picture_equals_the_jpegs(raw_shards, crop_shards):
    tiles = []
    for folder in (raw_shards, crop_shards):
        split = ShardSet(folder / "valid")
        _, samples = split.people()
        tiles.append(person_tile(split, int(samples[1])).astype(int))
    assert tiles[0].std() > 20 and np.abs(tiles[0] - tiles[1]).mean() < 4


def test_whole_raw_shards_are_intact(raw_shards, capsys):
    assert check_shards.main([str(raw_shards), "--workers", "0", "--decode"]) == 0
    assert "17 people of train and valid, no damage found" in capsys.readouterr().out


# What they are refused for


@pytest.fixture
def damaged(raw_shards, tmp_path):
    """A copy of the training split for a test to damage: 12 people in 3 shards."""
    return Path(shutil.copytree(raw_shards / "train", tmp_path / "train"))


def test_training_names_the_person_at_a_cut_and_replaces_it_by_a_neighbour(damaged):
    split = ShardSet(damaged)
    split.records()
    place = place_of(split, 4, "i420")
    os.truncate(place.tar, place.offset + place.size - 1)
    spec = make_spec("hrnet", "opencv", batch_size=12, workers=0)
    with pytest.raises(BadSamplesError, match="the tar was cut off") as caught:
        TrainLoader(split, spec).next()
    assert list(caught.value.faults) == [4]
    patched = split.with_replacements({4})
    assert patched.picture(4) == split.picture(0)
    assert len(TrainLoader(patched, spec).next().records_NR) == 12


def test_princetons_crop_and_larger_crops_are_refused(raw_shards):
    for preset, needed in (("princeton", "original pictures"), ("newell", "crops of 2.000 x")):
        with pytest.raises(InputError) as caught:
            TrainLoader(ShardSet(raw_shards / "train"), make_spec(preset, "opencv"))
        assert needed in caught.value.expected and "--packing crop or raw" in caught.value.next_step
