"""Crops, outputs, losses and predictions of princeton-vl's own code, for 15 people."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_codec

from common.errors import InputError
from evaluation.inference import predict
from model import checkpoint
from model.foreign_checkpoints import read_foreign
from model.loss import stack_losses
from pipelines import heatmaps, princeton
from pipelines.annotations import read_annotations
from pipelines.loader import evaluation_batches
from pipelines.opencv_loader import LooseImages

CODEC = make_codec("princeton", "princeton", 256)
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
    return checkpoint.evaluation_network(checkpoint.load_checkpoint(path))


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

    heat = last_heatmaps(network, _input(crops), CODEC, flip=True)
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
    batches = evaluation_batches(
        source, np.arange(people.count), CODEC, loader="opencv", device=torch.device("cpu"),
        batch_size=4, workers=0,
    )  # fmt: skip
    found = predict(
        network, batches, CODEC, flip=True, device=torch.device("cpu"), dtype=torch.float32
    )
    rows = [i for i in range(PEOPLE) if ("lsp" in str(golden["dataset"][i])) == (data == "lspet")]
    assert len(rows) == people.count == COUNTS[data]
    expected = golden["predictions"][rows]
    clear = _margins(network, crops)[rows] > 2e-6
    np.testing.assert_array_equal(found.keypoints_NJ2[clear], expected[clear][:, :2])
    np.testing.assert_allclose(found.scores_NJ, expected[..., 2], atol=1e-5)
    assert int((~clear).sum()) == LEFT_OUT[data]


def test_the_command_of_the_readme_gives_its_predictions(
    network, crops, golden, shared, tmp_path, monkeypatch, capsys
):
    """evaluate.py on the checkpoint as its train.py wrote it; the batch size is free."""
    import json
    import sys

    import evaluate

    words = [
        "--checkpoint", shared / "golden" / "seed_2hg_dim48_checkpoint.pt", "--crop", "princeton",
        "--annotations", shared / "golden" / "annot_mpii_sample.h5", "--images",
        shared / "data" / "mpii_sample" / "images", "--save-predictions", tmp_path / "OUT.json",
        "--device", "cpu", "--workers", 0,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    assert "note:" not in capsys.readouterr().out  # trained and evaluated alike
    entries = json.loads((tmp_path / "OUT.json").read_text())
    rows = [i for i in range(PEOPLE) if "lsp" not in str(golden["dataset"][i])]
    found = np.array([entry["keypoints"] for entry in entries])
    assert found.shape == (9, 16, 3)
    clear = _margins(network, crops)[rows] > 1e-5
    assert (~clear).sum() <= 12
    np.testing.assert_array_equal(found[clear][:, :2], golden["predictions"][rows][clear][:, :2])


def test_any_prefix_is_read_and_dead_layers_are_dropped(shared):
    path = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    raw = torch.load(path, weights_only=True)
    first = {k.removeprefix("model.module."): v for k, v in raw["state_dict"].items()}
    assert len(first) == 742
    for prefix in ("model.", "module.", ""):
        found = read_foreign({prefix + k: v for k, v in first.items()}, path)
        assert found is not None
        assert len(found.weights) == 742 - 58  # 29 dead layers, each with a weight and a bias
        size = found.config.model
        assert (size.stacks, size.width, size.depth, size.stem) == (2, 48, 4, (64, 128, 128))


def test_another_kind_of_network_is_refused(tmp_path):
    torch.save({"state_dict": {"pre.0.conv.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="format"):
        checkpoint.load_checkpoint(tmp_path / "x.pt")


def test_an_epoch_that_is_no_number_is_refused(shared, tmp_path):
    raw = torch.load(shared / "golden" / "seed_2hg_dim48_checkpoint.pt", weights_only=True)
    torch.save({**raw, "epoch": float("inf")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="epoch inf"):
        checkpoint.load_checkpoint(tmp_path / "x.pt")


def test_a_run_cannot_be_resumed_from_weights_alone(shared, tmp_path):
    from training.resume import load_resumable

    raw = torch.load(shared / "golden" / "seed_2hg_dim48_checkpoint.pt", weights_only=True)
    torch.save({"state_dict": raw["state_dict"]}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="--init_from"):
        load_resumable(tmp_path / "weights.pt")


@pytest.fixture(scope="module")
def golden_path(shared) -> Path:
    return shared / "golden" / "seed_2hg_dim48_checkpoint.pt"


def test_weights_and_adam_state_come_back_as_they_were(golden_path, network):
    raw = torch.load(golden_path, weights_only=True)
    again = checkpoint.to_princeton(checkpoint.load_checkpoint(golden_path))
    assert list(again["state_dict"]) == list(raw["state_dict"])
    for name, tensor in raw["state_dict"].items():
        mine = again["state_dict"][name]
        assert mine.shape == tensor.shape
        if ".skip_layer." not in name:
            assert torch.equal(mine, tensor), name
    assert again["epoch"] == raw["epoch"] == 3
    assert again["optimizer"]["state"].keys() == raw["optimizer"]["state"].keys()
    assert len(again["optimizer"]["state"]) == 396
    for place, moments in raw["optimizer"]["state"].items():
        assert torch.equal(again["optimizer"]["state"][place]["exp_avg"], moments["exp_avg"])
    theirs, mine = (o["optimizer"]["param_groups"][0]["params"] for o in (raw, again))
    assert theirs == mine == list(range(454))


def test_one_step_of_adam_from_the_checkpoint_equals_plain_torch(golden_path, crops, golden):
    """Reading, loss, fused Adam and the guard against bad gradients, against torch's own loop."""
    from common.distributed import DistributedContext
    from configs.skeleton import MPII
    from pipelines.codec import codec_of
    from training.train_step import TrainStep

    loaded = checkpoint.load_checkpoint(golden_path)
    config = loaded.config
    images = _input(crops[:4])
    joints = torch.from_numpy(golden["target_keypoints"][:4])
    target = heatmaps.render(joints, torch.ones(4, 16), 64, "princeton", 1.0)

    plain = checkpoint.build_network(config, 16)
    plain.load_state_dict(loaded.weights)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3, foreach=False, fused=False)
    group = {**loaded.optimizer["param_groups"][0], "fused": False, "lr": 1e-3}
    adam.load_state_dict({**loaded.optimizer, "param_groups": [group]})
    heat = plain.train()(images)
    (((heat - target[:, None]) ** 2).mean(dim=(2, 3, 4)).mean()).backward()
    adam.step()

    mine = checkpoint.build_network(config, 16)
    mine.load_state_dict(loaded.weights)
    dist = DistributedContext(0, 1, torch.device("cpu"), torch.float32)
    step = TrainStep(mine.train(), codec_of(config.data, config.heatmaps, MPII), config, dist)
    # A fresh copy: torch's optimizers work on the very tensors that they are given.
    step.load_state(checkpoint.load_checkpoint(golden_path))
    stack_losses(mine(images), target, torch.ones(4, 16), "empty").mean().backward()
    assert not step._apply_gradients(torch.tensor(True))
    moved = 0.0
    for (name, a), b in zip(plain.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
        moved = max(moved, (a - loaded.weights[name]).abs().max().item())
    assert moved > 1e-4, "nothing was trained"


def test_a_run_continues_from_its_checkpoint_with_optimizer_and_epoch(
    golden_path, tiny_shards, tmp_path
):
    from helpers import make_trainer, steps, tiny_config

    state = checkpoint.load_checkpoint(golden_path)
    size = {"stacks": 2, "width": 48, "depth": 4, "stem": [64, 128, 128]}
    config = tiny_config(tiny_shards, model=size, train={"steps": 4000, "steps_per_epoch": 1000})
    run = make_trainer(config, tmp_path / "run", state)
    assert run.progress.step == 3000
    first = next(iter(run.train_step.optimizer.state.values()))
    assert first["step"].item() == 12
    assert np.isfinite(steps(run, 1)).all() and first["step"].item() == 13


def test_a_config_of_another_size_is_told_what_to_add(golden_path, tiny_shards, tmp_path):
    from helpers import make_trainer, tiny_config

    state = checkpoint.load_checkpoint(golden_path)
    size = {"stacks": 2, "width": 32, "depth": 4, "stem": [64, 128, 64]}
    with pytest.raises(InputError) as caught:
        make_trainer(tiny_config(tiny_shards, model=size), tmp_path / "run", state)
    assert caught.value.next_step == "add --model.width 48 --model.stem [64,128,128]"


def test_too_few_steps_and_another_preset_are_said(golden_path, tiny_shards, tmp_path):
    from helpers import make_trainer, tiny_config

    size = {"stacks": 2, "width": 48, "depth": 4, "stem": [64, 128, 128]}
    few = tiny_config(tiny_shards, model=size, train={"steps": 10})
    with pytest.raises(InputError, match=r"3000 steps that .* has done already"):
        make_trainer(few, tmp_path / "run", checkpoint.load_checkpoint(golden_path))
    config = tiny_config(tiny_shards, model=size, train={"steps": 4000})
    run = make_trainer(config, tmp_path / "run", checkpoint.load_checkpoint(golden_path))
    assert any("data.preset princeton; this run goes on with hrnet" in r for r in run.remarks)


def test_a_checkpoint_from_elsewhere_does_not_replace_a_run(golden_path, tmp_path):
    from training.resume import find_start

    folder = tmp_path / "run"
    folder.mkdir()
    assert find_start(folder, str(golden_path), False) == (str(golden_path), [])
    (folder / "last.pt").touch()
    with pytest.raises(InputError, match="a run of this name"):
        find_start(folder, str(golden_path), False)
    own = str(folder / "step_00000001.pt")
    assert find_start(folder, own, False) == (own, [])


def test_the_converter_goes_both_ways(golden_path, tmp_path, monkeypatch, capsys):
    import sys

    from tools import convert_checkpoint

    for source, target, to in (
        (golden_path, tmp_path / "native.pt", "native"),
        (tmp_path / "native.pt", tmp_path / "theirs.pt", "princeton"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", str(source), str(target), "--to", to])
        convert_checkpoint.main()
        assert "with optimizer state" in capsys.readouterr().out
    raw, again = (torch.load(p, weights_only=True) for p in (golden_path, tmp_path / "theirs.pt"))
    assert again["epoch"] == 3
    assert all(
        torch.equal(again["state_dict"][name], tensor)
        for name, tensor in raw["state_dict"].items()
        if ".skip_layer." not in name
    )
    with pytest.raises(InputError, match="a new name"):
        convert_checkpoint.main()


def test_a_network_that_its_code_cannot_build_is_not_written_for_it(tiny_shards, tmp_path):
    from helpers import make_trainer, tiny_config

    make_trainer(tiny_config(tiny_shards), tmp_path).save(["last.pt"])
    with pytest.raises(InputError, match=r"'stem': \(8, 16, 16\), 'depth': 2"):
        checkpoint.to_princeton(checkpoint.load_checkpoint(tmp_path / "last.pt"))


@pytest.mark.parametrize("data", ["mpii_sample", pytest.param("lspet", marks=pytest.mark.slow)])
def test_predict_finds_its_predictions_from_centre_and_scale(
    data, network, crops, golden, shared, tmp_path, monkeypatch
):
    """Its checkpoint as it is, through tools/predict.py; what hangs on rounding is left out."""
    import csv
    import json
    import sys

    from tools import predict

    rows = [i for i in range(PEOPLE) if ("lsp" in str(golden["dataset"][i])) == (data == "lspet")]
    with (tmp_path / "people.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "center_x", "center_y", "scale"])
        for i in rows:
            place = [*golden["center"][i], golden["scale"][i]]
            table.writerow([_text(golden["imgname"][i]), *map(float, place)])
    path = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    words = ["--checkpoint", path, "--people", tmp_path / "people.csv",
             shared / "data" / data / "images", "--save-predictions", tmp_path / "p.json",
             "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    predict.main()
    entries = json.loads((tmp_path / "p.json").read_text())
    assert len(entries) == COUNTS[data]
    found = np.array([entry["keypoints"] for entry in entries])
    expected = golden["predictions"][rows]
    clear = _margins(network, crops)[rows] > 2e-6
    np.testing.assert_array_equal(found[clear][:, :2], expected[clear][:, :2])
    np.testing.assert_allclose(found[..., 2], expected[..., 2], atol=1e-5)
    assert int((~clear).sum()) == LEFT_OUT[data]
