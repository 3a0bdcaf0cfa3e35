"""The two loaders make the same crops from the same draws; both stay in their contracts."""

import cv2
import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.mpii import MPII
from pipelines import batches, geometry, princeton, shards
from pipelines.augment import PRESETS, Draw, preset_of
from pipelines.batches import Target
from pipelines.opencv_crops import (
    CropDataset,
    CropLoader,
    EndlessSampler,
    ListSampler,
    LooseImages,
    collate,
    crop_person,
    decode,
)
from pipelines.shards import ShardSet, unpack_records

dali_crops = pytest.importorskip("pipelines.dali_crops", reason="NVIDIA DALI is not installed")

DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
CPU = torch.device("cpu")


def need(device: str) -> None:
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def by_row(split: ShardSet) -> dict[int, int]:
    return {int(split.record(i)[0]): i for i in range(len(split))}


def opencv_twin(split: ShardSet, raw, person: int, preset) -> tuple[np.ndarray, np.ndarray]:
    """The crop and matrix that OpenCV makes from DALI's own draw for one person of a batch."""
    sample = by_row(split)[int(raw.records_NR[person, 0])]
    drawn = Draw(*raw.draws_ND[person].tolist())
    fields = unpack_records(split.record(sample)[None])
    image = decode(split.jpeg(sample), "twin")
    return crop_person(image, fields, drawn, preset, raw.images_NHW3.shape[1])


def compare(split: ShardSet, name: str, device: str, input_px: int, steps: int, size: int):
    """Grey-level differences and joint differences (px) of many people under a preset."""
    preset = PRESETS[name]
    crops = dali_crops.DaliCrops(
        split, preset, input_px=input_px, batch_size=size, device=device, threads=2, seed=5
    )
    grey, joints = [], []
    for _ in range(steps):
        raw = type(crops.next())(*(t.cpu() for t in crops.next()))
        for person in range(size):
            crop, matrix = opencv_twin(split, raw, person, preset)
            grey.append(np.abs(crop.astype(float) - raw.images_NHW3[person].numpy()).ravel())
            points = unpack_records(raw.records_NR.numpy()).joints_NJ2[person]
            two = (
                geometry.transform(m, points) for m in (matrix, raw.input_from_image_N23[person])
            )
            joints.append(np.abs(next(two) - next(two)).max())
    return np.concatenate(grey), max(joints)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["newell", "hrnet", "mild", "none"])
def test_dali_agrees_with_opencv_on_real_pictures(name, device, shared, tmp_path):
    """Mean at most 0.5 grey levels, 99.9th percentile at most 6, joints within 0.01 px."""
    need(device)
    folder = pack_real(shared, tmp_path)
    grey, joints = compare(ShardSet(folder), name, device, 256, steps=4, size=5)
    assert grey.size == 4 * 5 * 256 * 256 * 3
    assert grey.mean() <= 0.5 and np.percentile(grey, 99.9) <= 6
    assert joints <= 0.01


def pack_real(shared, tmp_path):
    """The five real MPII pictures as shards."""
    from tools.make_shards import main

    data = shared / "data" / "mpii_sample"
    arguments = ["--annotations", data / "annot" / "valid.h5", "--images", data / "images",
                 "--output", tmp_path / "real", "--splits", "valid", "--workers", 1]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    return tmp_path / "real" / "valid"


@pytest.mark.parametrize("device", DEVICES)
def test_dali_agrees_with_opencv_on_made_pictures(device, tiny_shards):
    """Without real data at hand: small noisy pictures, most people half outside theirs."""
    need(device)
    grey, joints = compare(ShardSet(tiny_shards / "train"), "hrnet", device, 64, steps=6, size=4)
    assert grey.mean() <= 0.5 and np.percentile(grey, 99.9) <= 6
    assert joints <= 0.01


def test_a_rotated_flipped_half_outside_case_agrees(tiny_shards, monkeypatch):
    """One hard draw for everybody: 40 degrees, mirrored, and a box about the picture's corner."""
    hard = PRESETS["hrnet"]._replace(
        scale=PRESETS["hrnet"].scale._replace(kind="uniform", low=1.3, high=1.3),
        rotation_deg=PRESETS["hrnet"].rotation_deg._replace(kind="uniform", low=40, high=40),
        rotation_probability=1.0,
        flip_probability=1.0,
    )
    monkeypatch.setitem(PRESETS, "hard", hard)
    split = ShardSet(tiny_shards / "train")
    crops = dali_crops.DaliCrops(
        split, hard, input_px=128, batch_size=12, device="cpu", threads=2, shuffle_buffer=0
    )
    raw = crops.next()
    assert raw.draws_ND[:, :3].tolist() == [pytest.approx([1.3, 40, 1])] * 12
    black = []
    for person in range(12):
        crop, matrix = opencv_twin(split, raw, person, hard)
        difference = np.abs(crop.astype(int) - raw.images_NHW3[person].numpy().astype(int))
        assert difference.mean() <= 0.5 and np.percentile(difference, 99.9) <= 6
        np.testing.assert_allclose(raw.input_from_image_N23[person], matrix, atol=1e-3)
        black.append((raw.images_NHW3[person] == 0).all(dim=-1).float().mean().item())
    assert max(black) > 0.4, "no person lies half outside"


@pytest.mark.parametrize("device", DEVICES)
def test_dali_makes_princetons_box_and_matrix_in_one_resampling(device, tiny_shards):
    """Against OpenCV's single warp of the same zero-padded box; DALI resamples once only."""
    need(device)
    split, preset = ShardSet(tiny_shards / "train"), PRESETS["princeton"]
    crops = dali_crops.DaliCrops(
        split, preset, input_px=128, batch_size=12, device=device, threads=2, shuffle_buffer=0
    )
    raw = type(crops.next())(*(t.cpu() for t in crops.next()))
    for person in range(12):
        sample = by_row(split)[int(raw.records_NR[person, 0])]
        fields = unpack_records(split.record(sample)[None])
        center, scale = fields.center_N2[0].astype(float), float(fields.scale_N[0])
        corner, end = princeton.box_corners(center, scale, 128)
        drawn = Draw(*raw.draws_ND[person].tolist())
        matrix = princeton.input_from_image(center, scale, drawn, 128)
        image = decode(split.jpeg(sample), "twin")
        shifted = geometry.translation(*-corner)[:2].astype(float)
        box = cv2.warpAffine(image, shifted, tuple(int(v) for v in end - corner))
        single = cv2.warpAffine(box, (matrix @ geometry.translation(*corner))[:2], (128, 128))
        expected = cv2.cvtColor(single, cv2.COLOR_BGR2RGB).astype(float)
        difference = np.abs(expected - raw.images_NHW3[person].numpy())
        assert difference.mean() <= 0.5 and np.percentile(difference, 99.9) <= 6
        np.testing.assert_allclose(raw.input_from_image_N23[person], matrix[:2], atol=1e-3)


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


def princeton_joints_by_hand(joints, center, scale, drawn, mirrored, size=256, heat=64):
    """A loop over joints as its data loader has one."""
    box = 200 * scale
    moved = joints.copy()
    for j, (x, y) in enumerate(joints):
        if x > 0:
            moved[j] = [int(x * (size / box) + size * (-center[0] / box + 0.5)),
                        int(y * (size / box) + size * (-center[1] / box + 0.5))]  # fmt: skip
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
    center, scale, drawn = np.array([230.0, 210.5]), 1.7, Draw(1.1, -17.0, flip)
    heat, shown = princeton.heat_joints(
        torch.tensor(joints)[None], torch.tensor(center)[None],
        torch.tensor([scale], dtype=torch.float64),
        torch.tensor([list(drawn)]), torch.tensor(MPII.mirrored), 256, 64,
    )  # fmt: skip
    expected = princeton_joints_by_hand(joints, center, scale, drawn, MPII.mirrored)
    np.testing.assert_allclose(heat[0], expected, atol=1e-3)
    assert not shown[0, 0] and not shown[0, 11]
    if flip:  # place 5 (left ankle) now holds the missing right one, and is drawn all the same
        assert shown[0, 5] and shown[0, 14]


def test_a_flip_swaps_left_and_right_and_their_marks():
    joints = torch.rand(2, 16, 2) * 100
    marked = torch.ones(2, 16, dtype=torch.bool)
    marked[:, 0] = False
    matrices = torch.from_numpy(
        np.stack([
            geometry.input_from_image((50, 50), 0.5, 64, 1.2, 20, flip)[:2]
            for flip in (False, True)
        ])
    ).float()  # fmt: skip
    mirrored = torch.tensor(MPII.mirrored)
    heat, shown = batches.heat_joints(
        joints[:1].expand(2, -1, -1),
        marked,
        matrices,
        torch.tensor([False, True]),
        mirrored,
        "exact",
    )
    assert torch.nonzero(~shown).tolist() == [[0, 0], [1, 5]]
    back = torch.stack([15 - heat[1, :, 0], heat[1, :, 1]], dim=-1)[mirrored]
    torch.testing.assert_close(back, heat[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_crops_reach_torch_without_a_copy_and_channels_last(device, tiny_shards):
    need(device)
    crops = dali_crops.DaliCrops(
        ShardSet(tiny_shards / "train"), PRESETS["hrnet"], input_px=64, batch_size=4,
        device=device, threads=2,
    )  # fmt: skip
    outputs = crops.pipeline.run()
    pointers = [output.as_tensor().data_ptr() for output in outputs]
    raw = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    assert [t.data_ptr() for t in raw] == pointers
    image = batches.images_N3HW(crops.next(), raw[0].device)
    assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last)


def test_dali_draws_by_the_same_table(tiny_shards):
    """Ends and shares of its draws, as test_augment.py checks them for numpy."""
    split = ShardSet(tiny_shards / "train")
    found = {}
    for name in ("princeton", "newell", "hrnet"):
        crops = dali_crops.DaliCrops(
            split, PRESETS[name], input_px=64, batch_size=64, device="cpu", threads=2, seed=1
        )
        found[name] = torch.cat([crops.next().draws_ND for _ in range(12)]).numpy()
    columns = {field: i for i, field in enumerate(Draw._fields)}
    princeton_draws, newell, hrnet = found["princeton"], found["newell"], found["hrnet"]
    assert np.abs(princeton_draws[:, columns["rotation_deg"]]).max() == pytest.approx(30, abs=0.5)
    plain = princeton_draws[princeton_draws[:, columns["flip"]] == 0]
    assert 300 < len(plain) < 470
    assert (plain[:, 3:] == np.array(Draw()[3:], dtype=np.float32)).all()
    assert np.abs(np.log2(newell[:, columns["scale"]])).max() == pytest.approx(0.5, abs=1e-3)
    assert (newell[:, columns["rotation_deg"]] != 0).mean() == pytest.approx(0.4, abs=0.08)
    assert newell[:, columns["red"]].min() == pytest.approx(0.6, abs=0.02)
    assert (hrnet[:, columns["rotation_deg"]] != 0).mean() == pytest.approx(0.6, abs=0.08)
    ends = np.isclose(hrnet[:, columns["scale"]], 0.75) | np.isclose(
        hrnet[:, columns["scale"]], 1.25
    )
    assert ends.mean() == pytest.approx(0.317, abs=0.08)


def test_ranks_of_dali_share_the_people_without_overlap(tiny_shards):
    split = ShardSet(tiny_shards / "train")
    rows = []
    for rank in range(3):
        crops = dali_crops.DaliCrops(
            split, PRESETS["none"], input_px=64, batch_size=4, device="cpu", threads=1,
            rank=rank, ranks=3, shuffle_buffer=0,
        )  # fmt: skip
        rows.append(set(crops.next().records_NR[:, 0].int().tolist()))
    assert [len(r) for r in rows] == [4, 4, 4] and set.union(*rows) == set(range(12))


def test_dali_continues_its_sequence_from_a_state(tiny_shards):
    def make(state=None):
        return dali_crops.DaliCrops(
            ShardSet(tiny_shards / "train"), PRESETS["princeton"], input_px=64, batch_size=5,
            device="cpu", threads=2, seed=9, state=state,
        )  # fmt: skip

    first = make()
    for _ in range(3):
        first.next()
    second = make(first.state())
    for _ in range(4):
        for a, b in zip(first.next(), second.next(), strict=True):
            assert torch.equal(a, b)


def test_dali_names_the_tar_and_sample_of_a_picture_that_does_not_decode(tiny_shards, tmp_path):
    from test_shards_damage import damage_picture

    folder = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2)
    crops = dali_crops.DaliCrops(
        ShardSet(folder), PRESETS["none"], input_px=64, batch_size=5, device="cpu", threads=1,
        shuffle_buffer=0,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"00000\.tar: sample 2"):
        crops.next()


def test_opencv_names_the_tar_and_sample_of_a_picture_that_does_not_decode(tiny_shards, tmp_path):
    from test_shards_damage import damage_picture

    folder = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2)
    dataset = CropDataset(ShardSet(folder), PRESETS["none"], 64, 0)
    dataset[(1, 0)]
    with pytest.raises(InputError, match=r"00000\.tar: sample 2"):
        dataset[(2, 0)]


def positions(sampler: EndlessSampler, steps: int) -> list[list[tuple[int, int]]]:
    walk = iter(sampler)
    return [next(walk) for _ in range(steps)]


def test_every_pass_sees_everybody_once_whatever_the_number_of_ranks():
    one = positions(EndlessSampler(10, 6, seed=1, rank=0, ranks=1), 5)
    two = [positions(EndlessSampler(10, 3, seed=1, rank=r, ranks=2), 5) for r in (0, 1)]
    flat = [key for batch in one for key in batch]
    assert sorted(flat) == [(sample, epoch) for sample in range(10) for epoch in range(3)] or (
        {k for k in flat if k[1] == 0} == {(s, 0) for s in range(10)}
    )
    assert [key for a, b in zip(*two, strict=True) for key in [*a, *b]] == flat
    assert [s for s, e in flat if e == 0] != [s for s, e in flat if e == 1]


def test_the_opencv_loader_continues_from_a_step():
    whole = positions(EndlessSampler(10, 4, seed=1, rank=1, ranks=2), 9)
    rest = positions(EndlessSampler(10, 4, seed=1, rank=1, ranks=2, first_step=4), 5)
    assert whole[4:] == rest


def test_worker_processes_change_nothing(tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS["princeton"], 64, seed=2)
    sampler = ListSampler(np.arange(12), 5)
    alone = list(CropLoader(dataset, sampler, workers=0, pin=False))
    helped = list(CropLoader(dataset, sampler, workers=2, pin=False))
    assert [len(raw.images_NHW3) for raw in helped] == [5, 5, 2]
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_loose_pictures_give_the_crops_of_the_shards(tiny_set, tiny_shards):
    from pipelines.annotations import read_annotations

    people, _ = read_annotations(tiny_set / "annot", "valid")
    loose = CropDataset(LooseImages(people, tiny_set / "images"), PRESETS["none"], 64, 0)
    split = ShardSet(tiny_shards / "valid")
    _, samples = split.people()
    packed = CropDataset(split, PRESETS["none"], 64, 0)
    assert len(samples) == 5
    for row, sample in enumerate(samples):
        # Centres are float32 in the record, float64 in the file: interpolation differs by a hair.
        difference = loose[(row, 0)][0].astype(int) - packed[(int(sample), 0)][0]
        assert np.abs(difference).max() <= 1


def test_missing_pictures_are_counted(tiny_set, tmp_path):
    from pipelines.annotations import read_annotations

    people, _ = read_annotations(tiny_set / "annot", "valid")
    with pytest.raises(InputError, match="5 of 5 pictures missing"):
        LooseImages(people, tmp_path)


def target_of(preset: str, rule="exact") -> Target:
    return Target(preset_of(preset, True), rule, 1.0, 64, MPII)


@pytest.mark.parametrize("preset", ["princeton", "hrnet"])
def test_a_finished_batch_has_the_shapes_and_ranges_that_it_promises(preset, tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS[preset], 64, seed=0)
    raw = collate([dataset[(i, 3)] for i in range(12)])
    batch = batches.finish(raw, target_of(preset), CPU)
    assert batch.images_N3HW.shape == (12, 3, 64, 64) and batch.heat_NJHW.shape == (12, 16, 16, 16)
    assert batch.images_N3HW.min() >= 0 and batch.images_N3HW.max() <= 1
    assert batch.images_N3HW.std() > 0.1
    peaks = batch.heat_NJHW.amax(dim=(2, 3))
    assert (peaks[~batch.drawn_NJ] == 0).all() and (peaks > 0.5).any()
    assert sorted(batch.rows_N.tolist()) == list(range(12))


@pytest.mark.gpu
def test_a_batch_is_the_same_on_the_gpu(tiny_shards):
    need("gpu")
    dataset = CropDataset(ShardSet(tiny_shards / "train"), PRESETS["princeton"], 64, seed=0)
    raw = collate([dataset[(i, 3)] for i in range(12)])
    here = batches.finish(raw, target_of("princeton", "princeton"), CPU)
    there = batches.finish(raw, target_of("princeton", "princeton"), torch.device("cuda"))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=0)


def test_auto_takes_opencv_on_a_cpu():
    assert batches.choose_loader("auto", CPU) == "opencv"
    assert batches.choose_loader("dali", CPU) == "dali"


def test_every_preset_but_princetons_needs_one_warp_alone(tiny_shards, monkeypatch):
    """One resampling: a second call of warpAffine would be a second one."""
    calls = []
    real = cv2.warpAffine
    monkeypatch.setattr(cv2, "warpAffine", lambda *a, **k: calls.append(1) or real(*a, **k))
    split = ShardSet(tiny_shards / "train")
    for name in ("newell", "hrnet", "mild", "none"):
        calls.clear()
        CropDataset(split, PRESETS[name], 64, 0)[(0, 0)]
        assert len(calls) == 1, name
    assert split.manifest.format_version == shards.FORMAT_VERSION
