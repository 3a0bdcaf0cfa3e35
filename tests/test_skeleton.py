"""Sets of joints from YAML: what they mean, and the errors of faulty ones."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from common.errors import InputError
from configs.skeleton import (
    MPII,
    Length,
    Skeleton,
    length_in_words,
    load_skeleton,
    side_of,
    skeleton_from_dict,
    unnamed,
    with_named_pairs,
)

GOOD = {
    "name": "dog",
    "joints": ["nose", "left_paw", "right_paw", "tail", "left_ear", "right_ear"],
    "flip_pairs": [["left_paw", "right_paw"], ["right_ear", "left_ear"]],
    "limbs": [["nose", "tail"], ["left_paw", "tail"]],
    "normalize": {"between": ["nose", "tail"], "factor": 0.5},
}


def load(folder: Path, **changes: object) -> Skeleton:
    """GOOD with these keys changed; None takes one away."""
    raw = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    (folder / "s.yaml").write_text(yaml.safe_dump(raw))
    return load_skeleton(folder / "s.yaml")


def test_names_become_indices(tmp_path: Path) -> None:
    dog = load(tmp_path)
    assert dog.flip_pairs == ((1, 2), (5, 4))
    assert dog.flip_indices == (0, 2, 1, 3, 5, 4)
    assert dog.limbs == ((0, 3), (1, 3))
    assert dog.length == Length((0, 3), 0.5)
    assert dog.sides == ("middle", "left", "right", "middle", "left", "right")
    assert length_in_words(dog) == "0.5 x the distance of nose and tail"
    rules = {"occluded": "ignore", "outside": "unmarked", "unmarked": "empty", "sigmas": [0.1] * 6}
    for skeleton in (dog, load(tmp_path, mirror=False, **rules)):
        assert skeleton_from_dict(yaml.safe_load(yaml.safe_dump(skeleton.as_dict()))) == skeleton


def test_groups_are_the_pairs_and_the_other_joints_unless_given(tmp_path: Path) -> None:
    assert load(tmp_path).groups == (
        ("nose", (0,)), ("paw", (1, 2)), ("tail", (3,)), ("ear", (4, 5)),
    )  # fmt: skip
    given = load(tmp_path, groups={"head": ["nose", "left_ear", "right_ear"]})
    assert given.groups == (("head", (0, 4, 5)),)
    # "paw" would stand for two columns.
    names = ["paw", "left_paw", "right_paw"]
    few = {"joints": names, "flip_pairs": [names[1:]], "limbs": [], "normalize": {"box": 1}}
    assert load(tmp_path, **few).groups == (("paw", (0,)), ("left_paw/right_paw", (1, 2)))


@pytest.mark.parametrize(
    ("name", "side", "rest"),
    [("l_knee", "left", "knee"), ("knee_R", "right", "knee"), ("leftKnee", "left", "Knee"),
     ("Right knee", "right", "knee"), ("lefty", "middle", "lefty"), ("rear", "middle", "rear"),
     ("LED", "middle", "LED"), ("tail", "middle", "tail")],
)  # fmt: skip
def test_the_side_is_a_word_of_the_name(name: str, side: str, rest: str) -> None:
    assert side_of(name) == (side, rest)


def test_coco_has_its_17_joints(tmp_path: Path) -> None:
    coco = load_skeleton(ROOT / "configs" / "skeletons" / "coco.yaml")
    assert coco.joint_count == 17
    # Its left joints have the odd places, from the eyes on.
    assert coco.flip_pairs == tuple((j, j + 1) for j in range(1, 17, 2))
    assert coco.sides == ("middle", *("left", "right") * 8)
    # The "skeleton" of COCO's category, which counts from 1 (as in HRNet's lib/dataset/coco.py).
    theirs = [
        [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8],
        [7, 9], [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
    ]  # fmt: skip
    assert [[a + 1, b + 1] for a, b in coco.limbs] == theirs
    assert [joint for _, joints in coco.groups for joint in joints] == list(range(17))


def test_joints_are_compared_by_name_or_where_there_are_none_by_number(tmp_path: Path) -> None:
    dog = load(tmp_path)
    assert dog.same_joints(load(tmp_path, name="cat", limbs=[], normalize={"box": 1.0}))
    assert not dog.same_joints(load(tmp_path, joints=GOOD["joints"][::-1]))
    assert dog.same_joints(unnamed(6)) and unnamed(6).same_joints(dog)
    assert not dog.same_joints(unnamed(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limbs": [["nose", "lef_paw"]]}, "did you mean left_paw?"),
        ({"flip_pair": []}, "did you mean flip_pairs?"),
        ({"flip_pairs": [["left_paw", "left_ear"]]}, "are both left"),
        ({"flip_pairs": [["left_paw", "right_paw"]]}, "no pair of left_ear and right_ear"),
        ({"flip_pairs": []}, "left_paw and right_paw, left_ear and right_ear"),
        (
            {"joints": ["leftear", "rightear"], "flip_pairs": [], "limbs": [], "normalize": None},
            "no pair of leftear and rightear",
        ),
        ({"flip_pairs": [["left_paw", "right_paw"]] * 2}, "is repeated"),
        ({"flip_pairs": None}, "no flip_pairs"),
        ({"limbs": [["nose", "tail", "left_paw"]]}, "is not a pair"),
        ({"joints": ["nose", "nose"]}, "nose more than once"),
        ({"joints": []}, "names"),
        ({"joints": [True, "nose"]}, "in quotes"),
        ({"groups": {"head": []}}, "groups.head"),
        ({"normalize": {"box": 1, "between": ["nose", "tail"]}}, "{box: FACTOR} or"),
        ({"normalize": {"box": float("inf")}}, "FACTOR above 0"),
        ({"name": 3}, "in quotes"),
        ({"occluded": "no"}, "occluded: unknown 'no'; known are use, ignore"),
        ({"sigmas": [0.1] * 5}, "not a list of 6 numbers"),
        ({"sigmas": [0.1] * 5 + [0.0]}, "not a list of 6 numbers"),
    ],
)
def test_a_fault_is_one_error_with_its_place(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, **changes)
    assert message in str(caught.value)
    assert caught.value.where.startswith(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("text", ["", "a: [", "3", "a: !!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_skeleton_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    for path in (tmp_path / "s.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError) as caught:
            load_skeleton(path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ("nose left_ear right_ear", ((1, 2),)),
        ("r_eye l_eye", ((1, 0),)),
        ("rightear leftear tail", ((1, 0),)),
        ("left_ear right_ear left_paw", ()),
        ("l_eye left_eye r_eye right_eye thumb_l_1", ()),
        ("LeftEar leftEar RightEar", ()),
        ("snout tail", ()),
        ("l_ear r_ear eyeL eyeR", ()),
        ("left_hip right_hip lear rear", ()),
    ],
)
def test_pairs_come_from_names_only_if_each_joint_with_a_side_has_a_partner(names, pairs):
    named = with_named_pairs(unnamed(1)._replace(names=tuple(names.split()), mirror=False))
    assert named.flip_pairs == pairs and named.mirror == bool(pairs)


def test_the_first_joint_of_a_pair_is_left_if_names_do_not_say(tmp_path):
    text = (
        "name: fly\njoints: [w1, w2, l_leg, r_leg]\nlimbs: []\nflip_pairs: [[{}], [r_leg, l_leg]]\n"
    )
    for pair, sides in (("w1, w2", ("left", "right")), ("w2, w1", ("right", "left"))):
        (tmp_path / "fly.yaml").write_text(text.format(pair))
        skeleton = load_skeleton(tmp_path / "fly.yaml")
        assert skeleton.sides == (*sides, "left", "right")
        assert skeleton.assumed_left == (pair[:2],)
    assert MPII.assumed_left == ()
