"""Prediction files, MPII's submission, and the comparison with a reference run."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import people_at

import evaluate
from common.errors import InputError
from evaluation import pckh, report
from evaluation.predictions import (
    as_coco,
    as_entries,
    read_predictions,
    read_release,
    write_mat,
    write_submission,
)
from pipelines.annotations import read_annotations
from pipelines.shards import ShardSet

scipy_io = pytest.importorskip("scipy.io")
scipy_sparse = pytest.importorskip("scipy.sparse")

# (pictures, people a picture): two of the four pictures are of the test set.
IS_TRAIN = [1, 0, 1, 0]
PEOPLE_IN = [1, 3, 2, 1]
SINGLE = [[1], [1, 3], [1, 2], [1]]  # counted from 1, as MATLAB does
WANTED = [(1, 0), (1, 2), (3, 0)]


@pytest.fixture
def people():
    return people_at(np.random.default_rng(0).uniform(0, 300, (3, 16, 2)))


def write(path: Path, value: object) -> Path:
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
    write_mat(tmp_path / "p.mat", {"preds": people.joints})
    np.testing.assert_allclose(scipy_io.loadmat(tmp_path / "p.mat")["preds"], people.joints)
    again = read_predictions(tmp_path / "p.mat", people)
    np.testing.assert_allclose(again.keypoints_NJ2, people.joints)
    assert again.truth is None


@pytest.mark.parametrize(
    ("options", "at_half", "at_tenth"),
    [([], 82.337, 28.975), (["--ground-truth", "annotations"], 82.315, 28.910)],
)
def test_the_published_predictions_have_the_published_pckh(
    options, at_half, at_tenth, shared, tmp_path
):
    """Of Tompson et al., against the file's own ground truth and against valid.h5."""
    data = shared / "data" / "mpii_annot"
    words = ["--predictions", data / "detections_our_format.mat", "--annotations",
             data / "valid.h5", "--json", tmp_path / "n.json", *options]  # fmt: skip
    evaluate.main(list(map(str, words)))
    result = json.loads((tmp_path / "n.json").read_text())["predictions"]
    scores = result["pckh"]
    assert result["people"] == 2958
    assert 100 * scores["0.5"]["weighted"] == pytest.approx(at_half, abs=0.001)
    assert 100 * scores["0.1"]["weighted"] == pytest.approx(at_tenth, abs=0.001)
    if options:
        assert result["joints_counted"] == 44_239
        assert scores["0.5"]["pooled"] == pytest.approx(0.71505, abs=5e-6)
    else:
        groups = [95.600, 92.714, 83.365, 76.736, 81.929, 73.363, 65.446]
        names = ["head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"]
        found = [100 * scores["0.5"]["groups"][name] for name in names]
        assert found == pytest.approx(groups, abs=0.001)


def bad_files(people, folder: Path) -> dict[str, Path]:
    good = as_entries(people, people.joints, np.ones((3, 16)))
    swapped = [{**entry, "image": "9.jpg"} for entry in good]
    nan = json.loads(json.dumps(good).replace(str(good[0]["keypoints"][0][0]), "NaN", 1))
    words = [{**entry, "keypoints": ["x"] * 48} for entry in good]
    (folder / "noise.mat").write_bytes(b"noise" * 100)
    (folder / "noise.json").write_bytes(b"\xff\xfe{")
    write_mat(folder / "sparse.mat", {"preds": scipy_sparse.eye(3)})
    write_mat(folder / "text.mat", {"pos_pred_src": "text"})
    scipy_io.savemat(folder / "type.mat", {"preds": people.joints})
    data = bytearray((folder / "type.mat").read_bytes())
    assert data[192:196] == b"\x09\0\0\0"  # the type of the numbers: miDOUBLE
    data[192] = 8  # no type; SciPy 1.17 ends with a segmentation fault
    (folder / "type.mat").write_bytes(data)
    return {
        "another picture": write(folder / "swapped.json", swapped),
        "too few people": write(folder / "few.json", good[:2]),
        "one twice": write(folder / "twice.json", [good[0], good[0], good[1]]),
        "too few joints": write(folder / "j.json", [{**e, "keypoints": [[1, 2, 3]]} for e in good]),
        "not a number": write(folder / "nan.json", nan),
        "words": write(folder / "words.json", words),
        "no list": write(folder / "dict.json", {"a": 1}),
        "no entries": write(folder / "numbers.json", [1, 2, 3]),
        "no JSON": folder / "noise.json",
        "no .mat": folder / "noise.mat",
        "sparse": folder / "sparse.mat",
        "text": folder / "text.mat",
        "unknown type": folder / "type.mat",
        "missing": folder / "nowhere.json",
    }


def test_files_that_do_not_fit_are_refused_by_name(people, tmp_path):
    for path in bad_files(people, tmp_path).values():
        with pytest.raises(InputError) as caught:
            read_predictions(path, people)
        assert caught.value.where == str(path)


# MPII's test server: every single person of the test set once, and nobody else


def write_release(
    path: Path,
    is_train: list[int],
    people_in: list[int],
    single_people: list[list[int]],
    **changes: object,
) -> None:
    """A file in the layout of mpii_human_pose_v1_u12_1.mat; a number or a list for each picture."""
    annolist = np.empty((1, len(people_in)), dtype=[("image", object), ("annorect", object)])
    for i, count in enumerate(people_in):
        rects = np.empty((1, count), dtype=[("scale", object), ("objpos", object)])
        for p in range(count):
            rects[0, p] = (1.0 + i, {"x": 10.0 * i, "y": 10.0 * p})
        annolist[0, i] = ({"name": f"{i:09d}.jpg"}, rects)
    single = np.empty((len(people_in), 1), dtype=object)
    for i, people in enumerate(single_people):
        single[i, 0] = np.array(people, dtype=float)[:, None]
    contents = {"annolist": annolist, "img_train": np.array([is_train]), "single_person": single}
    scipy_io.savemat(path, {"RELEASE": {**contents, **changes}})


@pytest.fixture
def release(tmp_path) -> Path:
    """MPII's own annotation of four pictures."""
    write_release(tmp_path / "release.mat", IS_TRAIN, PEOPLE_IN, SINGLE)
    return tmp_path / "release.mat"


def crowd(who: list[tuple[int, int]]):
    index, person = (np.array([pair[axis] for pair in who]) for axis in (0, 1))
    return people_at(np.zeros((len(who), 16, 2)))._replace(index=index, person=person)


def test_every_joint_stands_where_mpii_looks_for_it(release, tmp_path):
    # One more person of the test set, who is not evaluated, and another order than the file's.
    who = [(3, 0), (1, 2), (1, 1), (1, 0)]
    people = crowd(who)
    keypoints = np.arange(4 * 16 * 2, dtype=float).reshape(4, 16, 2)
    contents = read_release(release, people)
    assert write_submission(tmp_path / "pred.mat", contents, people, keypoints) == 3

    pred = scipy_io.loadmat(tmp_path / "pred.mat", squeeze_me=True, struct_as_record=False)["pred"]
    assert [str(picture.image.name) for picture in pred] == ["000000001.jpg", "000000003.jpg"]
    assert float(pred[0].annorect[2].scale) == 2.0  # what was there is still there
    for row, (picture, person) in enumerate(who):
        rects = np.atleast_1d(pred[[1, 3].index(picture)].annorect)
        if (picture, person) == (1, 1):
            assert np.size(rects[person].annopoints) == 0
            continue
        points = rects[person].annopoints.point
        assert [int(p.id) for p in points] == list(range(16))
        np.testing.assert_array_equal([[p.x, p.y] for p in points], keypoints[row])


@pytest.mark.parametrize(
    ("who", "fault"),
    [
        (WANTED[:2], r"1 missing \(first: picture 3, person 0\)"),
        ([*WANTED, (3, 0)], "1 repeated"),
        ([*WANTED, (0, 0)], "1 not in the test set"),
        ([*WANTED, (3, 5)], "1 not in the test set"),
    ],
)
def test_a_wrong_count_is_refused(who, fault, release):
    with pytest.raises(InputError, match=fault) as caught:
        read_release(release, crowd(who))
    assert "each of the 3 single people" in caught.value.expected


@pytest.mark.parametrize(
    "changes",
    [
        {"annolist": 3},
        {"img_train": scipy_sparse.csr_matrix(np.array([[1.0, 0, 1, 0]]))},
        {"img_train": np.array([[0, 0]])},
        {"single_person": np.array([[1.0]])},
        {"single_person": [np.array([[np.inf]])] * 4},
        {"single_person": [scipy_sparse.eye(1)] * 4},
        {"annolist": np.zeros((1, 4), dtype=[("image", object)])},
    ],
)
def test_a_release_with_other_fields_is_refused(changes, tmp_path):
    if isinstance(changes.get("single_person"), list):
        cells = np.empty((4, 1), dtype=object)
        cells[:, 0] = changes["single_person"]
        changes = {"single_person": cells}
    write_release(tmp_path / "r.mat", IS_TRAIN, PEOPLE_IN, SINGLE, **changes)
    with pytest.raises(InputError, match="no annotation of MPII"):
        read_release(tmp_path / "r.mat", crowd(WANTED))


# --compare names the reference run, and warns where it was scored on different data


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
        found = other.with_suffix(".found.json")
        assert lines[0] == f"predictions_file {found}, data {path} ({other})"
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


def test_shards_hold_the_same_data_as_their_annotation_in_any_order(tiny_set, tiny_shards):
    people, _ = read_annotations(tiny_set / "annot", "valid")
    packed, _ = ShardSet(tiny_shards / "valid").people()
    assert pckh.truth_sha256(people) == pckh.truth_sha256(packed)
    assert pckh.truth_sha256(people) == pckh.truth_sha256(packed.select([4, 2, 0, 1, 3]))
    assert pckh.truth_sha256(people) != pckh.truth_sha256(packed.select([4, 2, 0, 1, 1]))
