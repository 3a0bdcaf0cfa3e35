"""PCKh by hand, and against the published predictions of Tompson et al."""

import json

import numpy as np
import pytest
from helpers import people_at

from configs.skeleton import MPII
from evaluation import pckh, report
from evaluation.inference import oracle_keypoints
from pipelines.annotations import People, read_annotations


def test_an_error_equal_to_the_threshold_counts_by_one_definition_and_not_by_the_other():
    errors = np.array([[0.5], [0.4], [0.6], [np.nan]])
    assert pckh.rates(errors, 0.5, inclusive=False)[0] == pytest.approx(1 / 3)
    assert pckh.rates(errors, 0.5, inclusive=True)[0] == pytest.approx(2 / 3)
    assert pckh.rates(errors, 0.5, inclusive=True)[1].tolist() == [3]


def test_unmarked_joints_and_people_without_a_length_never_count():
    people = people_at(np.zeros((2, 16, 2)))
    people.marked[0, 3] = False
    people.normalize[1] = 0
    errors = pckh.normalized_errors(np.zeros((2, 16, 2)), people)
    assert np.isfinite(errors).sum() == 15
    result = pckh.summary(np.zeros((2, 16, 2)), people, MPII)
    assert result["joints_counted"] == 15 and result["people_scored"] == 1


def test_the_three_means_differ_as_defined():
    # Two people; everything is found but: both ankles of one of them, and its pelvis.
    people = people_at(np.zeros((2, 16, 2)))
    found = np.zeros((2, 16, 2))
    found[1, [0, 5, 6]] = 99.0
    people.marked[0, [0, 5]] = False  # so that the ankles' rate is 0 of 1
    errors = pckh.normalized_errors(found, people)
    score = pckh.score(errors, MPII, 0.5)
    assert score.pooled == pytest.approx(27 / 30)  # 16 joints, 30 counted, 3 wrong
    assert score.unweighted == pytest.approx(12 / 14)  # two of 14 joints at 0
    assert score.weighted == pytest.approx(24 / 26)  # 26 counted without pelvis and thorax
    assert score.groups["ankle"] == 0 and score.groups["hip"] == 1


def test_auc_of_errors_spread_evenly_over_the_range_is_one_half():
    errors = np.linspace(0, 0.5, 5001)[:, None]
    assert pckh.auc(errors) == pytest.approx(0.5, abs=0.001)


def test_visible_and_occluded_joints_are_told_apart():
    people = people_at(np.zeros((1, 16, 2)))
    people.visible[0, :4] = False
    found = np.zeros((1, 16, 2))
    found[0, :3] = 99
    result = pckh.summary(found, people, MPII)
    assert result["visible"] == {"pooled": 1.0, "joints_counted": 12}
    assert result["occluded"] == {"pooled": 0.25, "joints_counted": 4}


def test_every_joint_and_group_has_its_rates_and_counts():
    people = people_at(np.zeros((4, 16, 2)))  # the head length is 10 px
    people.visible[0, 0] = False
    people.marked[3, 5] = False
    found = np.zeros((4, 16, 2))
    found[:, 0, 0] = [5.0, 0.5, 99.0, 0.0]  # right ankle: 0.5, 0.05, far, 0 of the head length
    rows = pckh.summary(found, people, MPII)["details"]
    ankle = rows["joints"]["r_ankle"]
    assert ankle["counts"] == {"all": 4, "visible": 3, "occluded": 1}
    assert ankle["0.5"] == 0.5 and ankle["0.1"] == 0.5  # an error of 0.5 is not below 0.5
    assert ankle["visible"] == pytest.approx(2 / 3) and ankle["occluded"] == 0
    both = rows["groups"]["ankle"]  # the left one is always found
    assert both["0.5"] == (0.75 + 1) / 2 and both["occluded"] == 1  # here it counts as found
    assert both["counts"] == {"all": 7, "visible": 6, "occluded": 1}
    assert rows["joints"]["l_ankle"]["auc"] == pytest.approx(0.99, abs=0.011)


def test_curves_count_the_errors_below_each_threshold_and_meet_the_table():
    people = people_at(np.zeros((4, 16, 2)))
    found = np.random.default_rng(3).normal(0, 2, (4, 16, 2))
    found[:, 0] = [[0.15, 0], [1.25, 0], [3.05, 0], [9, 0]]  # 0.015, 0.125, 0.305, 0.9
    result = pckh.summary(found, people, MPII)
    curves = result["curves"]
    assert curves["thresholds"] == [round(0.01 * i, 2) for i in range(51)]
    expected = [0.0] * 2 + [0.25] * 11 + [0.5] * 18 + [0.75] * 20
    assert curves["joints"]["r_ankle"] == expected
    for place, threshold in ((50, "0.5"), (10, "0.1")):
        table = result["pckh"][threshold]
        assert curves["pooled"][place] == table["pooled"]
        assert {name: rates[place] for name, rates in curves["groups"].items()} == table["groups"]
    assert result["auc"] == pytest.approx(np.trapezoid(curves["pooled"], dx=0.01) / 0.5)


def test_people_are_told_apart_by_the_side_of_their_box():
    people = people_at(np.zeros((7, 16, 2)))._replace(scale=np.array([4, 1, 2, 7, 3, 6, 5.0]))
    people.normalize[6] = 0  # nothing is known of the one of 1,000 px
    found = np.zeros((7, 16, 2))
    found[1, :8] = 99
    found[0, :, 0] = 3.0
    bins = pckh.summary(found, people, MPII)["by_size"]
    sides = [(row["from_px"], row["to_px"], row["people"]) for row in bins]
    assert sides == [(200, 400, 2), (600, 600, 1), (800, 800, 1), (1200, 1200, 1), (1400, 1400, 1)]
    assert [row["0.5"] for row in bins] == [0.75, 1, 1, 1, 1]
    assert [row["0.1"] for row in bins] == [0.75, 1, 0, 1, 1]
    assert bins[2]["error_quartiles"] == pytest.approx([0.3] * 3)
    assert [row["joints_counted"] for row in bins] == [32, 16, 16, 16, 16]


def test_the_error_of_a_person_is_the_mean_over_the_joints_that_count():
    errors = np.array([[0.2, 0.4], [np.nan, 0.6], [np.nan, np.nan]])
    np.testing.assert_allclose(pckh.person_errors(errors), [0.3, 0.6, np.nan])


def test_what_never_counts_is_null_in_json_and_a_dash_in_print():
    people = people_at(np.zeros((1, 16, 2)))  # everything is visible
    result = pckh.summary(np.zeros((1, 16, 2)), people, MPII)
    assert result["occluded"]["pooled"] is None
    assert "NaN" not in json.dumps(result)
    assert "occluded ones - (0)" in report.counts_text(result)
    nobody = pckh.summary(np.zeros((1, 16, 2)), people_at(np.zeros((1, 16, 2)), 0.0), MPII)
    assert "NaN" not in json.dumps(nobody) and nobody["auc"] is None
    assert "-" in report.results_table({"nobody": nobody}, MPII)


def test_the_mean_pose_is_the_mean_over_the_others_marked_joints_in_the_box():
    joints = np.full((3, 16, 2), 100.0)  # in the middle of boxes of 200 px
    joints[0] += 20
    people = people_at(joints)
    people.marked[1, 5] = False
    people.center[2], people.scale[2] = 0.0, 2.0
    pose = pckh.mean_pose(people)[2]
    np.testing.assert_allclose(pose[0], [20, 20])  # mean 10 px in a box of half the size
    np.testing.assert_allclose(pose[5], [40, 40])  # the first person's alone
    np.testing.assert_allclose(pckh.mean_pose(people.select([2])), 0)  # of nobody: the middle


def test_the_mean_pose_scores_0_042_on_the_real_photographs(shared):
    valid = read_annotations(shared / "data" / "lspet" / "annot", "valid")[0]
    errors = pckh.normalized_errors(pckh.mean_pose(valid), valid)
    assert pckh.score(errors, MPII, 0.5).pooled == pytest.approx(0.042, abs=0.001)


# Perfect heatmaps of all of MPII's validation people, decoded again


@pytest.fixture(scope="module")
def oracles(shared) -> tuple[People, dict[str, np.ndarray]]:
    """The people, and for each rule what perfect heatmaps decode to."""
    people, _ = read_annotations(shared / "data" / "mpii_annot", "valid")
    rules = ("exact", "princeton", "hrnet")
    return people, {rule: oracle_keypoints(people, MPII, rule, 256) for rule in rules}


def errors_px(people: People, found: np.ndarray) -> np.ndarray:
    """(M, 2) of marked joints that lie in the crop, image px."""
    box = 200 * people.scale[:, None, None]
    inside = (np.abs(people.joints - people.center[:, None]) < 0.48 * box).all(axis=-1)
    return (found - people.joints)[people.marked & inside]


def test_the_default_rule_returns_the_joints_without_bias(oracles):
    people, found = oracles
    error = errors_px(people, found["exact"])
    assert len(error) > 43_000
    assert np.linalg.norm(error, axis=-1).mean() < 0.5
    assert np.abs(error.mean(axis=0)).max() < 0.05


def test_princetons_rule_loses_what_was_measured_in_its_own_code(oracles):
    people, found = oracles
    score = pckh.score(pckh.normalized_errors(found["princeton"], people), MPII, 0.5)
    assert score.pooled == pytest.approx(0.996, abs=5e-4)
    assert score.groups["ankle"] == pytest.approx(0.978, abs=5e-4)
    error = errors_px(people, found["princeton"])
    np.testing.assert_allclose(error.mean(axis=0), [-3.5, -3.5], atol=0.1)


def test_the_default_rule_has_the_highest_upper_bound(oracles):
    people, found = oracles
    errors = {rule: pckh.normalized_errors(found[rule], people) for rule in found}
    scores = {rule: pckh.score(errors[rule], MPII, 0.1).pooled for rule in errors}
    assert scores["exact"] > 0.99 > scores["hrnet"] > scores["princeton"]
