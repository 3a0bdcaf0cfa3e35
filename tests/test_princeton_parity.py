"""Crops, outputs, losses and predictions of princeton-vl's own code, for 15 people."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import CPU, give_biases, make_codec, make_trainer, new_network, steps, tiny_config
from torch.nn import functional

import evaluate
from common.errors import InputError
from configs.skeleton import MPII
from evaluation.inference import last_heatmaps, predict
from model import checkpoint
from model.foreign_checkpoints import fold_biases, read_foreign
from model.hourglass import StackedHourglass
from model.loss import stack_losses
from pipelines import heatmaps, princeton
from pipelines.annotations import read_annotations
from pipelines.codec import codec_of
from pipelines.loader import evaluation_batches
from pipelines.opencv_loader import LooseImages
from tools import convert_checkpoint
from training.resume import load_resumable
from training.train_step import TrainStep

CODEC = make_codec("princeton", "princeton", 256)
PEOPLE = 15
SIZE = {"stacks": 2, "width": 48, "depth": 4, "stem": [64, 128, 128]}
DATA = ["mpii_sample", pytest.param("lspet", marks=pytest.mark.slow)]
COUNTS = {"mpii_sample": 9, "lspet": 6}
# Joints without a positive peak, or whose two highest values or quarter steps tie within 2e-6.
LEFT_OUT = {"mpii_sample": 9, "lspet": 4}


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden" / "inference.npz"))


@pytest.fixture(scope="module")
def golden_path(shared) -> Path:
    return shared / "golden" / "seed_2hg_dim48_checkpoint.pt"


@pytest.fixture(scope="module")
def network(golden_path):
    return checkpoint.evaluation_network(checkpoint.load_checkpoint(golden_path))


@pytest.fixture(scope="module")
def crops(shared, golden) -> np.ndarray:
    """(15, 256, 256, 3) float64 RGB in 0..255."""
    found = []
    for row in range(PEOPLE):
        folder = "lspet" if "lsp" in str(golden["dataset"][row]) else "mpii_sample"
        image = cv2.imread(str(shared / "data" / folder / "images" / _text(golden["imgname"][row])))
        crop = princeton.crop(image, golden["center"][row], float(golden["scale"][row]), 256)
        found.append(crop[..., ::-1])
    return np.stack(found)


@pytest.fixture(scope="module")
def heat(network, crops) -> torch.Tensor:
    """Heatmaps of all stacks."""
    with torch.no_grad():
        return network(_input(crops))


@pytest.fixture(scope="module")
def margins(network, crops) -> np.ndarray:
    """(15, 16) how far each joint is from being decoded otherwise; 0 without a positive peak."""
    with torch.no_grad():
        heat = last_heatmaps(network, _input(crops), CODEC, flip=True)
    peaks = torch.where(functional.max_pool2d(heat, 3, 1, 1) == heat, heat, 0).flatten(2)
    (best, second), index = peaks.topk(2, dim=2).values.unbind(2), peaks.argmax(dim=2)
    padded = functional.pad(heat, (1, 1, 1, 1), mode="replicate")
    x, y = index % 64 + 1, index // 64 + 1
    n, j = torch.meshgrid(torch.arange(PEOPLE), torch.arange(16), indexing="ij")
    steps = [
        (padded[n, j, y, x + 1] - padded[n, j, y, x - 1]).abs(),
        (padded[n, j, y + 1, x] - padded[n, j, y - 1, x]).abs(),
    ]
    margin = torch.stack([best - second, *steps]).amin(dim=0)
    return torch.where(best > 0, margin, 0).numpy()


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _input(crops: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(crops / 255).float().permute(0, 3, 1, 2)


def _rows(golden, data: str) -> list[int]:
    return [i for i in range(PEOPLE) if ("lsp" in str(golden["dataset"][i])) == (data == "lspet")]


def run(program, *words: object) -> None:
    program.main([*map(str, words)])


def test_float_crops_of_all_15_boxes_are_equal(crops, golden):
    assert len(golden["crops_every_4th_pixel"]) == PEOPLE
    np.testing.assert_allclose(crops[:, ::4, ::4], golden["crops_every_4th_pixel"], atol=1e-3)


def test_outputs_are_equal(heat, golden):
    heat = heat.numpy()
    np.testing.assert_allclose(heat[:4, -1], golden["output_last_stack"], atol=1e-5)
    np.testing.assert_allclose(heat.mean(axis=(3, 4)), golden["output_mean"], atol=1e-5)
    np.testing.assert_allclose(np.abs(heat).max(axis=(3, 4)), golden["output_absmax"], atol=1e-5)


def test_losses_are_equal(heat, golden):
    joints = torch.from_numpy(golden["target_keypoints"])
    drawn = torch.ones(joints.shape[:2])
    target = heatmaps.render(joints, drawn, 64, "princeton", 1.0)
    mine = [stack_losses(heat[i : i + 1], target[i : i + 1], drawn) for i in range(PEOPLE)]
    np.testing.assert_allclose(torch.stack(mine).numpy(), golden["eval_loss"], atol=1e-5)


@pytest.mark.parametrize("data", DATA)
def test_predictions_are_equal_to_the_pixel(data, network, margins, golden, shared):
    """The whole way from the annotation file: only joints that hang on rounding are left out."""
    people, _ = read_annotations(shared / "golden" / f"annot_{data}.h5", "valid")
    source = LooseImages(people, shared / "data" / data / "images")
    batches = evaluation_batches(
        source, np.arange(people.count), CODEC, loader="opencv", device=CPU.device,
        batch_size=4, workers=0,
    )  # fmt: skip
    found = predict(network, batches, CODEC, flip=True, device=CPU.device, dtype=CPU.dtype)
    rows = _rows(golden, data)
    assert len(rows) == people.count == COUNTS[data]
    expected = golden["predictions"][rows]
    clear = margins[rows] > 2e-6
    np.testing.assert_array_equal(found.keypoints_NJ2[clear], expected[clear][:, :2])
    np.testing.assert_allclose(found.scores_NJ, expected[..., 2], atol=1e-5)
    assert int((~clear).sum()) == LEFT_OUT[data]


def test_evaluate_on_its_checkpoint_gives_its_predictions(
    golden_path, margins, golden, shared, tmp_path, capsys
):
    """evaluate.py on the checkpoint as its train.py wrote it; the batch size is free."""
    run(evaluate, "--checkpoint", golden_path, "--crop", "princeton",
        "--annotations", shared / "golden" / "annot_mpii_sample.h5",
        "--images", shared / "data" / "mpii_sample" / "images",
        "--save-predictions", tmp_path / "OUT.json", "--device", "cpu", "--workers", 0)  # fmt: skip
    assert "note:" not in capsys.readouterr().out  # trained and evaluated alike
    entries = json.loads((tmp_path / "OUT.json").read_text())
    rows = _rows(golden, "mpii_sample")
    found = np.array([entry["keypoints"] for entry in entries])
    assert found.shape == (9, 16, 3)
    clear = margins[rows] > 1e-5
    assert (~clear).sum() <= 12
    np.testing.assert_array_equal(found[clear][:, :2], golden["predictions"][rows][clear][:, :2])


def test_any_prefix_is_read_and_dead_layers_are_dropped(golden_path):
    raw = torch.load(golden_path, weights_only=True)
    first = {k.removeprefix("model.module."): v for k, v in raw["state_dict"].items()}
    assert len(first) == 742
    for prefix in ("model.", "module.", ""):
        found = read_foreign({prefix + k: v for k, v in first.items()}, golden_path)
        assert found is not None
        # 29 dead layers, each with a weight and a bias; 65 biases before batch norms
        assert len(found.weights) == 742 - 58 - 65
        size = found.config.model
        assert (size.stacks, size.width, size.depth, size.stem) == (2, 48, 4, (64, 128, 128))


def test_a_damaged_or_partial_checkpoint_of_its_kind_is_refused(golden_path, tmp_path):
    raw = torch.load(golden_path, weights_only=True)
    first = next(iter(raw["state_dict"]))
    moments = {**raw["optimizer"], "state": {0: {"exp_avg": torch.zeros(1)}}}
    for change, match in (
        ({"state_dict": {"pre.0.conv.weight": torch.zeros(64, 3, 7, 7)}}, "format"),
        ({"state_dict": raw["state_dict"] | {first: torch.zeros(3)}}, "format"),
        ({"epoch": float("inf")}, "epoch inf"),
        ({"optimizer": moments}, "an optimizer of other weights"),
    ):
        torch.save({**raw, **change}, tmp_path / "x.pt")
        with pytest.raises(InputError, match=match):
            checkpoint.load_checkpoint(tmp_path / "x.pt")
    torch.save({"state_dict": raw["state_dict"]}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="--init_from"):
        load_resumable(tmp_path / "weights.pt")


def test_weights_and_adam_state_come_back_as_they_were(golden_path, crops, tmp_path, capsys):
    """Through the program, to our format and back."""
    for source, target, to in (
        (golden_path, tmp_path / "native.pt", "native"),
        (tmp_path / "native.pt", tmp_path / "theirs.pt", "princeton"),
    ):
        run(convert_checkpoint, source, target, "--to", to)
        assert "with optimizer state" in capsys.readouterr().out
    raw, again = (torch.load(p, weights_only=True) for p in (golden_path, tmp_path / "theirs.pt"))
    assert list(again["state_dict"]) == list(raw["state_dict"])
    kept = 0
    for name, tensor in raw["state_dict"].items():
        assert again["state_dict"][name].shape == tensor.shape
        kept += torch.equal(again["state_dict"][name], tensor)
    # Not kept: dead layers and biases, which are zero, and 65 running means.
    assert kept == 742 - 58 - 2 * 65
    assert again["epoch"] == raw["epoch"] == 3
    theirs, mine = raw["optimizer"], again["optimizer"]
    assert len(theirs["state"]) == 396 and len(mine["state"]) == 396 - 65
    for place, moments in mine["state"].items():
        assert torch.equal(theirs["state"][place]["exp_avg"], moments["exp_avg"])
    params = [state["param_groups"][0]["params"] for state in (theirs, mine)]
    assert params == [list(range(454))] * 2
    (first, _), (second, adam) = map(plain_network, (golden_path, tmp_path / "theirs.pt"))
    heat = [network.eval()(_input(crops[:1]).double()) for network in (first, second)]
    torch.testing.assert_close(heat[1], heat[0], atol=1e-5, rtol=0)
    heat[1].square().mean().backward()
    adam.step()  # its Adam continues
    with pytest.raises(InputError, match="a new name"):
        run(convert_checkpoint, golden_path, tmp_path / "native.pt", "--to", "native")


def live_names(path: Path) -> list[str]:
    """Names in its file without the skip layers that are never used: those that keep the width."""
    weights = torch.load(path, weights_only=True)["state_dict"]
    square = {n for n, t in weights.items() if t.dim() == 4 and t.shape[0] == t.shape[1]}
    dead = {n.removesuffix("weight") for n in square if ".skip_layer." in n}
    return [name for name in weights if not name.startswith(tuple(dead))]


def plain_network(path: Path) -> tuple[StackedHourglass, torch.optim.Adam]:
    """Its network with all biases, in torch's own batch norms, and Adam's state, by order alone."""
    raw, live = torch.load(path, weights_only=True), live_names(path)
    network = give_biases(new_network(2, 48, 16)).double()
    own = list(network.state_dict())
    assert len(own) == len(live) == 742 - 58
    network.load_state_dict({n: raw["state_dict"][t] for n, t in zip(own, live, strict=True)})
    parameters = [name for name in raw["state_dict"] if "running_" not in name]
    parameters = [name for name in parameters if "num_batches_tracked" not in name]
    numbers = [parameters.index(name) for name in live if name in parameters]
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=False, fused=False)
    group = {**raw["optimizer"]["param_groups"][0], "lr": 1e-3, "params": list(range(len(numbers)))}
    saved = raw["optimizer"]["state"]
    state = {n: saved[number] for n, number in enumerate(numbers) if number in saved}
    adam.load_state_dict({"state": state, "param_groups": [group]})
    return network, adam


def test_one_step_of_adam_from_the_checkpoint_equals_plain_torch(golden_path, crops, golden):
    """Reading, loss, fused Adam and the check of gradients, against torch's own loop with biases.

    In float64, because a bias changes the rounding, and in float32 ReLUs and max pooling turn that
    into 0.2 % of a gradient.
    """
    loaded = checkpoint.load_checkpoint(golden_path)
    config = loaded.config
    images = _input(crops[:2]).double()
    joints = torch.from_numpy(golden["target_keypoints"][:2])
    target = heatmaps.render(joints, torch.ones(2, 16), 64, "princeton", 1.0)

    plain, adam = plain_network(golden_path)
    biases_before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    heat = plain.train()(images).float()
    (((heat - target[:, None]) ** 2).mean(dim=(2, 3, 4)).mean()).backward()
    adam.step()

    mine = StackedHourglass(config.model, 16).double()
    mine.load_state_dict(loaded.weights)
    step = TrainStep(mine.train(), codec_of(config.data, config.heatmaps, MPII), config, CPU)
    # A fresh copy: torch's optimizers work on the very tensors that they are given.
    step.load_state(checkpoint.load_checkpoint(golden_path))
    stack_losses(mine(images), target, torch.ones(2, 16)).mean().backward()
    assert not step._apply_gradients(torch.tensor(True))
    moved = 0.0
    theirs = dict(plain.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0, msg=name)
        moved = max(moved, (parameter - loaded.weights[name]).abs().max().item())
    assert moved > 1e-4, "nothing was trained"
    statistics = dict(mine.named_buffers())
    for name, expected in fold_biases({**plain.state_dict(), **biases_before}).items():
        if name in statistics:
            torch.testing.assert_close(statistics[name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_a_run_continues_from_its_checkpoint_with_optimizer_and_epoch(
    golden_path, tiny_shards, tmp_path
):
    config = tiny_config(tiny_shards, model=SIZE, train={"steps": 4000, "steps_per_epoch": 1000})
    trainer = make_trainer(config, tmp_path / "run", golden_path)
    assert trainer.progress.step == 3000
    first = next(iter(trainer.train_step.optimizer.state.values()))
    assert first["step"].item() == 12
    assert np.isfinite(steps(trainer, 1)).all() and first["step"].item() == 13
    remark = "data.preset princeton; this run continues with hrnet"
    assert any(remark in each for each in trainer.remarks)


@pytest.mark.parametrize(
    ("sections", "advice"),
    [({"model": {**SIZE, "width": 32, "stem": [64, 128, 64]}},
      "add --model.width 48 --model.stem [64,128,128]"),
     ({"model": SIZE, "train": {"steps": 10}}, "--train.steps 3010 for as many more")],
)  # fmt: skip
def test_options_that_do_not_fit_its_checkpoint_are_named(
    sections, advice, golden_path, tiny_shards, tmp_path
):
    with pytest.raises(InputError) as caught:
        make_trainer(tiny_config(tiny_shards, **sections), tmp_path / "run", golden_path)
    assert caught.value.next_step == advice


def test_a_network_that_its_code_cannot_build_is_not_written_for_it(tiny_shards, tmp_path):
    make_trainer(tiny_config(tiny_shards), tmp_path).save(["last.pt"])
    with pytest.raises(InputError, match=r"'stem': \(8, 16, 16\), 'depth': 2"):
        checkpoint.to_princeton(checkpoint.load_checkpoint(tmp_path / "last.pt"))
