"""A run that is not learning is told, and a good one is not."""

import numpy as np
import pytest
from helpers import make_trainer, people_at, tiny_config

from training.learning_check import LearningCheck

# Measured on two CPU cores (docs/experiments.md): validations (step, PCK@0.5, mean peak) of runs of
# configs/demo.yaml on synthetic people and of configs/lspet_small.yaml at 64 px, without or with
# the pictures exchanged between people, or with 100 times the rate.
DEMO = [(200, 0.564, 0.346), (400, 0.840, 0.610), (600, 0.900, 0.714), (800, 0.917, 0.740)]
DEMO_EXCHANGED = [(200, 0.109, 0.149), (400, 0.158, 0.216), (600, 0.170, 0.240)]
DEMO_FAST = [(200, 0.146, 0.168), (400, 0.150, 0.210)]
LSPET = [(300, 0.065, 0.136), (600, 0.095, 0.159), (900, 0.098, 0.189), (1200, 0.108, 0.200)]
LSPET_EXCHANGED = [(300, 0.047, 0.115), (600, 0.062, 0.142), (900, 0.068, 0.156),
                   (1200, 0.069, 0.156)]  # fmt: skip
LSPET_FAST = [(300, 0.0, 0.039), (600, 0.0, 0.039), (900, 0.001, 0.040), (1200, 0.001, 0.040)]


def check_of(blind_pck: float, steps: int) -> LearningCheck:
    check = LearningCheck(people_at(np.full((2, 1, 2), 100.0)), steps)
    check.blind_pck = blind_pck
    return check


@pytest.mark.parametrize(
    "blind_pck, steps, series, words",
    [
        (0.115, 800, DEMO, ""),
        (0.115, 800, DEMO_EXCHANGED, "labels and pictures belong together"),
        (0.115, 600, DEMO_FAST, "divide optim.lr by ten"),
        (0.042, 10_000, LSPET, ""),
        (0.042, 10_000, LSPET_EXCHANGED, "labels and pictures belong together"),
        (0.042, 10_000, LSPET_FAST, "almost only zeros"),
        (0.8, 2_000, [(1_000, 0.88, 0.5), (2_000, 0.88, 0.5)], ""),  # aligned faces
    ],
)
def test_the_last_validation_of_a_bad_run_warns_and_no_other(blind_pck, steps, series, words):
    check = check_of(blind_pck, steps)
    *before, last = [check.of_validation(*each) for each in series]
    assert before == [""] * (len(series) - 1)
    assert words in last and bool(words) == bool(last)


def test_a_loss_that_rises_by_half_over_a_hundred_steps_warns():
    check = check_of(0.1, 1_000)
    falling = [check.of_loss(loss, 20) for loss in np.linspace(0.1, 0.01, 50)]
    noise = [check.of_loss(0.01 * factor, 20) for factor in (1.5, 1, 1.6, 1, 1)]
    undefined = check.of_loss(float("nan"), 100)
    rising = [check.of_loss(0.0185, 20) for _ in range(5)]
    assert not any([*falling, *noise, undefined, *rising[:4]])
    assert "lower optim.lr" in rising[4]


def test_the_mean_pose_and_the_joints_inside_of_the_boxes_are_counted():
    """Boxes from 0 to 200 px. Half of the joints of each of the 4 people are the same; the others
    are 40 px from their mean, which is 4 lengths; 5 of the 8 are outside."""
    joints = np.array([[[50, 50], [x, 100]] for x in (10, 90, 10, 90)], dtype=float)
    assert LearningCheck(people_at(joints), 100).blind_pck == 0.5
    joints[:, 1, 1] = 300
    joints[0, 0, 0] = -1
    check = LearningCheck(people_at(joints), 100)
    assert check.inside == 3 / 8
    assert "only 38 % of the validation's joints" in check.of_labels()[0]
    assert LearningCheck(people_at(np.full((2, 1, 2), 200.0)), 100).of_labels() == []


def test_a_real_run_whose_rate_is_too_high_is_told(tiny_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.learning_check._STEPS_OF_A_MEAN", 5)
    options = {"steps": 20, "steps_per_epoch": 20, "log_every": 5}
    for lr, name in ((1e-3, "good"), (30.0, "bad")):
        optim = {"lr": lr, "warmup_steps": 20}
        trainer = make_trainer(
            tiny_config(tiny_shards, train=options, optim=optim), tmp_path / name
        )
        trainer.train()
        assert ("the learning rate is probably too high" in capsys.readouterr().err) == (
            name == "bad"
        )
