"""AP and AR by hand, and against pycocotools' own way from an annotation file."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from helpers import people_at
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from configs.skeleton import MPII, load_skeleton
from evaluation import oks, report
from evaluation.predictions import as_coco
from pipelines.annotations import People, read_annotations
from pipelines.coco import object_array
from pipelines.shards import ShardSet
from tools import make_shards

COCO_YAML = ROOT / "configs" / "skeletons" / "coco.yaml"
BODY = MPII._replace(sigmas=(0.1,) * 16)


def people_of_area(area: float, count: int = 1) -> People:
    people = people_at(np.full((count, 16, 2), 50.0))
    return people._replace(area=np.full(count, area), ignored=object_array([[]] * count))


def test_ap_of_one_person_is_the_share_of_thresholds_below_its_oks() -> None:
    """OKS = exp(-d^2 / (2 area k^2)) with k = 2 sigma = 0.2, as COCO defines it."""
    people = people_of_area(10_000.0)
    distance = np.sqrt(-2 * 10_000 * 0.2**2 * np.log(0.72))
    found = people.joints + np.array([distance, 0])
    result = oks.average_precision(found, np.ones(1), people, BODY)
    # Thresholds 0.5, 0.55, ..., 0.95: 0.72 exceeds five of the ten.
    expected = dict.fromkeys(("AP", "APL", "AR", "ARL"), 0.5) | {"APM": None, "ARM": None}
    expected |= {"AP50": 1, "AP75": 0, "AR50": 1, "AR75": 0}
    assert result == pytest.approx(expected)


def test_the_scores_rank_the_predictions() -> None:
    people = people_of_area(10_000.0, count=2)
    found = people.joints + np.array([0.0, 900.0])[:, None, None]  # the second is not found
    first_right, first_wrong = (
        oks.average_precision(found, np.array(scores), people, BODY)
        for scores in ([0.9, 0.1], [0.1, 0.9])
    )
    # The precision at recalls 0, 0.01, ..., 0.5 is 1 or a half, and 0 beyond.
    assert first_right["AP50"] == pytest.approx(51 / 101)
    assert first_wrong["AP50"] == pytest.approx(51 / 101 / 2)


def test_without_sigmas_or_areas_there_is_no_ap() -> None:
    people = people_of_area(10_000.0)
    assert oks.average_precision(people.joints, np.ones(1), people, MPII) is None
    unknown = people._replace(area=None)
    assert oks.average_precision(people.joints, np.ones(1), unknown, BODY) is None
    assert "`area` in COCO's file" in report.oks_table({"network": {"oks": None}})


def noisy(people: People, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints and scores, of which some are good and some are far away."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0, 0.3, (people.count, 1, 1)) * 200 * people.scale[:, None, None]
    found = people.joints + spread * rng.normal(size=people.joints.shape) / 3
    return found, rng.uniform(size=people.joints.shape[:2])


def test_numbers_are_those_of_pycocotools_on_cocos_own_file(
    shared: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = shared / "data" / "coco_format" / "coco"
    annotations = folder / "test_coco.json"
    skeleton = load_skeleton(COCO_YAML)
    people, _ = read_annotations(annotations, "valid", skeleton)
    words = ["--annotations", annotations, "--skeleton", COCO_YAML, "--images", folder]
    make_shards.main([*map(str, words), "--splits", "valid", "--workers", "0",
                      "--output", str(tmp_path / "shards")])  # fmt: skip
    packed, _ = ShardSet(tmp_path / "shards" / "valid").people()
    nobody = people._replace(ignored=object_array([[]] * people.count))
    without = []
    for seed in range(3):
        found, scores_NJ = noisy(people, seed)
        row = seed + 1  # is found in the box of a person without marked joints, with certainty
        x, y, width, height, *_ = people.ignored[row][0]
        found[row], scores_NJ[row] = (x + width / 2, y + height / 2), 0.95
        results = as_coco(people, found, scores_NJ)
        (tmp_path / "r.json").write_text(json.dumps(results))
        files = ["--predictions", tmp_path / "r.json", "--json", tmp_path / "n.json"]
        evaluate.main(list(map(str, [*words, *files])))
        numbers = json.loads((tmp_path / "n.json").read_text())["predictions"]["oks"]
        with redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
            theirs = COCOeval(truth, truth.loadRes(str(tmp_path / "r.json")), "keypoints")
            theirs.evaluate(), theirs.accumulate(), theirs.summarize()
        expected = dict(zip(oks.NAMES, theirs.stats.tolist(), strict=True))
        assert 0.05 < expected["AP"] < 0.95
        assert numbers == pytest.approx(expected, abs=1e-6)
        scores = scores_NJ.mean(axis=1)
        of_shards = oks.average_precision(found, scores, packed, skeleton)
        assert of_shards == pytest.approx(expected, abs=1e-6)
        without.append(oks.average_precision(found, scores, nobody, skeleton) != numbers)
    assert all(without)  # else that would be a false positive
    printed = capsys.readouterr().out
    assert f"{100 * numbers['AP']:.2f}" in printed.split("AP50")[-1]
