"""Keypoints in COCO's layout: boxes, marks, ids, and what is left out or refused."""

import gzip
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, noise_picture, pack_arguments, random_people, write_h5, write_jpeg
from helpers import change_manifest, make_trainer, steps, tiny_config

import evaluate
from common.errors import InputError
from configs.skeleton import Length, Skeleton, default_groups, load_skeleton, unnamed
from evaluation.predictions import as_coco, read_predictions
from model import checkpoint
from pipelines.annotations import People, read_annotations
from pipelines.shards import ShardSet
from tools import make_shards

NAMES = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
PAIRS = ((1, 2), (3, 4))
FIGURE = Skeleton("figure", NAMES, PAIRS, (), default_groups(NAMES, PAIRS), Length((), 0.4))
YAML = """
name: figure
joints: [head, left_hand, right_hand, left_foot, right_foot]
flip_pairs: [[left_hand, right_hand], [left_foot, right_foot]]
limbs: []
normalize: {box: 0.4}
"""
# Five joints of a person in a picture of 200 x 150 px; the right hand is occluded, the left foot
# not in the annotation, though the file says something about where it is.
KEYPOINTS = [60, 30, 2, 90, 70, 2, 31, 72, 1, 7, 8, 0, 50, 110, 2]


def entry(**changes: Any) -> dict[str, Any]:
    """An annotation; its box covers the pixels 10 to 50 in x and 20 to 100 in y."""
    facts = {"id": 900, "image_id": 77, "category_id": 3, "bbox": [10, 20, 41, 81],
             "keypoints": KEYPOINTS, "iscrowd": 0}  # fmt: skip
    return {**facts, **changes}


def coco(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    images = [{"id": 77, "file_name": "a.jpg"}, {"id": 5, "file_name": "sub/b.jpg"}]
    categories = [{"id": 3, "name": "figure", "keypoints": list(NAMES)}, {"id": 4, "name": "cat"}]
    facts = {"images": images, "annotations": list(entries), "categories": categories}
    return {**facts, **changes}


def read(folder: Path, data: dict[str, Any], skeleton: Skeleton | None = FIGURE) -> People:
    (folder / "a.json").write_text(json.dumps(data))
    return read_annotations(folder / "a.json", "valid", skeleton)[0]


def test_a_box_becomes_centre_and_scale_by_hand(tmp_path: Path) -> None:
    people = read(tmp_path, coco(entry(), entry(id=901, image_id=5, bbox=[0, 0, 200, 150])))
    # The middle of the pixels 10..50 is 30, of 20..100 is 60; of a whole picture 200 x 150 its own.
    np.testing.assert_allclose(people.center, [[30, 60], [99.5, 74.5]])
    np.testing.assert_allclose(people.scale, [1.25 * 81 / 200, 1.25 * 200 / 200])
    np.testing.assert_allclose(people.normalize, [0.4 * 81, 0.4 * 200])
    assert people.images == ("a.jpg", "sub/b.jpg")
    assert (people.index.tolist(), people.person.tolist()) == ([77, 5], [900, 901])


def test_visibility_0_1_2_is_unmarked_hidden_and_visible(tmp_path: Path) -> None:
    people = read(tmp_path, coco(entry()))
    assert people.marked[0].tolist() == [True, True, True, False, True]
    assert people.visible[0].tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(people.joints[0], [[60, 30], [90, 70], [31, 72], [0, 0],
                                                     [50, 110]])  # fmt: skip


def test_marked_joints_count_as_visible_if_no_joint_has_v_2(tmp_path: Path) -> None:
    people = read(tmp_path, coco(entry(keypoints=[60, 30, 1, 90, 70, 1, 0, 0, 0] + [9, 9, 1] * 2)))
    assert people.visible[0].tolist() == [True, True, False, True, True]


# In a picture of 200 x 150 px: the head visible, the left hand occluded, the right hand visible
# half a pixel outside, the left foot not marked, the right foot occluded outside.
OUTSIDE = [60, 30, 2, 90, 70, 1, 200, 72, 2, 0, 0, 0, 50, -1, 1]


@pytest.mark.parametrize(
    ("settings", "marked", "ignored"),
    [
        ({}, [1, 1, 1, 0, 1], [0, 0, 0, 0, 0]),
        ({"occluded": "ignore"}, [1, 0, 1, 0, 0], [0, 1, 0, 0, 1]),
        ({"outside": "ignore"}, [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]),
        ({"outside": "unmarked"}, [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]),
        ({"unmarked": "ignore"}, [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]),
        ({"outside": "unmarked", "occluded": "ignore"}, [1, 0, 0, 0, 0], [0, 1, 0, 0, 1]),
    ],
)
def test_hidden_outside_and_unmarked_joints_are_treated_as_the_skeleton_says(
    settings, marked, ignored, tmp_path: Path
) -> None:
    write_jpeg(tmp_path / "a.jpg", np.zeros((150, 200, 3), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps(coco(entry(keypoints=OUTSIDE))))
    figure = FIGURE._replace(**settings)
    people, _ = read_annotations(tmp_path / "a.json", "valid", figure, tmp_path)
    assert people.marked[0].tolist() == [bool(each) for each in marked]
    is_ignored = people.visible[0] & ~people.marked[0]
    assert is_ignored.tolist() == [bool(each) for each in ignored]
    if figure.outside != "use":
        with pytest.raises(InputError, match="--images"):
            read_annotations(tmp_path / "a.json", "valid", figure)


def test_a_skeletons_unmarked_replaces_that_of_the_run(figures: Path, tmp_path: Path) -> None:
    assert pack(figures) == 0
    losses = {}
    for own in (None, "empty", "ignore"):
        change = {} if own is None else {"unmarked": own}
        change_manifest(figures / "out" / "train", lambda raw, c=change: raw["skeleton"].update(c))
        for of_run in ("empty", "ignore"):
            config = tiny_config(figures / "out", data={"batch_size": 2}, loss={"unmarked": of_run})
            losses[own, of_run] = steps(make_trainer(config, tmp_path / "run"), 1)[0]
    empty, ignore = losses[None, "empty"], losses[None, "ignore"]
    assert empty != ignore
    assert losses["empty", "ignore"] == empty and losses["ignore", "empty"] == ignore


def test_a_length_between_joints_is_unknown_where_one_is_unmarked(tmp_path: Path) -> None:
    data = coco(entry())
    for joints, expected in (((0, 1), 0.5 * 50), ((0, 3), 0.0)):  # 30 and 40 px apart: 50
        people = read(tmp_path, data, FIGURE._replace(length=Length(joints, 0.5)))
        assert people.normalize[0] == pytest.approx(expected)


def test_people_left_out_are_counted_on_stderr(tmp_path: Path, capsys: Any) -> None:
    data = coco(
        entry(id=1), entry(id=2, iscrowd=1), entry(id=3, category_id=4), entry(id=4, bbox=[]),
        entry(id=5, bbox=[3, 4, 0, 9]), entry(id=6, keypoints=[0] * 15), entry(id=7),
    )  # fmt: skip
    assert read(tmp_path, data).person.tolist() == [1, 7]
    printed = capsys.readouterr().err
    for part in ("1 crowds", "1 of other categories", "1 without a marked", "used: 2 without"):
        assert part in printed


def test_without_a_box_the_picture_or_the_keypoints_are_taken(tmp_path: Path) -> None:
    sizes = [{"id": 77, "file_name": "a.jpg", "width": 200, "height": 150}]
    (tmp_path / "a.json").write_text(json.dumps(coco(entry(bbox=None), images=sizes)))
    for boxes, center, side in (
        ("auto", (99.5, 74.5), 200),
        ("picture", (99.5, 74.5), 200),
        ("keypoints", (60.5, 70), 1.25 * 80),
    ):
        people, _ = read_annotations(tmp_path / "a.json", "valid", FIGURE, boxes=boxes)
        np.testing.assert_allclose(people.center, [center])
        np.testing.assert_allclose(200 * people.scale, side)


def test_joints_outside_of_their_boxes_are_told_while_packing(figures: Path, capsys: Any) -> None:
    for name in ("train", "valid"):
        shares = [n if i % 3 == 2 else n / 200 for i, n in enumerate(KEYPOINTS)]
        data = coco(entry(keypoints=shares, bbox=[60, 30, 81, 41]))
        (figures / "set" / "annot" / f"{name}.json").write_text(json.dumps(data))
    (figures / "set" / "annot" / "valid.json.gz").unlink()
    pack(figures)
    printed = capsys.readouterr().err
    for split in ("train", "valid"):
        assert f"warning: in {split} only 0 % of the joints are inside" in printed


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """Two people in one picture and one in another, in a folder of both splits."""
    for name in ("a.jpg", "sub/b.jpg"):
        picture = noise_picture(np.random.default_rng(2), 200, 150)
        write_jpeg(tmp_path / "set" / "images" / name, picture)
    data = coco(entry(), entry(id=12, image_id=5), entry(id=13, bbox=[60, 30, 81, 41]))
    (tmp_path / "set" / "annot").mkdir()
    (tmp_path / "set" / "annot" / "train.json").write_text(json.dumps(data))
    with gzip.open(tmp_path / "set" / "annot" / "valid.json.gz", "wt") as file:
        json.dump(data, file)
    (tmp_path / "figure.yaml").write_text(YAML)
    return tmp_path


def pack(folder: Path, *more: object) -> int:
    words = pack_arguments(folder / "set", folder / "out", "--skeleton", folder / "figure.yaml")
    return make_shards.main([*words, *map(str, more)])


def test_shards_hold_the_joints_and_ids_of_the_json(figures: Path) -> None:
    assert pack(figures) == 0
    for split in ("train", "valid"):
        shards = ShardSet(figures / "out" / split)
        people, _ = shards.people()
        assert shards.manifest.skeleton == FIGURE
        assert people.person.tolist() == [900, 12, 13]
        assert people.index.tolist() == [77, 5, 77]
        expected = np.array(KEYPOINTS, dtype=float).reshape(5, 3)[:, :2]
        expected[3] = 0
        np.testing.assert_array_equal(people.joints, [expected] * 3)
        np.testing.assert_allclose(people.normalize, [0.4 * 81] * 3, rtol=1e-6)


def test_packing_writes_the_joints_that_a_file_names(figures: Path, capsys: Any) -> None:
    make_shards.main(pack_arguments(figures / "set", figures / "named"))
    skeleton = ShardSet(figures / "named" / "valid").manifest.skeleton
    assert load_skeleton(figures / "named" / "skeleton.yaml") == skeleton
    assert skeleton.names == NAMES and skeleton.mirror and skeleton.flip_pairs == PAIRS
    printed = capsys.readouterr().out
    assert "left-right pairs: left_hand and right_hand, left_foot and right_foot" in printed
    assert "--data.preset hrnet --heatmaps.rule exact" in printed
    again = next(line for line in printed.splitlines() if line.endswith("--overwrite"))
    assert make_shards.main(shlex.split(again)[2:]) == 0


def test_one_file_needs_its_split(figures: Path) -> None:
    file = (figures / "set" / "annot" / "train.json").rename(figures / "people.json")
    with pytest.raises(InputError, match="one file for two splits"):
        pack(figures, "--annotations", file)
    assert pack(figures, "--annotations", file, "--splits", "valid") == 0
    assert not (figures / "out" / "train").exists()


def test_results_find_the_people_of_one_picture_again(figures: Path, tmp_path: Path) -> None:
    people, _ = read_annotations(figures / "set" / "annot", "valid", FIGURE)
    found = people.joints + np.arange(3)[:, None, None]
    results = as_coco(people, found, np.ones((3, 5)))
    assert [(r["image_id"], r["annotation_id"]) for r in results] == [(77, 900), (5, 12), (77, 13)]
    (tmp_path / "r.json").write_text(json.dumps(results[::-1]))
    read = read_predictions(tmp_path / "r.json", people)
    np.testing.assert_array_equal(read.keypoints_NJ2, found)


def test_h5_files_of_other_joints_are_read_with_a_skeleton(tmp_path: Path) -> None:
    columns = random_people(np.random.default_rng(3), [(300, 200)] * 4)
    columns["imgname"] = np.array([b"a.jpg"] * 4)
    columns["part"], columns["visible"] = columns["part"][:, :5], columns["visible"][:, :5]
    write_h5(tmp_path / "valid.h5", columns)
    with pytest.raises(InputError, match="--skeleton"):
        read_annotations(tmp_path, "valid")
    ruled, _ = read_annotations(tmp_path, "valid", FIGURE)
    np.testing.assert_allclose(ruled.normalize, 0.4 * 160 * columns["scale"])
    own, _ = read_annotations(tmp_path, "valid", FIGURE._replace(length=None))
    np.testing.assert_array_equal(own.normalize, columns["normalize"])
    del columns["normalize"]
    write_h5(tmp_path / "valid.h5", columns)
    with pytest.raises(InputError, match="no length to divide errors by"):
        read_annotations(tmp_path, "valid", FIGURE._replace(length=None))


OTHER_ORDER = [{"id": 3, "keypoints": [*NAMES[::-1]]}]
NO_ID = {key: value for key, value in entry().items() if key != "id"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coco(entry(image_id=6)), "image_id 6"),
        (coco(entry(keypoints=KEYPOINTS[:12])), "numbers of shape (15,)"),
        (coco(entry(keypoints=[1, 2, 3] * 5)), "0, 1 and 2"),
        (coco(entry(keypoints=["a"] * 15)), "annotation 0"),
        (coco(entry(keypoints=7)), "annotation 0"),
        (coco(entry(bbox=[1, 2, 3])), "annotation 0"),
        (coco(entry(bbox=[1, 2, "wide", 4])), "annotation 0"),
        (coco(entry(bbox=[1, 2, float("inf"), 4])), "center out of range"),
        (coco(NO_ID), "id None"),
        (coco(entry(), entry()), "id 900 of 2 annotations"),
        (coco(entry(), images=[{"id": 77, "file_name": "a.jpg"}] * 2), "image 1"),
        (coco(entry(), images=[{"id": 77}]), "image 0"),
        (coco(entry(), images=[{"id": 77, "file_name": "../a.jpg"}]), "leaves"),
        (coco(entry(), categories=OTHER_ORDER), "in its order"),
        (coco(annotations=[3]), "a list of dicts"),
        (coco(entry(iscrowd=1)), "no people in this split"),
        (coco(entry(keypoints=None)), "no annotation has `keypoints`"),
        (coco(entry(image_id=[])), "image_id []"),
        (coco(entry(category_id=[])), "no people in this split"),
    ],
)
def test_bad_coco_ends_in_one_error(data: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, data)
    assert message in str(caught.value)
    assert str(tmp_path / "a.json") in caught.value.where


def test_joints_and_limbs_come_from_the_file_without_a_skeleton(tmp_path: Path) -> None:
    named = {"id": 3, "name": "figure", "keypoints": list(NAMES), "skeleton": [[1, 2], [2, 5]]}
    (tmp_path / "a.json").write_text(json.dumps(coco(entry(), categories=[named])))
    people, skeleton = read_annotations(tmp_path / "a.json", "valid")
    expected = FIGURE._replace(limbs=((0, 1), (1, 4)))
    assert skeleton == expected and people.normalize[0] == pytest.approx(0.4 * 81)
    for limbs in ([[1, 2], [6, 1]], [[0, 1]], [[1, []]]):  # joints that the file does not name
        (tmp_path / "a.json").write_text(
            json.dumps(coco(entry(), categories=[{**named, "skeleton": limbs}]))
        )
        assert read_annotations(tmp_path / "a.json", "valid")[1].limbs == ()
    body = load_skeleton(ROOT / "configs" / "skeletons" / "coco.yaml")
    named = {"id": 3, "name": "person", "keypoints": list(body.names)}
    person = entry(keypoints=[5, 6, 2] * 17)
    (tmp_path / "a.json").write_text(json.dumps(coco(person, categories=[named])))
    assert read_annotations(tmp_path / "a.json", "valid")[1] == body


@pytest.mark.parametrize(
    ("keypoints", "limbs"),
    [(None, []), ([], []), (3, []), (["a", "a"], []), ([["a"]], []), ([None], [])],
)  # fmt: skip
def test_a_file_that_does_not_name_its_joints_needs_a_skeleton(
    keypoints, limbs, tmp_path: Path
) -> None:
    named = {"id": 3, "name": "figure", "keypoints": keypoints, "skeleton": limbs}
    data = coco(entry(), categories=[named])
    with pytest.raises(InputError, match="--skeleton"):
        read(tmp_path, data, None)


def test_coco_without_a_length_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`normalize`"):
        read(tmp_path, coco(entry()), FIGURE._replace(length=None))


def test_a_network_of_16_joints_begins_a_run_of_five(
    figures: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    pack(figures)
    small = {"data": {"batch_size": 2}, "model": {"stacks": 2}}
    old = make_trainer(tiny_config(tiny_shards, **small), tmp_path / "old")
    old.save(["last.pt"])
    state = checkpoint.load_checkpoint(tmp_path / "old" / "last.pt")
    config = tiny_config(figures / "out", **small, train={"name": "new"})
    run = make_trainer(config, tmp_path / "new")
    fresh = checkpoint.init_weights(run.network, run.codec.skeleton, state)
    assert [name.split(".")[0] for name in fresh] == ["heads"] * 4 + ["merge_heatmaps"]
    result = run.train()
    assert run.progress.step == 6 and result["joints_counted"] == 12
    assert result["joint_names"] == list(NAMES)
    with pytest.raises(InputError, match="start a run with --init_from"):
        make_trainer(config, tmp_path / "resumed", state)


def test_splits_of_different_joints_do_not_train(figures: Path, tiny_shards: Path) -> None:
    pack(figures, "--splits", "train")
    shutil.copytree(tiny_shards / "valid", figures / "out" / "valid")
    with pytest.raises(InputError, match=r"16 joints \(mpii\)"):
        make_trainer(tiny_config(figures / "out"), figures / "run")


def test_evaluate_takes_the_joints_of_its_checkpoint_or_of_the_yaml(
    figures: Path, tmp_path: Path, capsys: Any
) -> None:
    pack(figures)
    make_trainer(tiny_config(figures / "out"), tmp_path / "run").save(["named.pt"])
    named, nameless = (tmp_path / "run" / name for name in ("named.pt", "nameless.pt"))
    contents = torch.load(named, weights_only=True)
    checkpoint.write_archive(nameless, {**contents, "skeleton": unnamed(5).as_dict()})
    capsys.readouterr()

    def evaluated(*words: object) -> str:
        data = ["--annotations", figures / "set" / "annot", "--images", figures / "set" / "images",
                "--workers", 0, "--flip", "--save-coco", tmp_path / "r.json"]  # fmt: skip
        evaluate.main([*map(str, [*data, "--checkpoint", *words])])
        return capsys.readouterr().out

    with_names = evaluated(named)
    assert "hand" in with_names and "pooled 4 (<)" in with_names
    assert [r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())] == [77, 5, 77]
    without = evaluated(nameless)  # the file's names give the pairs for a flip test
    assert "no flip test" not in without and "hand" in without
    given = evaluated(nameless, "--skeleton", figures / "figure.yaml")
    assert given.splitlines()[2:] == with_names.splitlines()[2:]  # all but the checkpoint's name
