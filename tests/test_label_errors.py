"""Wrong annotations are ranked before right ones, by networks that were not trained on them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, people_at

from common.errors import InputError
from configs.skeleton import MPII
from evaluation import label_errors
from evaluation.inference import Predictions
from pipelines.shards import ShardSet
from tools import find_label_errors


def test_the_ratio_of_a_joint_worked_by_hand():
    """Near or far from a label where it is expected with 0.9, by chance with 0.1; and unmarked."""
    found = label_errors._elsewhere(np.array([[0.05, 0.2, np.nan]]), np.full((1, 3), 0.9))
    np.testing.assert_allclose(found, [[np.log(0.1 / 0.9), np.log(0.9 / 0.1), 0]])


def test_made_errors_of_each_kind_come_first_in_their_kind():
    """300 people in boxes of 200 px; 85 % of the predictions are within 10 px of the true joint."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(10, 190, (300, 16, 2))
    is_far = rng.uniform(size=(300, 16)) < 0.15
    keypoints = truth + rng.uniform(-7, 7, truth.shape)
    keypoints[is_far] = rng.uniform(10, 190, (is_far.sum(), 2))
    labels = truth.copy()
    swapped, one, other = np.arange(10), np.arange(10, 20), np.arange(20, 30)
    labels[swapped] = truth[swapped][:, list(MPII.flip_indices)]
    labels[one, 3] = (truth[one, 3] + 100 - 10) % 180 + 10  # 80 px or more away on both axes
    labels[other] = truth[other + 100]
    found = Predictions(keypoints, np.where(is_far, 0.3, 0.7) + rng.normal(0, 0.05, is_far.shape))
    ranked = label_errors.label_errors_of(found, people_at(labels), MPII)
    first = np.argsort(-ranked.ratios_NK, axis=0)
    assert set(first[:10, 0]) == set(swapped) and set(first[:10, 2]) == set(other)
    assert set(first[:7, 1]) < set(one)  # for two of them the prediction of joint 3 is far as well
    assert (ranked.joint_N[one] == 3).all() and is_far[one, 3].sum() == 2
    assert (ranked.kind_N[swapped] == 0).all() and (ranked.kind_N[other] == 2).all()
    assert set(ranked.order[:20]) == {*swapped, *other}


def run(shards: Path, output: Path, *more: object) -> list[dict[str, str]]:
    """Run the program on a tiny network; returns the lines of its CSV."""
    words = ["--data.shards", shards, "--output", output, *SMALL, *more]
    find_label_errors.main([*map(str, words)])
    return list(csv.DictReader((output / "label_errors.csv").open()))


def test_every_person_is_predicted_by_a_network_of_the_other_tars(tiny_shards, tmp_path):
    options = ("--train.steps", 2, "--heatmaps.sigma", 4)
    lines = run(tiny_shards, tmp_path / "a", *options)
    people = ShardSet(tiny_shards / "train").people()[0]
    assert sorted(int(line["row"]) for line in lines) == list(range(12))
    assert all(line["image"] == people.images[int(line["row"])] for line in lines)
    ratios = [float(line["score"]) for line in lines]
    assert ratios == sorted(ratios, reverse=True)
    assert all(line[line["kind"]] == line["score"] for line in lines)
    folds = [(tmp_path / "a" / f"fold_{i}" / "metrics.jsonl").read_text() for i in range(3)]
    assert all('"kind": "valid"' in log for log in folds)
    assert len(json.loads((tmp_path / "a" / "predictions.json").read_text())) == 12
    assert '"first_galleries":["left and right' in (tmp_path / "a" / "index.html").read_text()
    again = run(tiny_shards, tmp_path / "b", "--predictions", tmp_path / "a" / "predictions.json")
    assert again == lines


def test_the_folds_share_no_person(tiny_shards, tmp_path):
    shards, seen = ShardSet(tiny_shards / "train"), []
    for fold in range(2):
        folder = tmp_path / str(fold)
        folder.mkdir()
        find_label_errors.link_fold(shards, fold, 2, folder)
        train, valid = (set(ShardSet(folder / split).keys) for split in ("train", "valid"))
        assert not train & valid and train | valid == set(shards.keys)
        seen.append(valid)
    assert [len(valid) for valid in seen] == [7, 5] and not seen[0] & seen[1]


def test_more_folds_than_tars_and_several_data_sets_are_refused(tiny_shards, tmp_path):
    with pytest.raises(InputError, match="smaller --people-per-shard"):
        run(tiny_shards, tmp_path, "--folds", 4)
    config = tmp_path / "two.yaml"
    config.write_text(f"data: {{shards: {{{tiny_shards}: 1, {tmp_path}: 2}}}}\n")
    with pytest.raises(InputError, match="one data set"):
        find_label_errors.main(["--config", str(config), "--output", str(tmp_path)])
    with pytest.raises(InputError, match=r"required: output"):
        find_label_errors.main(["--folds", "3"])
