"""--compare names the reference run, and warns where both were scored on different data."""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluation import pckh, report
from evaluation.predictions import as_entries
from pipelines.annotations import read_annotations
from pipelines.shards import ShardSet


def score(annotations: Path, output: Path, *words: object) -> dict:
    """The --json of predictions 5 px beside an annotation."""
    people, _ = read_annotations(annotations, "valid")
    found = output.with_suffix(".found.json")
    scores = np.ones(people.joints.shape[:2])
    found.write_text(json.dumps(as_entries(people, people.joints + 5, scores)))
    words = ("--predictions", found, "--annotations", annotations, "--json", output, *words)
    evaluate.main(list(map(str, words)))
    return json.loads(output.read_text())["predictions"]


def test_a_reference_on_another_split_is_named_with_a_warning(tiny_set, tmp_path, capsys):
    valid, train = (tiny_set / "annot" / f"{split}.h5" for split in ("valid", "train"))
    for path in (valid, train):
        other = tmp_path / f"{path.stem}.json"
        score(path, other)
        capsys.readouterr()
        score(valid, tmp_path / "own.json", "--compare", other)
        lines = capsys.readouterr().out.split("the other run: ")[1].splitlines()
        assert lines[0] == f"{other.with_suffix('.found.json')}, on {path} ({other})"
        if path == valid:
            assert lines[1].startswith("gap, predictions minus the other run")
        else:
            assert lines[1].startswith("warning: The other run was scored on other data: 12 people")


@pytest.mark.parametrize("change", ["joint", "length", "picture"])
def test_one_number_of_the_annotation_makes_other_data(change, tiny_set):
    people, skeleton = read_annotations(tiny_set / "annot", "valid")
    joints, normalize = people.joints.copy(), people.normalize.copy()
    joints[tuple(np.argwhere(people.marked)[0])] += 1
    normalize[0] += 1
    other = {
        "joint": people._replace(joints=joints),
        "length": people._replace(normalize=normalize),
        "picture": people._replace(images=("x.jpg", *people.images[1:])),
    }[change]
    own, there = (pckh.summary(each.joints, each, skeleton) for each in (people, other))
    assert "in both, but other pictures" in (report.data_mismatch(own, there) or "")
    assert report.data_mismatch(own, own) is None
    old = {key: value for key, value in own.items() if key != "truth_sha256"}
    assert "not known" in (report.data_mismatch(own, old) or "")


def test_shards_hold_the_same_data_as_their_annotation_in_any_order(tiny_set, tiny_shards):
    people, _ = read_annotations(tiny_set / "annot", "valid")
    packed, _ = ShardSet(tiny_shards / "valid").people()
    assert pckh.truth_sha256(people) == pckh.truth_sha256(packed)
    assert pckh.truth_sha256(people) == pckh.truth_sha256(packed.select([4, 2, 0, 1, 3]))
    assert pckh.truth_sha256(people) != pckh.truth_sha256(packed.select([4, 2, 0, 1, 1]))
