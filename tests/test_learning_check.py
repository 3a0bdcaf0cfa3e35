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


def check_of(mean_pose_pck: float, steps: int) -> LearningCheck:
    check = LearningCheck(people_at(np.full((2, 1, 2), 100.0)), steps)
    check.mean_pose_pck = mean_pose_pck
    return check


@pytest.mark.parametrize(
    "mean_pose_pck, steps, series, words",
    [
        (0.115, 800, DEMO, ""),
        (0.115, 800, DEMO_EXCHANGED, "labels and pictures belong together"),
        (0.115, 600, DEMO_FAST, "divide optim.lr by ten"),
        (0.042, 10_000, LSPET, ""),
        (0.042, 10_000, LSPET_EXCHANGED, "labels and pictures belong together"),
        (0.042, 10_000, LSPET_FAST, "almost only zeros"),
        (0.1, 4_000, [(999, 0.0, 0.2), (2_000, 0.0, 0.2)], "labels and pictures belong together"),
        (0.8, 2_000, [(1_000, 0.88, 0.5), (2_000, 0.88, 0.5)], ""),  # aligned faces
    ],
)
def test_the_last_validation_of_a_bad_run_warns_and_no_other(mean_pose_pck, steps, series, words):
    check = check_of(mean_pose_pck, steps)
    *before, last = [check.check_validation(*each) for each in series]
    assert before == [""] * (len(series) - 1)
    assert words in last and bool(words) == bool(last)


def test_the_mean_pose_and_the_joints_inside_of_the_boxes_are_counted():
    """Boxes from 0 to 200 px. Half of the joints of each of the 4 people are the same; the others
    are 40 px from their mean, which is 4 lengths; 5 of the 8 are outside."""
    joints = np.array([[[50, 50], [x, 100]] for x in (10, 90, 10, 90)], dtype=float)
    assert LearningCheck(people_at(joints), 100).mean_pose_pck == 0.5
    joints[:, 1, 1] = 300
    joints[0, 0, 0] = -1
    check = LearningCheck(people_at(joints), 100)
    assert "only 38 % of the joints" in check.check_labels()[0]
    assert LearningCheck(people_at(np.full((2, 1, 2), 200.0)), 100).check_labels() == []


def test_a_real_run_that_hardly_uses_the_pictures_is_told(tiny_shards, tmp_path, capsys):
    """Pictures of noise; two validations, so that the second can show that nothing grows."""
    options = {"steps": 8, "steps_per_epoch": 4}
    trainer = make_trainer(tiny_config(tiny_shards, train=options), tmp_path)
    assert trainer.learning.mean_pose_pck < 0.2
    trainer.learning.mean_pose_pck = 0.2
    trainer.train()
    told = [line for line in capsys.readouterr().err.splitlines() if "hardly uses" in line]
    assert len(told) >= 1 and told[-1].startswith("step 8: WARNING")
