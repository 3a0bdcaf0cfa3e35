"""Files of predictions: what is written can be read, and what does not fit is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pckh import people_at

import evaluate
from common.errors import InputError
from evaluation.predictions import as_coco, as_entries, read_predictions, write_mat


@pytest.fixture
def people():
    return people_at(np.random.default_rng(0).uniform(0, 300, (3, 16, 2)))


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_our_json_and_coco_results_come_back(people, tmp_path):
    found, scores = people.joints + 1.5, np.full((3, 16), 0.25)
    ours = write(tmp_path / "a.json", as_entries(people, found, scores))
    coco = write(tmp_path / "b.json", list(reversed(as_coco(people, found, scores))))
    for path in (ours, coco):
        np.testing.assert_allclose(read_predictions(path, people).keypoints_NJ2, found)
    first = json.loads(coco.read_text())[-1]
    assert len(first["keypoints"]) == 48 and first["score"] == 0.25


def test_mat_files_keep_the_coordinates_of_the_annotation(people, tmp_path):
    """HRNet subtracts 1 from MPII's coordinates and adds it again for its .mat; we do neither."""
    loadmat = pytest.importorskip("scipy.io").loadmat
    write_mat(tmp_path / "p.mat", {"preds": people.joints})
    np.testing.assert_allclose(loadmat(tmp_path / "p.mat")["preds"], people.joints)
    again = read_predictions(tmp_path / "p.mat", people)
    np.testing.assert_allclose(again.keypoints_NJ2, people.joints)
    assert again.truth is None


def test_the_published_mat_has_a_ground_truth_of_its_own(shared):
    from pipelines.annotations import read_annotations

    people, _ = read_annotations(shared / "data" / "mpii_annot", "valid")
    predicted = read_predictions(
        shared / "data" / "mpii_annot" / "detections_our_format.mat", people
    )
    assert predicted.truth is not None
    # Its joints are those of valid.h5 before they were truncated to whole pixels.
    both = people.marked & predicted.truth.marked
    difference = (predicted.truth.joints - people.joints)[both]
    assert len(difference) > 44_000 and np.median(np.abs(difference)) < 1


@pytest.mark.parametrize(
    ("options", "at_half", "at_tenth"),
    [([], 82.337, 28.975), (["--ground-truth", "annotations"], 82.315, 28.910)],
)
def test_the_published_predictions_from_the_command_line(
    options, at_half, at_tenth, shared, tmp_path, monkeypatch
):
    data = shared / "data" / "mpii_annot"
    words = ["--predictions", data / "detections_our_format.mat", "--annotations",
             data / "valid.h5", "--json", tmp_path / "n.json", *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    scores = json.loads((tmp_path / "n.json").read_text())["predictions"]["pckh"]
    assert 100 * scores["0.5"]["weighted"] == pytest.approx(at_half, abs=0.001)
    assert 100 * scores["0.1"]["weighted"] == pytest.approx(at_tenth, abs=0.001)


def bad_files(people, folder: Path) -> dict[str, Path]:
    good = as_entries(people, people.joints, np.ones((3, 16)))
    swapped = [{**entry, "image": "9.jpg"} for entry in good]
    nan = json.loads(json.dumps(good).replace(str(good[0]["keypoints"][0][0]), "NaN", 1))
    (folder / "noise.mat").write_bytes(b"noise" * 100)
    (folder / "noise.json").write_bytes(b"\xff\xfe{")
    return {
        "another picture": write(folder / "swapped.json", swapped),
        "too few people": write(folder / "few.json", good[:2]),
        "one twice": write(folder / "twice.json", [good[0], good[0], good[1]]),
        "too few joints": write(folder / "j.json", [{**e, "keypoints": [[1, 2, 3]]} for e in good]),
        "not a number": write(folder / "nan.json", nan),
        "no list": write(folder / "dict.json", {"a": 1}),
        "no fields": write(folder / "fields.json", [{}]),
        "no JSON": folder / "noise.json",
        "no .mat": folder / "noise.mat",
        "missing": folder / "nowhere.json",
    }


def test_files_that_do_not_fit_are_refused_by_name(people, tmp_path):
    files = bad_files(people, tmp_path)
    assert len(files) == 10
    for path in files.values():
        with pytest.raises(InputError) as caught:
            read_predictions(path, people)
        assert caught.value.where == str(path)
