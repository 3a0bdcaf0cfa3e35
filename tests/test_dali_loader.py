"""DALI makes OpenCV's crops from the same draws, shares people over ranks, and can be continued."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import pack_arguments
from helpers import (
    AFFINE_PRESETS,
    assert_loaders_agree,
    damage_picture,
    make_codec,
    make_spec,
    sample_of_row,
)

from common.errors import InputError
from pipelines import geometry, princeton
from pipelines.augment import PRESETS, Draw
from pipelines.jpeg import BadSamplesError, decode
from pipelines.loader import RawBatch, TrainLoader, evaluation_batches, images_on_device
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from pipelines import dali_loader
from pipelines.dali_loader import DaliCrops

LOADERS = ["dali", "opencv"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=["original", "raw"])
def real_shards(request, shared, tmp_path_factory) -> ShardSet:
    """The five real MPII pictures as shards."""
    from tools.make_shards import main

    data, output = shared / "data" / "mpii_sample", tmp_path_factory.mktemp("real") / "shards"
    words = f"--annotations {data / 'annot' / 'valid.h5'} --images {data / 'images'}"
    words += f" --packing {request.param} --preset newell --person-px 288"
    if request.param == "original":
        words = words.split(" --preset")[0]
    assert main(f"{words} --output {output} --splits valid --workers 1".split()) == 0
    return ShardSet(output / "valid")


@pytest.fixture(scope="module")
def raw_split(tiny_set, tmp_path_factory) -> ShardSet:
    """Raw crops of even and odd sizes."""
    from tools.make_shards import main

    output = tmp_path_factory.mktemp("raw") / "tiny"
    arguments = pack_arguments(tiny_set, output, "--packing", "raw", "--person-px", 64)
    assert main([*arguments, "--preset", "newell"]) == 0
    return ShardSet(output / "train")


@pytest.fixture
def split(tiny_shards) -> ShardSet:
    return ShardSet(tiny_shards / "train")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", AFFINE_PRESETS)
def test_dali_agrees_with_opencv_on_real_pictures(name, device, real_shards):
    spec = make_spec(name, input_px=256, batch_size=5, device=torch.device(device))
    assert_loaders_agree(real_shards, spec, steps=1 if name in ("mild", "none") else 3)


def test_a_rotated_flipped_half_outside_case_agrees(split):
    """One hard draw for everybody: 40 degrees, mirrored, and a box about the picture's corner."""
    hard = PRESETS["hrnet"]._replace(
        scale=PRESETS["hrnet"].scale._replace(kind="uniform", low=1.3, high=1.3),
        rotation_deg=PRESETS["hrnet"].rotation_deg._replace(kind="uniform", low=40, high=40),
        rotation_probability=1.0,
        flip_probability=1.0,
    )
    spec = make_spec(hard, input_px=128, batch_size=12)
    raw = assert_loaders_agree(split, spec, steps=1)
    assert raw.draws_ND[:, :3].tolist() == [pytest.approx([1.3, 40, 1])] * 12
    black_N = (raw.images_NHW3 == 0).all(dim=-1).float().mean(dim=(1, 2))
    assert black_N.max() > 0.4, "no person lies half outside"


@pytest.mark.parametrize("device", DEVICES)
def test_dali_makes_princetons_box_and_matrix_in_one_resampling(device, split):
    """Against OpenCV's single warp of the same zero-padded box; DALI resamples once only."""
    spec = make_spec("princeton", input_px=128, batch_size=12, device=torch.device(device))
    raw = RawBatch(*(tensor.cpu() for tensor in TrainLoader(split, spec).next()))
    for person in range(12):
        sample = sample_of_row(split, raw.records_NR[person, 0])
        fields = unpack_records(split.record(sample)[None])
        center, scale = fields.center_N2[0].astype(float), float(fields.scale_N[0])
        corner, end = princeton.box_corners(center, scale, 128)
        drawn = Draw(*raw.draws_ND[person].tolist())
        matrix = princeton.input_from_image(center, scale, drawn, 128)
        image = decode(split.picture(sample), "picture")
        shifted = geometry.translation(*-corner)[:2].astype(float)
        box = cv2.warpAffine(image, shifted, tuple(int(v) for v in end - corner))
        single = cv2.warpAffine(box, (matrix @ geometry.translation(*corner))[:2], (128, 128))
        expected = cv2.cvtColor(single, cv2.COLOR_BGR2RGB).astype(float)
        difference = np.abs(expected - raw.images_NHW3[person].numpy())
        assert difference.mean() <= 0.5 and np.percentile(difference, 99.9) <= 6
        np.testing.assert_allclose(raw.input_from_image_N23[person], matrix[:2], atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_crops_reach_torch_without_a_copy_and_channels_last(device, split):
    spec = make_spec("hrnet", device=torch.device(device))
    crops = DaliCrops(split, [[(i, 0) for i in range(4)]] * 9, spec, range(4))
    (output,) = crops.pipeline.run()
    raw = torch.from_dlpack(output.as_tensor())
    assert raw.data_ptr() == output.as_tensor().data_ptr()
    image = images_on_device(next(crops), raw.device)
    assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["newell", "none"])
def test_dali_agrees_with_opencv_on_raw_pictures_of_odd_sizes(preset, device, raw_split):
    sizes_N2 = unpack_records(raw_split.records()).size_N2
    assert (sizes_N2 % 2 == 1).any(axis=0).all() and (sizes_N2 % 2 == 0).any()
    spec = make_spec(preset, batch_size=12, device=torch.device(device))
    assert_loaders_agree(raw_split, spec, steps=2)


@pytest.mark.parametrize("device", DEVICES)
def test_dali_evaluates_raw_pictures_as_opencv_does(device, raw_split):
    crops, codec, samples = {}, make_codec("hrnet"), np.arange(len(raw_split))[::-1]
    for name, where in (("opencv", "cpu"), ("dali", device)):
        options = {"loader": name, "device": torch.device(where), "batch_size": 5, "workers": 1}
        batches = list(evaluation_batches(raw_split, samples, codec, **options))
        assert [len(batch.records_NR) for batch in batches] == [5, 5, 2]
        crops[name] = torch.cat([batch.images_NHW3.cpu() for batch in batches]).float()
    difference = (crops["opencv"] - crops["dali"]).abs()
    assert difference.mean() <= 0.5 and np.percentile(difference, 99.9) <= 6


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("how", [{}, {"shard_window": 1}, {"rank": 1, "world_size": 2}])
@pytest.mark.parametrize("shards", ["split", "raw_split"])
def test_dali_has_the_people_order_and_draws_of_opencv_at_any_step(shards, how, step, request):
    split, preset = request.getfixturevalue(shards), "newell" if shards == "raw_split" else "hrnet"
    specs = [make_spec(preset, loader, batch_size=5, seed=3, **how) for loader in LOADERS]
    dali, opencv = (TrainLoader(split, spec, step) for spec in specs)
    for _ in range(4):
        (image, *facts), (expected, *others) = dali.next(), opencv.next()
        assert all(map(torch.equal, facts, others))
        assert (image.float() - expected.float()).abs().mean() <= 0.5


GPU_MESSAGE = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "dali_loader.py", line 1, in _graph

encountered:

Can't allocate 5368709120 bytes on device 0.
Current pipeline object is no longer valid."""
"""As CUDABadAlloc of DALI 2.4 has it (include/dali/core/cuda_error.h)."""


def refuse(*_):
    raise RuntimeError(GPU_MESSAGE)


def test_dali_gives_one_error_if_memory_for_crops_is_missing(split, monkeypatch):
    """Crops of 300 TB, which no machine can allocate. No picture is suspected."""
    monkeypatch.setattr(dali_loader, "_faults", lambda *_: pytest.fail("a culprit is searched"))
    loader = TrainLoader(split, make_spec("hrnet", input_px=10_000_000))
    with pytest.raises(InputError, match=r"not enough memory \(std::bad_alloc\)") as caught:
        loader.next()
    assert "data.batch_size" in caught.value.next_step
    assert not isinstance(caught.value, BadSamplesError)


def test_a_gpu_memory_error_says_how_much_was_free(split, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (312_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pipeline = SimpleNamespace(device_id=0, run=refuse, prefetch_queue_depth=2, max_batch_size=64)
    crops = DaliCrops(split, [], make_spec("hrnet"), [])
    monkeypatch.setattr(crops, "pipeline", pipeline)
    with pytest.raises(InputError) as caught:
        next(crops)
    assert caught.value.where == "DALI on cuda:0"
    assert caught.value.found.endswith(
        "(Can't allocate 5368709120 bytes on device 0.; 312 MB of 80,000 MB are free)"
    )


@pytest.mark.gpu
def test_a_full_gpu_gives_one_error_of_dali(split):
    free_bytes, _ = torch.cuda.mem_get_info()
    held = torch.empty(free_bytes - (1 << 30), dtype=torch.uint8, device="cuda")
    spec = make_spec("hrnet", input_px=2048, batch_size=256, device=torch.device("cuda"))
    with pytest.raises(InputError, match=r"not enough memory .* MB are free"):
        TrainLoader(split, spec).next()
    del held


def test_dali_names_the_tar_and_sample_of_a_picture_that_does_not_decode(tiny_shards, tmp_path):
    folder = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2)
    loader = TrainLoader(ShardSet(folder), make_spec("none", batch_size=5))
    with pytest.raises(InputError, match=r"00000\.tar: sample 2"):
        loader.next()
