"""The file for MPII's test server: every single person of the test set once, and nobody else."""

from pathlib import Path

import numpy as np
import pytest
from test_pckh import people_at

from common.errors import InputError
from evaluation.predictions import read_release, write_submission

scipy_io = pytest.importorskip("scipy.io")

# (pictures, people a picture): two of the four pictures are of the test set.
IS_TRAIN = [1, 0, 1, 0]
PEOPLE_IN = [1, 3, 2, 1]
SINGLE = [[1], [1, 3], [1, 2], [1]]  # counted from 1, as MATLAB does
WANTED = [(1, 0), (1, 2), (3, 0)]


@pytest.fixture
def release(tmp_path) -> Path:
    """MPII's own annotation of four pictures."""
    write_release(tmp_path / "release.mat", IS_TRAIN, PEOPLE_IN, SINGLE)
    return tmp_path / "release.mat"


def write_release(
    path: Path, is_train: list[int], people_in: list[int], single_people: list[list[int]]
) -> None:
    """A file in the layout of mpii_human_pose_v1_u12_1.mat; a number or a list a picture."""
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
    scipy_io.savemat(path, {"RELEASE": contents})


def crowd(who: list[tuple[int, int]]):
    index, person = (np.array([pair[axis] for pair in who]) for axis in (0, 1))
    return people_at(np.zeros((len(who), 16, 2)))._replace(index=index, person=person)


def test_every_joint_stands_where_mpii_looks_for_it(release, tmp_path):
    # One more person of the test set, who is not evaluated, and another order than the file's.
    who = [(3, 0), (1, 2), (1, 1), (1, 0)]
    people = crowd(who)
    keypoints = np.arange(4 * 16 * 2, dtype=float).reshape(4, 16, 2)
    facts = read_release(release, people)
    assert write_submission(tmp_path / "pred.mat", facts, people, keypoints) == 3

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
        ([*WANTED, (3, 0)], "1 there twice"),
        ([*WANTED, (0, 0)], "1 not in the test set"),
        ([*WANTED, (3, 5)], "1 not in the test set"),
    ],
)
def test_a_wrong_count_is_refused(who, fault, release):
    with pytest.raises(InputError, match=fault) as caught:
        read_release(release, crowd(who))
    assert "each of the 3 single people" in caught.value.expected


def test_another_file_is_refused(tmp_path):
    scipy_io.savemat(tmp_path / "other.mat", {"RELEASE": {"annolist": 3}})
    (tmp_path / "noise.mat").write_bytes(b"noise" * 50)
    for name in ("other.mat", "noise.mat", "nowhere.mat"):
        with pytest.raises(InputError, match=name):
            read_release(tmp_path / name, crowd(WANTED))
