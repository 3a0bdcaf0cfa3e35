"""The picture of a batch shows what the network is given; the summary counts what was packed."""

import cv2
import numpy as np
import pytest
import torch
from helpers import make_codec, make_spec, repeat_draws

from common.errors import InputError
from configs.skeleton import MPII
from evaluation.visualize import LEFT_BGR, MIDDLE_BGR, RIGHT_BGR
from pipelines.augment import PRESETS
from pipelines.loader import Batch, TrainLoader
from pipelines.shards import ShardSet
from tools import show_batch

RIGHT_WRIST, LEFT_WRIST, HEAD_TOP = 10, 15, 9
CPU = torch.device("cpu")


def call(*words: object) -> None:
    show_batch.main([str(word) for word in words])


def test_a_sheet_is_written(tiny_shards, tmp_path, capsys):
    output = tmp_path / "deep" / "sheet.png"
    words = ["--data.shards", tiny_shards, "--people", 5, "--data.input_px", 64, "--output", output]
    call(*words, "--data.preset", "newell")
    sheet = cv2.imread(str(output))
    assert min(sheet.shape[:2]) > 500 and sheet.std() > 30
    assert capsys.readouterr().out == f"wrote {output}\n"


@pytest.mark.parametrize("preset", ["hrnet", "princeton"])
def test_both_loaders_are_compared_on_the_same_draws(preset, tiny_shards, tmp_path, capsys):
    pytest.importorskip("nvidia.dali")
    words = ["--data.shards", tiny_shards, "--people", 3, "--data.preset", preset, "--both_loaders"]
    call(*words, "--output", tmp_path / "both.png")
    printed = float(capsys.readouterr().out.split("colours: ")[1].split()[0])
    split = ShardSet(tiny_shards / "train")
    raw = TrainLoader(split, make_spec(preset, input_px=256, batch_size=3)).next()
    twin = repeat_draws(split, raw, PRESETS[preset])
    expected = (twin.images_NHW3.float() - raw.images_NHW3).abs().mean().item()
    assert printed == pytest.approx(expected, abs=1e-4)
    assert printed < 0.5 or preset == "princeton"


def one_person(joint: int, at_xy: tuple[float, float]) -> Batch:
    """A grey crop of 64 px with one joint, heatmap px."""
    joints, drawn = torch.zeros(1, 16, 2), torch.zeros(1, 16, dtype=torch.bool)
    joints[0, joint], drawn[0, joint] = torch.tensor(at_xy), True
    heat = torch.zeros(1, 16, 16, 16)
    heat[0, joint, int(at_xy[1]), int(at_xy[0])] = 1.0
    return Batch(torch.full((1, 3, 64, 64), 0.5), heat, joints, drawn, ~drawn, torch.zeros(1))


@pytest.mark.parametrize(
    ("joint", "color"),
    [(RIGHT_WRIST, RIGHT_BGR), (LEFT_WRIST, LEFT_BGR), (HEAD_TOP, MIDDLE_BGR)],
)
def test_a_joint_is_drawn_at_its_place_in_the_colour_of_its_side(joint, color):
    batch = one_person(joint, (3.0, 10.0))
    codec = make_codec("none")
    crop = show_batch.draw_crop(batch, codec, 0)
    drawn = np.argwhere((crop != 128).any(axis=2))
    # The middle of heatmap pixel 3 of 16 is at 3.5 / 16 of the tile, which begins at -0.5.
    np.testing.assert_allclose(drawn.mean(axis=0), [10.5 * 16 - 0.5, 3.5 * 16 - 0.5], atol=0.3)
    assert crop[167, 55].tolist() == list(color)
    maps = show_batch.draw_heatmaps(batch, MPII, 0)
    assert maps[160:176, 48:64].reshape(-1, 3).tolist() == [[min(c + 45, 255) for c in color]] * 256
    assert maps[100, 100].tolist() == [45, 45, 45]


@pytest.mark.parametrize(
    "words", ["--output x.jpg", "--data.input_px 100", "--people 0", "--config nowhere.yaml"]
)
def test_a_wrong_option_is_named(words, tiny_shards):
    option, value = words.split()
    with pytest.raises(InputError, match=rf"{option.strip('-')}|{value}"):
        call("--data.shards", tiny_shards, option, value)
