"""Stored crops: they contain all that a preset reads, and their pixels are the picture's."""

import math
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import pack_arguments, write_h5, write_jpeg
from helpers import AFFINE_PRESETS, assert_loaders_agree, make_codec, make_spec

import train
from common.errors import InputError
from pipelines import geometry
from pipelines.augment import PRESETS, Distribution, Draw, Preset, draw
from pipelines.crop_packing import Region, crop_extent, crop_region, resize_region, stored_crop
from pipelines.jpeg import decode
from pipelines.loader import TrainLoader, evaluation_batches
from pipelines.opencv_loader import crop_person
from pipelines.shard_format import CropRule, Records, read_manifest, unpack_records
from pipelines.shards import ShardSet
from tools.make_shards import main

RULE = CropRule(preset="hrnet", extent=1.25 * math.sqrt(2), person_px=96, quality=95)
WIDTH, HEIGHT = 640, 360
# Where boxes lie: in the middle, over each border, over a corner, larger than the picture, tiny.
CENTERS_AND_SIDES = [
    (300.3, 170.8, 200),
    (10.2, 200.0, 180),
    (630.9, 100.0, 300),
    (320.0, 2.0, 150),
    (200.7, 355.0, 220),
    (0.0, 0.0, 260),
    (320.5, 180.5, 2500),
    (150.25, 80.75, 7),
]


@pytest.fixture(scope="module")
def crop_shards(tiny_set, tmp_path_factory):
    """The tiny set as crops for the preset hrnet, of at most 64 px a person."""
    output = tmp_path_factory.mktemp("crops") / "tiny"
    assert main(pack_arguments(tiny_set, output, "--packing", "crop", "--person-px", 64)) == 0
    return output


def smooth_picture() -> np.ndarray:
    """(HEIGHT, WIDTH, 3) without fine detail, so that nothing aliases; no two places alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    waves = [np.sin(x / 97 + y / 131), np.cos(x / 113 - y / 79), np.sin(y / 61 - x / 211)]
    return (127 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def record_of_person(x: float, y: float, side: float, part: Region | None) -> Records:
    values = np.zeros((1, 13))
    affine = part.image_from_stored if part else (1, 0, 0, 0, 1, 0)
    values[0, 1:4], values[0, 7:13] = (x, y, side / 200), affine
    return unpack_records(values)


def strongest(name: str) -> list[Draw]:
    """The largest scale at the angles that see furthest, mirrored too, and the smallest."""
    preset = PRESETS[name]
    low, high = preset.scale.low, preset.scale.high
    low, high = (2**low, 2**high) if preset.scale_is_log2 else (low, high)
    most = preset.rotation_deg.high
    turns = {min(45.0, most), -min(45.0, most), most, 0.0}
    return [Draw(high, turn, flip) for turn in turns for flip in (0.0, 1.0)] + [Draw(low, most)]


def test_extent_is_the_hull_of_the_box_at_the_largest_draw():
    # sqrt 2 at 45 degrees; cos 30 + sin 30 = (sqrt 3 + 1) / 2; cos 15 + sin 15 = sqrt 6 / 2.
    expected = {"newell": 2.0, "hrnet": 1.25 * 2**0.5, "mild": 1.15 * 6**0.5 / 2, "none": 1.0}
    expected["princeton"] = 1.25 * (3**0.5 + 1) / 2
    assert {name: crop_extent(PRESETS[name]) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", AFFINE_PRESETS)
def test_no_draw_of_a_preset_reads_beyond_its_extent(name):
    """Corners of the input, carried back to the picture, of a thousand draws."""
    rng, corners = np.random.default_rng(0), np.array([[-0.5, -0.5], [255.5, -0.5]])
    corners = np.concatenate([corners, 255 - corners])
    half = 100 * crop_extent(PRESETS[name]) + 1e-6
    for drawn in [draw(PRESETS[name], rng) for _ in range(1000)]:
        matrix = geometry.input_from_image(
            (0.0, 0.0), 1.0, 256, drawn.scale, drawn.rotation_deg, bool(drawn.flip)
        )
        assert np.abs(geometry.transform(np.linalg.inv(matrix), corners)).max() <= half


def test_stored_pixels_are_means_of_the_areas_they_cover():
    """Whole factors, by hand: 4 columns and 3 rows of the picture make a stored pixel."""
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    part = Region(left=16, top=30, right=96, bottom=60, width=20, height=10)
    stored = resize_region(image, part)
    means = image[30:60, 16:96].reshape(10, 3, 20, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(stored, means, atol=0.5 + 1e-6)
    # The centre of the first area: columns 16..19 and rows 30..32.
    assert part.image_from_stored == (4.0, 0.0, 17.5, 0.0, 3.0, 31.0)


@pytest.mark.parametrize(("x", "y", "side"), CENTERS_AND_SIDES)
def test_stored_people_are_small_enough_and_never_enlarged(x, y, side):
    part = crop_region((x, y), side / 200, WIDTH, HEIGHT, RULE)
    assert 0 <= part.left < part.right <= WIDTH and 0 <= part.top < part.bottom <= HEIGHT
    a, _, _, _, d, _ = part.image_from_stored
    assert side / a <= RULE.person_px and side / d <= RULE.person_px and min(a, d) >= 1
    # As fine as promised, but for rounding to whole stored pixels.
    assert a <= max(1, side / RULE.person_px) * (1 + 1 / part.width)
    reached = RULE.extent * side / 2
    assert part.left <= max(0, x - reached) and part.right >= min(WIDTH, x + reached)
    assert part.top <= max(0, y - reached) and part.bottom >= min(HEIGHT, y + reached)


@pytest.mark.parametrize("name", ["hrnet", "mild"])
@pytest.mark.parametrize(("x", "y", "side"), CENTERS_AND_SIDES)
def test_crops_equal_those_of_the_whole_picture_at_the_strongest_draws(x, y, side, name):
    """1 grey level on average; more only in the seam where the picture ends and black begins."""
    image = smooth_picture()
    part = crop_region((x, y), side / 200, WIDTH, HEIGHT, RULE)
    stored = resize_region(image, part)
    inside = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for drawn in strongest(name):
        crops = []
        for picture, of in ((image, None), (stored, part), (inside, None)):
            record = record_of_person(x, y, side, of)
            crops.append(crop_person(picture, record, drawn, PRESETS[name], 96)[0].astype(int))
        whole, from_stored, mask = crops
        seam_px = 2 * max(1.0, side / RULE.person_px / (side * drawn.scale / 96)) + 1
        size = 2 * math.ceil(seam_px) + 1
        border = cv2.morphologyEx(
            mask[..., 0].astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((size, size), np.uint8)
        )
        difference = np.abs(whole - from_stored)[border == 0]
        assert difference.size > 0.3 * 96 * 96 * 3
        assert difference.mean() <= 1 and difference.max() <= 6, drawn


def test_a_region_too_small_for_the_draws_would_show():
    """The comparison above can fail: with an extent of 1 a turned crop has black corners."""
    small = CropRule(preset="none", extent=1.0, person_px=96, quality=95)
    part = crop_region((300.3, 170.8), 1.0, WIDTH, HEIGHT, small)
    stored = resize_region(smooth_picture(), part)
    crop, _ = crop_person(
        stored, record_of_person(300.3, 170.8, 200, part), Draw(1.25, 45.0), PRESETS["hrnet"], 96
    )
    assert (crop == 0).all(axis=-1).mean() > 0.2


def test_a_whole_picture_keeps_its_bytes():
    jpeg = cv2.imencode(".jpg", smooth_picture()[:50, :60])[1].tobytes()
    part = crop_region((30, 25), 0.4, 60, 50, RULE)
    assert part == Region(0, 0, 60, 50, 60, 50)
    assert stored_crop(jpeg, part, "crop", 95) == jpeg


# Packed by tools/make_shards.py


def test_records_of_crops_are_those_of_the_originals_but_for_the_picture(tiny_shards, crop_shards):
    for split in ("train", "valid"):
        original, crops = ShardSet(tiny_shards / split), ShardSet(crop_shards / split)
        a, b = original.records(), crops.records()
        assert len(a) > 4
        np.testing.assert_array_equal(np.delete(a, range(5, 13), 1), np.delete(b, range(5, 13), 1))
        for sample in range(len(crops)):
            stored = decode(crops.picture(sample), "stored")
            assert b[sample, 5:7].tolist() == [stored.shape[1], stored.shape[0]]
            assert original.image_name(sample) == crops.image_name(sample)
        assert crops.manifest.max_width == b[:, 5].max() < a[:, 5].max()
        assert crops.manifest.max_height == b[:, 6].max()


def test_joints_are_the_same_through_stored_pixels_and_back(crop_shards):
    fields = unpack_records(ShardSet(crop_shards / "train").records())
    assert len(fields.row_N) == 12
    image_from_stored = np.tile(np.eye(3), (12, 1, 1))
    image_from_stored[:, :2] = fields.image_from_stored_N23
    there = geometry.transform(np.linalg.inv(image_from_stored), fields.joints_NJ2)
    assert np.abs(there - fields.joints_NJ2).max() > 10  # they are different pixels
    back = geometry.transform(image_from_stored, there)
    np.testing.assert_allclose(back, fields.joints_NJ2, atol=1e-4)


def test_the_manifest_says_what_was_stored(crop_shards, tiny_shards):
    manifest = read_manifest(crop_shards / "train")
    assert manifest.packing == "crop"
    rule = manifest.crop
    assert rule is not None and (rule.preset, rule.person_px, rule.quality) == ("hrnet", 64, 95)
    assert rule.extent == pytest.approx(1.25 * 2**0.5)
    assert read_manifest(tiny_shards / "train").crop is None


def test_an_interrupted_packing_of_crops_is_not_continued_with_another_size(tiny_set, crop_shards):
    again = pack_arguments(tiny_set, crop_shards, "--packing", "crop", "--person-px", 64)
    assert main(again) == 0
    with pytest.raises(InputError, match="another packing"):
        main(pack_arguments(tiny_set, crop_shards, "--packing", "crop", "--person-px", 96))


def test_people_at_the_limits_are_packed_and_cropped(tmp_path):
    """Outside the picture, tiny, and far larger than the picture: everybody has a crop."""
    cases = [(-400.0, 50.0, 0.5), (60.0, 40.0, 0.02), (60.0, 40.0, 30.0), (119.0, 79.0, 0.4)]
    count, values = len(cases), np.array(cases)
    picture = np.random.default_rng(0).integers(60, 256, (80, 120, 3), dtype=np.uint8)
    write_jpeg(tmp_path / "images" / "a.jpg", picture)
    columns: dict = {"imgname": np.array([b"a.jpg"] * count), "normalize": np.ones(count)}
    columns |= {"center": values[:, :2], "scale": values[:, 2]}
    columns |= {"part": np.full((count, 16, 2), 50.0), "visible": np.ones((count, 16))}
    write_h5(tmp_path / "annot" / "train.h5", columns)
    main(pack_arguments(tmp_path, tmp_path / "out", "--packing", "crop", "--splits", "train"))
    split = ShardSet(tmp_path / "out" / "train")
    means = {}
    for sample in range(count):
        record = unpack_records(split.record(sample)[None])
        image = decode(split.picture(sample), "stored")
        crop, _ = crop_person(image, record, Draw(), PRESETS["hrnet"], 64)
        means[int(record.row_N[0])] = crop.mean()
    assert means[0] == 0 and means[1] > 60 and 0 < means[2] < 10 and 20 < means[3] < 60


# What they are refused for


@pytest.mark.parametrize(
    ("preset", "needed"), [("princeton", "original pictures"), ("newell", r"crops of 2\.000 x")]
)
def test_training_with_larger_crops_is_refused_before_anything_is_written(
    preset, needed, crop_shards, monkeypatch, tmp_path
):
    words = ["--data.shards", crop_shards, "--data.preset", preset, "--train.out", tmp_path / "out"]
    words += ["--train.device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(InputError, match=needed) as caught:
        train.main()
    assert "--packing original" in caught.value.next_step
    assert not (tmp_path / "out").exists()


def test_evaluation_with_princetons_crop_is_refused_on_crops(crop_shards, tiny_shards):
    codec, cpu = make_codec("princeton", "princeton"), torch.device("cpu")
    options = {"loader": "opencv", "device": cpu, "batch_size": 5, "workers": 0}
    evaluation_batches(ShardSet(tiny_shards / "valid"), np.arange(5), codec, **options)
    with pytest.raises(InputError, match="princeton's crop"):
        evaluation_batches(ShardSet(crop_shards / "valid"), np.arange(5), codec, **options)


@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_every_loader_refuses_larger_crops_than_are_stored(crop_shards, loader):
    mild = PRESETS["mild"]
    far = Preset(Distribution("uniform", 1, 1.8), False, mild.rotation_deg, 0, 0, "none")
    with pytest.raises(InputError, match=r"1\.800 x"):
        TrainLoader(ShardSet(crop_shards / "train"), make_spec(far, loader))


@pytest.mark.parametrize("name", ["hrnet", "mild", "none"])
def test_dali_makes_opencvs_crops_of_crops(name, crop_shards):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    split = ShardSet(crop_shards / "train")
    assert_loaders_agree(split, make_spec(name, batch_size=5), steps=4)
