"""Crops, outputs, losses and predictions of princeton-vl's own code, for 15 people."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.mpii import MPII
from evaluation.inference import evaluation_batches, predict
from model import princeton as weights
from model.loss import stack_losses
from pipelines import heatmaps, princeton
from pipelines.annotations import read_annotations
from pipelines.augment import preset_of
from pipelines.batches import Target
from pipelines.opencv_crops import LooseImages
from training import checkpoint

TARGET = Target(preset_of("princeton", True), "princeton", 1.0, 256, MPII)
PEOPLE = 15
COUNTS = {"mpii_sample": 9, "lspet": 6}
# Joints without a positive peak, or whose two highest values or quarter steps tie within 2e-6.
LEFT_OUT = {"mpii_sample": 9, "lspet": 4}


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden" / "inference.npz"))


@pytest.fixture(scope="module")
def network(shared):
    path = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    return checkpoint.evaluation_network(checkpoint.load(path), path)


@pytest.fixture(scope="module")
def crops(shared, golden) -> np.ndarray:
    """(15, 256, 256, 3) float64 RGB in 0..255."""
    found = []
    for row in range(PEOPLE):
        dataset, name = str(golden["dataset"][row]), _text(golden["imgname"][row])
        image = cv2.imread(str(_images(shared, dataset) / name))
        crop = princeton.crop(image, golden["center"][row], float(golden["scale"][row]), 256)
        found.append(crop[..., ::-1])
    return np.stack(found)


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _images(shared: Path, dataset: str) -> Path:
    return shared / "data" / ("lspet" if "lsp" in dataset else "mpii_sample") / "images"


def _input(crops: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(crops / 255).float().permute(0, 3, 1, 2)


def test_float_crops_of_all_15_boxes_are_equal(crops, golden):
    assert len(golden["crops_every_4th_pixel"]) == PEOPLE
    np.testing.assert_allclose(crops[:, ::4, ::4], golden["crops_every_4th_pixel"], atol=1e-3)


@torch.no_grad()
def test_outputs_are_equal(network, crops, golden):
    heat = network(_input(crops)).numpy()
    np.testing.assert_allclose(heat[:4, -1], golden["output_last_stack"], atol=1e-5)
    np.testing.assert_allclose(heat.mean(axis=(3, 4)), golden["output_mean"], atol=1e-5)
    np.testing.assert_allclose(np.abs(heat).max(axis=(3, 4)), golden["output_absmax"], atol=1e-5)


@torch.no_grad()
def test_losses_are_equal(network, crops, golden):
    joints = torch.from_numpy(golden["target_keypoints"])
    drawn = torch.ones(joints.shape[:2])
    target = heatmaps.render(joints, drawn, 64, "princeton", 1.0)
    heat = network(_input(crops))
    mine = [stack_losses(heat[i : i + 1], target[i : i + 1], drawn, "empty") for i in range(PEOPLE)]
    np.testing.assert_allclose(torch.stack(mine).numpy(), golden["eval_loss"], atol=1e-5)


@torch.no_grad()
def _margins(network, crops) -> np.ndarray:
    """(15, 16) how far each joint is from being decoded otherwise; 0 without a positive peak."""
    from evaluation.inference import last_heatmaps

    heat = last_heatmaps(network, _input(crops), TARGET, flip=True)
    peaks = torch.where(torch.nn.functional.max_pool2d(heat, 3, 1, 1) == heat, heat, 0).flatten(2)
    (best, second), index = peaks.topk(2, dim=2).values.unbind(2), peaks.argmax(dim=2)
    padded = torch.nn.functional.pad(heat, (1, 1, 1, 1), mode="replicate")
    x, y = index % 64 + 1, index // 64 + 1
    n, j = torch.meshgrid(torch.arange(PEOPLE), torch.arange(16), indexing="ij")
    steps = [
        (padded[n, j, y, x + 1] - padded[n, j, y, x - 1]).abs(),
        (padded[n, j, y + 1, x] - padded[n, j, y - 1, x]).abs(),
    ]
    margin = torch.stack([best - second, *steps]).amin(dim=0)
    return torch.where(best > 0, margin, 0).numpy()


@pytest.mark.parametrize("data", ["mpii_sample", "lspet"])
def test_predictions_are_equal_to_the_pixel(data, network, crops, golden, shared):
    """The whole way from the annotation file: only joints that hang on rounding are left out."""
    people, _ = read_annotations(shared / "golden" / f"annot_{data}.h5", "valid")
    source = LooseImages(people, shared / "data" / data / "images")
    batches = evaluation_batches(source, np.arange(people.count), TARGET, 4, workers=0, pin=False)
    found = predict(
        network, batches, TARGET, flip=True, device=torch.device("cpu"), dtype=torch.float32
    )
    rows = [i for i in range(PEOPLE) if ("lsp" in str(golden["dataset"][i])) == (data == "lspet")]
    assert len(rows) == people.count == COUNTS[data]
    expected = golden["predictions"][rows]
    clear = _margins(network, crops)[rows] > 2e-6
    np.testing.assert_array_equal(found.keypoints_NJ2[clear], expected[clear][:, :2])
    np.testing.assert_allclose(found.scores_NJ, expected[..., 2], atol=1e-5)
    assert int((~clear).sum()) == LEFT_OUT[data]


def test_any_prefix_is_read_and_dead_layers_are_dropped(shared):
    path = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    raw = torch.load(path, weights_only=True)
    first = weights.find_state_dict(raw)
    assert first is not None and len(first) == 742
    for prefix in ("model.", "module.", ""):
        again = weights.find_state_dict({"state_dict": {prefix + k: v for k, v in first.items()}})
        assert again is not None and again.keys() == first.keys()
    mine = weights.our_weights(first)
    assert len(mine) == 742 - 58  # 29 dead layers, each with a weight and a bias
    assert weights.size_of(mine) == (2, 48, 4, (64, 128, 128), 16)


def test_another_kind_of_network_is_refused(tmp_path):
    torch.save({"state_dict": {"pre.0.conv.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="differs from princeton-vl's"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_run_cannot_be_resumed_from_weights_alone(shared):
    import train
    from training.runtime import Runtime

    path = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    with pytest.raises(InputError, match="--init_from"):
        train.open_folder(Path("nowhere"), str(path), Runtime(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]
