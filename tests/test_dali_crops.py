"""DALI makes OpenCV's crops from the same draws, shares people over ranks, and can be continued."""

import cv2
import numpy as np
import pytest
import torch

from common.errors import InputError
from pipelines import geometry, princeton
from pipelines.augment import PRESETS, Draw
from pipelines.loader import LoaderSpec, images_on_device, train_loader
from pipelines.opencv_loader import crop_person, decode
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from pipelines import dali_loader as dali_crops

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
    crops = dali_crops.DaliLoader(
        split,
        preset,
        input_px=input_px,
        batch_size=size,
        device=torch.device(device),
        threads=2,
        seed=5,
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
    crops = dali_crops.DaliLoader(
        split, hard, input_px=128, batch_size=12, device=CPU, threads=2, shuffle_buffer=0
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
    split, preset = ShardSet(tiny_shards / "train"), PRESETS["princeton"]
    crops = dali_crops.DaliLoader(
        split,
        preset,
        input_px=128,
        batch_size=12,
        device=torch.device(device),
        threads=2,
        shuffle_buffer=0,
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


@pytest.mark.parametrize("device", DEVICES)
def test_crops_reach_torch_without_a_copy_and_channels_last(device, tiny_shards):
    crops = dali_crops.DaliLoader(
        ShardSet(tiny_shards / "train"), PRESETS["hrnet"], input_px=64, batch_size=4,
        device=torch.device(device), threads=2,
    )  # fmt: skip
    outputs = crops.pipeline.run()
    pointers = [output.as_tensor().data_ptr() for output in outputs]
    raw = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    assert [t.data_ptr() for t in raw] == pointers
    image = images_on_device(crops.next(), raw[0].device)
    assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last)


def test_dali_draws_by_the_same_table(tiny_shards):
    """Ends and shares of its draws, as test_augment.py checks them for numpy."""
    split = ShardSet(tiny_shards / "train")
    found = {}
    for name in ("princeton", "newell", "hrnet"):
        crops = dali_crops.DaliLoader(
            split, PRESETS[name], input_px=64, batch_size=64, device=CPU, threads=2, seed=1
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
        crops = dali_crops.DaliLoader(
            split, PRESETS["none"], input_px=64, batch_size=4, device=CPU, threads=1,
            rank=rank, world_size=3, shuffle_buffer=0,
        )  # fmt: skip
        rows.append(set(crops.next().records_NR[:, 0].int().tolist()))
    assert [len(r) for r in rows] == [4, 4, 4] and set.union(*rows) == set(range(12))


def test_dali_continues_its_sequence_from_a_state(tiny_shards):
    def make(state=b""):
        return dali_crops.DaliLoader(
            ShardSet(tiny_shards / "train"), PRESETS["princeton"], input_px=64, batch_size=5,
            device=CPU, threads=2, seed=9, state=state,
        )  # fmt: skip

    first = make()
    for _ in range(3):
        first.next()
    second = make(first.state())
    for _ in range(4):
        for a, b in zip(first.next(), second.next(), strict=True):
            assert torch.equal(a, b)


def test_dali_names_the_tar_and_sample_of_a_picture_that_does_not_decode(tiny_shards, tmp_path):
    from helpers import damage_picture

    folder = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2)
    crops = dali_crops.DaliLoader(
        ShardSet(folder), PRESETS["none"], input_px=64, batch_size=5, device=CPU, threads=1,
        shuffle_buffer=0,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"00000\.tar: sample 2"):
        crops.next()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["princeton", "newell", "hrnet"])
def test_decoding_only_what_the_affine_reaches_gives_the_same_crops(name, device, tiny_shards):
    """Most boxes lie half outside their pictures; the draws are the same, so must be the crops."""
    split = ShardSet(tiny_shards / "train")

    def make(roi: bool):
        return dali_crops.DaliLoader(
            split,
            PRESETS[name],
            input_px=64,
            batch_size=12,
            device=torch.device(device),
            threads=2,
            roi=roi,
        )

    whole, part = make(False), make(True)
    for _ in range(8):
        expected, found = whole.next(), part.next()
        assert torch.equal(expected.draws_ND, found.draws_ND)
        assert torch.equal(expected.input_from_image_N23, found.input_from_image_N23)
        difference = (expected.images_NHW3.int() - found.images_NHW3.int()).abs().float()
        if device == "cuda":  # regions may go to another decoder than pictures
            assert difference.mean() <= 0.5 and np.percentile(difference.cpu(), 99.9) <= 6
        else:  # a moved origin rounds the affine otherwise: a grey level here and there
            assert difference.max() <= 2 and difference.mean() < 0.02


def test_a_region_is_decoded_and_not_the_picture(tiny_shards, monkeypatch):
    """The shape of what reaches the warp: the upright box, 2 px about it, within the picture."""
    monkeypatch.setattr(
        dali_crops.fn, "warp_affine", lambda image, **_: image.shape(dtype=dali_crops.types.INT32)
    )
    split = ShardSet(tiny_shards / "train")
    crops = dali_crops.DaliLoader(
        split, PRESETS["none"], input_px=64, batch_size=12, device=CPU, threads=1, roi=True
    )
    raw = crops.next()
    fields = unpack_records(raw.records_NR.numpy().astype(float))
    half_N1 = 100 * fields.scale_N[:, None] + 2
    start = np.maximum(np.floor(fields.center_N2 - half_N1), 0)
    end = np.minimum(np.ceil(fields.center_N2 + half_N1) + 1, fields.size_N2)
    np.testing.assert_array_equal(raw.images_NHW3.numpy()[:, 1::-1], end - start)
    share = (end - start).prod(axis=1) / fields.size_N2.prod(axis=1)
    assert share.min() < 0.5, "whole pictures would do as well"


def test_regions_are_refused_for_crops_and_with_a_cache(tiny_set, tiny_shards, tmp_path):
    from conftest import pack_arguments

    from tools.make_shards import main

    assert main(pack_arguments(tiny_set, tmp_path / "crops", "--packing", "crop")) == 0
    with pytest.raises(InputError, match="decoding of regions, and crops"):
        dali_crops.DaliLoader(
            ShardSet(tmp_path / "crops" / "train"), PRESETS["hrnet"], input_px=64, batch_size=4,
            device=CPU, roi=True,
        )  # fmt: skip
    gpu = dali_crops.Decoder("gpu", roi=True, cache_mb=100)
    with pytest.raises(InputError, match="a decoder cache, which holds whole pictures"):
        dali_crops.require_decoder(gpu, ShardSet(tiny_shards / "train"))


@pytest.mark.parametrize("loader", ["dali", "opencv"])
def test_a_decoder_cache_without_a_gpu_is_refused(loader, tiny_shards):
    spec = LoaderSpec(
        loader=loader, device=CPU, preset=PRESETS["hrnet"], input_px=64, batch_size=4, workers=0,
        cache_mb=64,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"data\.cache_mb"):
        train_loader(ShardSet(tiny_shards / "train"), spec)


def test_a_rank_with_a_cache_meets_the_same_people_again(tiny_shards, monkeypatch):
    """The reader of the graph with a cache, on a CPU, whose decoder is spared the cache itself."""
    given, image = {}, dali_crops.fn.decoders.image

    def without_cache(jpeg, *, cache_size, cache_type, **others):
        given.update(cache_size=cache_size, cache_type=cache_type)
        return image(jpeg, **others)

    monkeypatch.setattr(dali_crops.fn.decoders, "image", without_cache)
    monkeypatch.setattr(dali_crops, "require_decoder", lambda *_: None)
    met = []
    for rank in range(2):
        crops = dali_crops.DaliLoader(
            ShardSet(tiny_shards / "train"), PRESETS["none"], input_px=64, batch_size=6,
            device=CPU, rank=rank, world_size=2, shuffle_buffer=4, cache_mb=64,
        )  # fmt: skip
        epochs = [set(crops.next().records_NR[:, 0].int().tolist()) for _ in range(5)]
        assert all(epoch == epochs[0] for epoch in epochs) and len(epochs[0]) == 6
        met.append(epochs[0])
    assert set.union(*met) == set(range(12))
    assert given == {"cache_size": 64, "cache_type": "threshold"}


@pytest.mark.gpu
def test_cached_pictures_give_the_same_crops_again(tiny_shards):
    """Twelve people, decoded once each; the second pass comes out of the cache.

    Without the JPEG engine, whose pixels differ a little: who it decodes hangs on the batch.
    """
    split = ShardSet(tiny_shards / "train")
    plain, cached = (
        dali_crops.DaliLoader(
            split,
            PRESETS["hrnet"],
            input_px=64,
            batch_size=12,
            device=torch.device("cuda"),
            cache_mb=cache_mb,
            hw_decoder_load=0.0,
        )
        for cache_mb in (0, 64)
    )
    for _ in range(4):
        for a, b in zip(plain.next(), cached.next(), strict=True):
            assert torch.equal(a, b)
