"""The OpenCV path, princeton's rules, and what both loaders share: joints, order, batches."""

import itertools
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    AFFINE_PRESETS,
    OTHER_LOADERS,
    assert_loaders_agree,
    crop_sample,
    damage_picture,
    draws_array,
    make_codec,
    make_spec,
)

from common.errors import InputError
from configs.schema import WorkerKind
from configs.skeleton import MPII
from pipelines import geometry, princeton
from pipelines.annotations import read_annotations
from pipelines.augment import PRESETS, Draw, draw, draw_rng
from pipelines.loader import TrainLoader, choose_loader, make_batch
from pipelines.opencv_loader import (
    CropDataset,
    JitteredBatch,
    LooseImages,
    RawBatch,
    batches_in_order,
    collate,
    crop_person,
    endless_batches,
    load_crops,
)
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

CPU = torch.device("cpu")


def test_princetons_crop_is_a_zero_padded_cut_resized():
    """A box whose side is the input's: the resize does nothing and the cut can be seen."""
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    # 200 x 0.32 = 64 px about (20.9, 50): corners (-11.1, 18) and (52.9, 82), cut toward zero.
    upper_left, lower_right = princeton.box_corners((20.9, 50.0), 0.32, 64)
    assert upper_left.tolist() == [-11, 18] and lower_right.tolist() == [52, 82]
    crop = princeton.crop(image, (20.9, 50.0), 0.32, 64)
    box = np.zeros((64, 63, 3))
    box[:, 11:] = image[18:82, :52]
    np.testing.assert_allclose(crop, cv2.resize(box, (64, 64)))


def records_of(joints_NJ2, center_N2, scale_N, marked_NJ):
    """Fields of records that were not packed."""
    header = np.zeros((len(scale_N), 13))
    header[:, 1:3], header[:, 3] = center_N2, scale_N
    joints = np.concatenate([joints_NJ2, marked_NJ[..., None], marked_NJ[..., None]], axis=-1)
    records = np.concatenate([header, joints.reshape(len(joints), -1)], axis=1)
    return unpack_records(torch.from_numpy(records))


def princeton_joints_by_hand(joints, center, scale, drawn, mirrored, size=256, heat=64):
    """A loop over joints as its data loader has one."""
    box = 200 * scale
    moved = joints.copy()
    for j, (x, y) in enumerate(joints):
        if x > 0:
            shift_x, shift_y = (size * (-middle / box + 0.5) for middle in center)
            moved[j] = int(x * (size / box) + shift_x), int(y * (size / box) + shift_y)
    angle = np.deg2rad(drawn.rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (moved - size / 2) * heat / (size * drawn.scale) @ turn.T + heat / 2
    if drawn.flip:
        points = points[list(mirrored)]
        points[:, 0] = heat - points[:, 0]
    points[(joints == 0).all(axis=1)] = 0
    return points


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_princetons_joints_are_truncated_and_their_mask_is_not_mirrored(flip):
    rng = np.random.default_rng(3)
    joints = np.floor(rng.uniform(50, 400, (16, 2)))
    joints[[0, 11]] = 0  # right ankle and right elbow are missing; their left twins are not
    center, scale, drawn = [230.0, 210.5], 1.7, Draw(1.1, -17.0, flip)
    records = records_of(joints[None], [center], [scale], np.ones((1, 16)))
    heat, shown = princeton.heat_joints(
        records, torch.tensor([list(drawn)]), torch.tensor(MPII.flip_indices), 256
    )
    expected = princeton_joints_by_hand(joints, center, scale, drawn, MPII.flip_indices)
    np.testing.assert_allclose(heat[0], expected, atol=1e-3)
    assert not shown[0, 0] and not shown[0, 11]
    if flip:  # place 5 (left ankle) now holds the missing right one, and is drawn all the same
        assert shown[0, 5] and shown[0, 14]


def test_a_flip_swaps_left_and_right_and_their_marks():
    joints = np.tile(np.random.default_rng(0).uniform(0, 100, (1, 16, 2)), (2, 1, 1))
    marked = np.ones((2, 16))
    marked[:, 0] = 0
    draws = [Draw(1.2, 20.0, flip) for flip in (0.0, 1.0)]
    matrices = [geometry.input_from_image((50, 50), 0.5, 64, *draw[:3])[:2] for draw in draws]
    heat, shown = make_codec().heat_joints(
        records_of(joints, [[50.0, 50.0]] * 2, [0.5] * 2, marked),
        torch.from_numpy(np.stack(matrices)),
        torch.from_numpy(draws_array(draws)),
    )
    assert torch.nonzero(~shown).tolist() == [[0, 0], [1, 5]]
    back = torch.stack([15 - heat[1, :, 0], heat[1, :, 1]], dim=-1)[list(MPII.flip_indices)]
    torch.testing.assert_close(back, heat[0], atol=1e-4, rtol=0)


def test_a_joint_that_is_visible_but_not_marked_is_ignored_on_its_mirrored_side_too():
    joints = torch.zeros(2, 16, 4)  # x, y, marked, visible
    joints[:, 0] = torch.tensor([9.0, 9.0, 0.0, 1.0])
    joints[:, 1] = torch.tensor([9.0, 9.0, 1.0, 1.0])
    records = unpack_records(torch.cat([torch.zeros(2, 13), joints.flatten(1)], dim=1))
    draws = torch.from_numpy(draws_array([Draw(1.0, 0.0, flip) for flip in (0.0, 1.0)]))
    ignored = make_codec().ignored_joints(records, draws)
    assert torch.nonzero(ignored).tolist() == [[0, 0], [1, 5]]


def test_opencv_names_the_tar_and_sample_of_a_picture_that_does_not_decode(tiny_shards, tmp_path):
    folder = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2)
    dataset = CropDataset(ShardSet(folder), PRESETS["none"], 64, 0)
    dataset.batch([(1, 0)])
    with pytest.raises(InputError, match=r"00000\.tar: sample 2"):
        dataset.batch([(2, 0)])


def first_batches(count: int, *arguments: int) -> list[list[tuple[int, int]]]:
    """Of ten people. arguments: people a batch, rank, ranks, first step."""

    def keys_of_epoch(epoch: int) -> np.ndarray:
        order = np.random.default_rng(epoch).permutation(10)
        return np.column_stack([order, np.full(10, epoch)])

    return list(itertools.islice(endless_batches(keys_of_epoch, *arguments), count))


def test_every_pass_has_everybody_once_whatever_the_number_of_ranks():
    one = first_batches(5, 6, 0, 1)
    two = [first_batches(5, 3, rank, 2) for rank in (0, 1)]
    keys = [key for batch in one for key in batch]
    assert sorted(keys) == sorted((sample, epoch) for sample in range(10) for epoch in range(3))
    assert [key for a, b in zip(*two, strict=True) for key in [*a, *b]] == keys
    assert [s for s, e in keys if e == 0] != [s for s, e in keys if e == 1]


def test_the_opencv_loader_continues_from_a_step():
    assert first_batches(9, 4, 1, 2)[4:] == first_batches(5, 4, 1, 2, 4)


@pytest.mark.parametrize("kind", get_args(WorkerKind))
def test_workers_change_nothing(kind, tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS["princeton"], 64, seed=2)
    batches = batches_in_order(np.arange(12), 5)
    alone = list(load_crops(dataset, batches, workers=0, pin=False))
    helped = list(load_crops(dataset, batches, workers=2, pin=False, kind=kind))
    assert [len(raw.images_NHW3) for raw in helped] == [5, 5, 2]
    for a, b in zip(alone, helped, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("preset", ["princeton", "newell", "hrnet"])
def test_colours_jittered_by_workers_are_those_of_the_training_thread(preset, tiny_shards):
    split, codec = ShardSet(tiny_shards / "train"), make_codec(preset)
    loaders = [
        TrainLoader(split, make_spec(preset, "opencv", workers=1, jitter_in_workers=early))
        for early in (False, True)
    ]
    for _ in range(6):
        raws = [loader.next() for loader in loaders]
        assert [type(raw) for raw in raws] == [RawBatch, JitteredBatch]
        one, other = (make_batch(raw, codec, CPU) for raw in raws)
        assert one.images_N3HW.stride() == other.images_N3HW.stride()
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_has_the_crops_of_its_people_one_by_one(preset, tiny_shards):
    split, keys = ShardSet(tiny_shards / "train"), [(n, n % 3) for n in range(12)]
    raw = CropDataset(split, PRESETS[preset], 64, seed=2).batch(keys)
    draws = [draw(PRESETS[preset], draw_rng(2, epoch, sample)) for sample, epoch in keys]
    people = zip(keys, draws, strict=True)
    one_by_one = [crop_sample(split, key[0], d, PRESETS[preset], 64) for key, d in people]
    assert all(map(torch.equal, raw, collate(one_by_one)))


def test_a_warp_of_four_channels_is_that_of_three(tiny_shards):
    rng = np.random.default_rng(0)
    record = unpack_records(ShardSet(tiny_shards / "train").record(0)[None])
    center, scale = record.center_N2[0].astype(np.float64), float(record.scale_N[0])
    for _ in range(20):
        image = rng.integers(0, 256, (*rng.integers(50, 400, 2), 3), dtype=np.uint8)
        drawn = draw(PRESETS["newell"], rng)
        crop, _ = crop_person(image, record, drawn, PRESETS["newell"], 128)
        matrix = geometry.input_from_image(center, scale, 128, *drawn[:3])[:2]
        np.testing.assert_array_equal(crop, cv2.warpAffine(image, matrix, (128, 128))[..., ::-1])


def test_loose_pictures_give_the_crops_of_the_shards(tiny_set, tiny_shards):
    people, _ = read_annotations(tiny_set / "annot", "valid")
    loose = CropDataset(LooseImages(people, tiny_set / "images"), PRESETS["none"], 64, 0)
    split = ShardSet(tiny_shards / "valid")
    packed = CropDataset(split, PRESETS["none"], 64, 0)
    _, samples = split.people()
    assert len(samples) == 5
    for row, sample in enumerate(samples):
        # Centres are float32 in the record, float64 in the file: interpolation differs by a hair.
        one, other = (d.batch([(int(n), 0)]) for d, n in ((loose, row), (packed, sample)))
        assert (one.images_NHW3.int() - other.images_NHW3).abs().max() <= 1


def test_missing_pictures_are_counted(tiny_set, tmp_path):
    people, _ = read_annotations(tiny_set / "annot", "valid")
    with pytest.raises(InputError, match="5 of 5 pictures missing"):
        LooseImages(people, tmp_path)


@pytest.mark.parametrize("preset", ["princeton", "hrnet"])
def test_a_batch_has_the_promised_shapes_and_ranges(preset, tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS[preset], 64, seed=0)
    raw = dataset.batch([(i, 3) for i in range(12)])
    batch = make_batch(raw, make_codec(preset), CPU)
    assert batch.images_N3HW.shape == (12, 3, 64, 64) and batch.heat_NJHW.shape == (12, 16, 16, 16)
    assert batch.images_N3HW.min() >= 0 and batch.images_N3HW.max() <= 1
    assert batch.images_N3HW.std() > 0.1
    peaks = batch.heat_NJHW.amax(dim=(2, 3))
    assert (peaks[~batch.has_target_NJ] == 0).all() and (peaks > 0.5).any()
    assert sorted(batch.rows_N.tolist()) == list(range(12))


@pytest.mark.gpu
def test_a_batch_is_the_same_on_the_gpu(tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS["princeton"], 64, seed=0)
    raw = dataset.batch([(i, 3) for i in range(12)])
    codec = make_codec("princeton", "princeton")
    here, there = (make_batch(raw, codec, device) for device in (CPU, torch.device("cuda")))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("loader", OTHER_LOADERS)
def test_every_loader_makes_opencvs_crops_of_small_pictures(loader, device, tiny_shards):
    """Most people lie half outside their pictures."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    spec = make_spec("hrnet", loader, device=torch.device(device))
    assert_loaders_agree(ShardSet(tiny_shards / "train"), spec, steps=6)


def test_auto_takes_opencv_on_a_cpu():
    assert choose_loader("auto", CPU) == "opencv"
    assert choose_loader("dali", CPU) == "dali"


def test_every_preset_but_princetons_resamples_once(tiny_shards, monkeypatch):
    calls, real = [], cv2.warpAffine
    monkeypatch.setattr(cv2, "warpAffine", lambda *a, **k: calls.append(1) or real(*a, **k))
    for name in AFFINE_PRESETS:
        calls.clear()
        CropDataset(ShardSet(tiny_shards / "train"), PRESETS[name], 64, 0).batch([(0, 0)])
        assert len(calls) == 1, name
