"""What each rule makes of perfect heatmaps, on all of MPII's validation people."""

import numpy as np
import pytest

from configs.skeleton import MPII
from evaluation import pckh
from evaluation.inference import oracle_keypoints
from pipelines.annotations import People, read_annotations


@pytest.fixture(scope="module")
def people(shared) -> People:
    return read_annotations(shared / "data" / "mpii_annot", "valid")[0]


@pytest.fixture(scope="module")
def oracles(people) -> dict[str, np.ndarray]:
    return {r: oracle_keypoints(people, MPII, r, 256) for r in ("exact", "princeton", "hrnet")}


def errors_px(people: People, found: np.ndarray) -> np.ndarray:
    """(M, 2) of marked joints that lie in the crop, image px."""
    box = 200 * people.scale[:, None, None]
    inside = (np.abs(people.joints - people.center[:, None]) < 0.48 * box).all(axis=-1)
    return (found - people.joints)[people.marked & inside]


def pooled(people: People, found: np.ndarray, threshold: float = 0.5) -> pckh.Score:
    return pckh.score(pckh.normalized_errors(found, people), MPII, threshold)


def test_the_default_rule_gives_the_joints_back_without_bias(people, oracles):
    error = errors_px(people, oracles["exact"])
    assert len(error) > 43_000
    assert np.linalg.norm(error, axis=-1).mean() < 0.5
    assert np.abs(error.mean(axis=0)).max() < 0.05


def test_princetons_rule_loses_what_was_measured_in_its_own_code(people, oracles):
    score = pooled(people, oracles["princeton"])
    assert score.pooled == pytest.approx(0.996, abs=5e-4)
    assert score.groups["ankle"] == pytest.approx(0.978, abs=5e-4)
    error = errors_px(people, oracles["princeton"])
    np.testing.assert_allclose(error.mean(axis=0), [-3.5, -3.5], atol=0.1)


def test_the_default_rule_has_the_highest_ceiling(people, oracles):
    exact, hrnet, princeton = (
        pooled(people, oracles[r], 0.1) for r in ("exact", "hrnet", "princeton")
    )
    assert exact.pooled > 0.99 > hrnet.pooled > princeton.pooled
