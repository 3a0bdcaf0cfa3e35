"""Calibrated scores: the fit, its measures, and the table on its way from evaluation to use."""

import importlib.util
import json

import numpy as np
import pytest
from helpers import make_trainer, people_at, steps, tiny_config

import evaluate
from common.errors import InputError
from evaluation import calibration
from evaluation.inference import Predictions
from model.checkpoint import load_checkpoint
from tools import export_onnx, predict


def test_isotonic_pools_neighbours_in_the_wrong_order():
    assert calibration.isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1, 2.5, 2.5, 4]
    assert calibration.isotonic(np.array([3.0, 2.0, 1.0])).tolist() == [2, 2, 2]


def test_isotonic_is_scipys():
    optimize = pytest.importorskip("scipy.optimize", reason="no SciPy")
    rng = np.random.default_rng(0)
    for count in (1, 2, 10, 27):
        values = rng.normal(size=count)
        expected = optimize.isotonic_regression(values).x
        np.testing.assert_allclose(calibration.isotonic(values), expected, atol=1e-12)


def test_the_calibration_error_of_three_joints_worked_by_hand():
    """Two joints of 0.9, half of them right: 0.4 x 2/3; one of 0.1 that is wrong: 0.1 x 1/3."""
    found = calibration.calibration_error(np.array([0.9, 0.9, 0.1]), np.array([True, False, False]))
    assert found == pytest.approx(0.3)
    certain = calibration.calibration_error(np.array([1.0, 0.0]), np.array([True, False]))
    assert certain == 0.0


def test_the_risk_is_the_share_of_wrong_joints_among_the_best_scored():
    scores, correct = np.arange(200.0), np.arange(200) >= 50
    risk = calibration.risks(scores, correct)
    assert len(risk) == 100
    assert (risk[0], risk[74], risk[99]) == (0.0, 0.0, 0.25)
    assert risk[79] == pytest.approx(10 / 160)


def made_predictions(count: int) -> tuple[Predictions, object, np.ndarray]:
    """Peaks U(0, 1), correct with the probability peak^2 (joint 0) or peak / 2 (joint 1).

    A wrong joint is 1 length (10 px) off, in a box of 200 px.
    """
    rng = np.random.default_rng(1)
    scores_N2 = rng.uniform(size=(count, 2))
    truth_N2 = np.stack([scores_N2[:, 0] ** 2, scores_N2[:, 1] / 2], axis=1)
    is_wrong_N2 = rng.uniform(size=(count, 2)) >= truth_N2
    people = people_at(rng.uniform(50, 150, (count, 2, 2)))
    keypoints = people.joints + np.stack([10.0 * is_wrong_N2, np.zeros((count, 2))], axis=2)
    return Predictions(keypoints, scores_N2), people, truth_N2


def test_probabilities_and_expected_errors_follow_the_law_that_made_the_errors():
    found, people, truth_N2 = made_predictions(8000)
    table, facts = calibration.calibrate(found, people)
    inner = (found.scores_NJ > 0.1) & (found.scores_NJ < 0.9)  # tables end near 0.05
    # A bin's share has a standard error of 0.5 / sqrt(800) = 0.018; lines between knots add less.
    assert np.abs(table.probabilities(found.scores_NJ) - truth_N2)[inner].max() < 0.06
    expected = (1 - truth_N2) * 10 / 200
    assert np.abs(table.errors(found.scores_NJ) - expected)[inner].max() < 0.06 * 10 / 200
    assert (table.probabilities(np.zeros((1, 2))) == 0).all()
    assert (np.diff(table.probabilities_JK) >= 0).all() and (np.diff(table.errors_JK) <= 0).all()
    # E|peak - peak^2| = 1/6 and E|peak - peak / 2| = 1/4 of the two joints, mixed in the bins.
    assert facts["calibration_error"]["before"] == pytest.approx((1 / 6 + 1 / 4) / 2, abs=0.02)
    assert facts["calibration_error"]["after"] < 0.02
    assert facts["risk"]["after"][-1] == pytest.approx(1 - truth_N2.mean(), abs=0.01)
    assert np.mean(facts["risk"]["after"]) < np.mean(facts["risk"]["before"])


def test_a_fold_is_measured_with_a_table_of_the_other_people():
    """Equal peaks; the last fifth of the people is wrong: its table says 1, the others' 72 / 96."""
    people = people_at(np.full((120, 1, 2), 80.0))
    is_wrong = np.arange(120) >= 96
    keypoints = people.joints + np.stack([10.0 * is_wrong, np.zeros(120)], axis=1)[:, None]
    _, facts = calibration.calibrate(Predictions(keypoints, np.full((120, 1), 0.5)), people)
    assert facts["calibration_error"]["after"] == pytest.approx(0.2 * 1 + 0.8 * 0.25)


def test_joints_that_are_never_marked_get_the_table_of_all():
    found, people, _ = made_predictions(500)
    people = people._replace(marked=people.marked & [True, False])
    table, _ = calibration.calibrate(found, people)
    assert np.array_equal(table.probabilities_JK[0], table.probabilities_JK[1])
    with pytest.raises(InputError, match="evaluate on more people"):
        calibration.calibrate(found, people._replace(marked=people.marked & False))


@pytest.fixture(scope="module")
def calibrated(tiny_shards, tmp_path_factory):
    """A run with plain best.pt, and calibrated.pt of it."""
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    trainer = make_trainer(tiny_config(tiny_shards), folder)
    steps(trainer, 2)
    trainer.save(["best.pt"])
    words = ["--checkpoint", folder, "--shards", tiny_shards / "train", "--workers", 0]
    words += ["--calibrate", folder / "calibrated.pt", "--json", folder / "c.json"]
    evaluate.main([*map(str, words), "--device", "cpu"])
    return folder


def test_the_checkpoint_keeps_everything_and_gains_the_table(calibrated):
    plain, found = (load_checkpoint(calibrated / f"{n}.pt") for n in ("best", "calibrated"))
    assert plain.calibration is None and found.calibration.peaks_JK.shape == (16, 10)
    assert plain.run.best == found.run.best and plain.step == found.step
    assert len(plain.weights) == len(found.weights) > 10
    assert all((found.weights[name] == tensor).all() for name, tensor in plain.weights.items())
    facts = json.loads((calibrated / "c.json").read_text())["calibration"]
    assert facts["people"] == 12 and len(facts["risk"]["after"]) == len(facts["coverage"]) == 100


def joints_of(checkpoint, picture, output) -> tuple[np.ndarray, list]:
    """(16, 3) x, y and score of a whole picture, and its expected errors."""
    words = ["--checkpoint", checkpoint, picture, "--save-predictions", output, "--device", "cpu"]
    predict.main([*map(str, words)])
    (person,) = json.loads(output.read_text())
    return np.array(person["keypoints"]), person.get("expected_errors")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_prediction_interpolates_in_the_table(kind, calibrated, tiny_set, tmp_path):
    path = calibrated / "calibrated.pt"
    if kind == "safetensors":
        if not importlib.util.find_spec("safetensors"):
            pytest.skip("no safetensors")
        path = tmp_path / "t.safetensors"
        export_onnx.main([str(calibrated / "calibrated.pt"), "--safetensors", str(path)])
    picture = sorted((tiny_set / "images").iterdir())[0]  # 320 x 180 px: its box has 320
    plain, no_errors = joints_of(calibrated / "best.pt", picture, tmp_path / "a.json")
    found, errors = joints_of(path, picture, tmp_path / "b.json")
    assert no_errors is None and np.array_equal(plain[:, :2], found[:, :2])
    tables = load_checkpoint(calibrated / "calibrated.pt").calibration
    zero = [np.insert(table, 0, 0, axis=1) for table in tables[:2]]  # a peak of 0 is no joint
    expected = [np.interp(*each) for each in zip(plain[:, 2], *zero, strict=True)]
    np.testing.assert_allclose(found[:, 2], expected, atol=1e-6)
    expected = [np.interp(s, x, 320 * y) for s, x, y in zip(plain[:, 2], *tables[::2], strict=True)]
    np.testing.assert_allclose(errors, expected, rtol=1e-6)
