"""Several data sets in one run: common joints, ignored joints, weights, resume, PCK of each."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import pack_arguments, write_h5
from helpers import SMALL, leaves, make_spec, make_trainer, metrics, step, tiny_config
from two_ranks import rows_of

import evaluate
import train
from common.errors import InputError
from configs.skeleton import MPII, Skeleton
from model.checkpoint import load_checkpoint
from pipelines.joined_shards import JoinedShards, union_skeleton, with_joints_of
from pipelines.loader import TrainLoader
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet
from tools import make_shards

NAMES = ("nose", "left_knee", "right_knee")
KNEES = Skeleton("knees", NAMES, ((1, 2),), ((1, 0),), (("nose", (0,)), ("knee", (1, 2))))
YAML = """
name: knees
joints: [nose, left_knee, right_knee]
flip_pairs: [[left_knee, right_knee]]
limbs: [[left_knee, nose]]
"""


@pytest.fixture(scope="module")
def knees(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the tiny set's people with MPII's head top (as nose) and knees only."""
    folder = tmp_path_factory.mktemp("knees")
    shutil.copytree(tiny_set / "images", folder / "images")
    for split in ("train", "valid"):
        with h5py.File(tiny_set / "annot" / f"{split}.h5") as file:
            columns = {name: file[name][:] for name in file}
        for name in ("part", "visible"):
            columns[name] = columns[name][:, [9, 4, 1]]
        write_h5(folder / "annot" / f"{split}.h5", columns)
    (folder / "knees.yaml").write_text(YAML)
    words = pack_arguments(folder, folder / "shards", "--skeleton", folder / "knees.yaml")
    assert make_shards.main(words) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def joined(tiny_shards: Path, knees: Path) -> JoinedShards:
    """All of the first, of the second 1.5 times as many as it has."""
    splits = {"mpii": ShardSet(tiny_shards / "train"), "knees": ShardSet(knees / "train")}
    skeletons = {name: split.manifest.skeleton for name, split in splits.items()}
    return JoinedShards(splits, union_skeleton(skeletons), [1.0, 1.5])


def test_a_union_has_each_joint_once_with_pairs_limbs_and_groups_of_all():
    union = union_skeleton({"a": MPII, "b": KNEES})
    assert union.names == (*MPII.names, "nose")
    assert union.flip_indices == (*MPII.flip_indices, 16)
    assert union.limbs == (*MPII.limbs, (4, 16))
    assert dict(union.groups) == {**dict(MPII.groups), "nose": (16,)}
    assert union_skeleton({"b": KNEES, "a": MPII}).names[:4] == (*NAMES, "r_ankle")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flip_pairs": ()}, "left_knee is mirrored to left_knee"),
        ({"flip_pairs": ((0, 1),)}, "is mirrored to"),
        ({"names": ("nose", "left_knee", "l_knee")}, "none twice"),
        ({"names": ("", "", "")}, "a name for each joint"),
    ],
)
def test_data_sets_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        union_skeleton({"a": MPII, "b": KNEES._replace(**changes)})


def test_one_of_a_pair_and_unknown_pairs_contradict_nothing():
    one = Skeleton("one", ("l_knee",), (), (), ())
    both = union_skeleton({"a": one, "b": MPII})
    assert both.names[:3] == ("l_knee", "r_ankle", "r_knee") and both.flip_indices[:3] == (2, 5, 0)
    union = union_skeleton({"a": MPII, "b": KNEES._replace(mirror=False, flip_pairs=())})
    assert not union.mirror


def test_joints_that_a_set_does_not_label_are_ignored_and_pictures_are_its_own(joined, knees):
    own = ShardSet(knees / "train")
    records, expected = unpack_records(joined.records()), unpack_records(own.records())
    places = [joined.manifest.skeleton.names.index(n) for n in ("nose", "l_knee", "r_knee")]
    others = [joint for joint in range(17) if joint not in places]
    assert records.ignored_NJ[:12, :16].any() == False  # noqa: E712
    assert records.ignored_NJ[:12, 16].all() and records.ignored_NJ[12:, others].all()
    np.testing.assert_array_equal(records.joints_NJ2[12:, places], expected.joints_NJ2)
    np.testing.assert_array_equal(records.marked_NJ[12:, places], expected.marked_NJ)
    assert sorted(records.row_N.tolist()) == list(range(24))
    assert [joined.picture(i) for i in range(12, 24)] == [own.picture(i) for i in range(12)]
    people, samples = joined.people()
    assert people.marked[12:, others].sum() == 0 and sorted(samples[12:]) == [*range(12, 24)]


def test_an_epoch_takes_people_as_often_as_their_weight_says_and_draws_anew(joined):
    epochs = [joined.keys_of_epoch(3, epoch).tolist() for epoch in range(4)]
    assert [len(keys) for keys in epochs] == [12 + 18] * 4
    keys = [tuple(key) for epoch in epochs for key in epoch]
    assert len(set(keys)) == len(keys)  # no person twice with the same draw
    first = [sample for sample, _ in keys if sample < 12]
    second = [sample for sample, _ in keys if sample >= 12]
    assert np.bincount(first).tolist() == [4] * 12
    assert np.bincount(second)[12:].tolist() == [6] * 12
    assert {own for sample, own in keys if sample >= 12} == set(range(6))


@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("window", [0, 2])
def test_batches_continue_from_any_step(joined, loader, window):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    spec = make_spec("hrnet", loader, shard_window=window, workers=0)
    whole = TrainLoader(joined, spec)
    batches = [whole.next() for _ in range(12)]
    resumed = TrainLoader(joined, spec, 9)
    for batch in batches[9:]:
        assert all(map(torch.equal, batch, resumed.next()))


def test_a_resumed_run_on_two_sets_ends_with_the_same_bytes(tiny_shards, knees, tmp_path):
    sets = {str(tiny_shards): 0.5, str(knees): 1.0}
    config = tiny_config(tiny_shards, data={"shards": sets, "preset": "newell"})
    whole = make_trainer(config, tmp_path / "whole")
    rows = [rows_of(step(whole)) for _ in range(5)]
    first = make_trainer(config, tmp_path / "parts")
    assert [rows_of(step(first)) for _ in range(2)] == rows[:2]
    first.save(["last.pt"])
    last = tmp_path / "parts" / "last.pt"
    second = make_trainer(config, tmp_path / "parts", last)
    assert [rows_of(step(second)) for _ in range(3)] == rows[2:]
    assert leaves(second.network.state_dict()) == leaves(whole.network.state_dict())
    other = tiny_config(tiny_shards, data={"shards": {**sets, str(knees): 2.0}, "preset": "newell"})
    with pytest.raises(InputError, match="other people or weights"):
        make_trainer(other, tmp_path / "parts", last)


def test_a_run_logs_the_pck_of_each_set_and_is_evaluated_on_one(
    tiny_shards, knees, tmp_path, capsys
):
    sets = f"{{{tiny_shards}: 2, {knees}: 1}}"
    words = ["--data.shards", sets, "--train.out", str(tmp_path), "--train.name", "two"]
    assert train.main([*SMALL, *words, "--eval.people", "4"]) == 0
    checkpoint = load_checkpoint(tmp_path / "two" / "best.pt")
    assert checkpoint.skeleton.joint_count == 17
    line = metrics(tmp_path / "two", "valid")[-1]
    names = [f"pckh@0.5_pooled/{folder}" for folder in (tiny_shards, knees)]
    assert all(0 <= line[name] <= 1 for name in names)
    low, high = sorted(line[name] for name in names)
    assert low <= line["pckh@0.5_pooled"] <= high
    how = ["--checkpoint", str(tmp_path / "two"), "--device", "cpu", "--workers", "0"]
    with pytest.raises(InputError, match="no --shards"):
        evaluate.main(how)
    evaluate.main([*how, "--shards", str(knees)])
    assert "5 people" in capsys.readouterr().out


def test_a_set_with_joints_of_the_network_is_mapped_and_another_is_not(knees, tiny_shards):
    union = union_skeleton({"a": MPII, "b": KNEES})
    split = ShardSet(knees / "valid")
    assert with_joints_of(split, union).manifest.skeleton.names == union.names
    assert with_joints_of(split, MPII) is split and with_joints_of(split, KNEES) is split


def test_weights_above_zero_are_needed(tiny_shards):
    with pytest.raises(InputError, match=r"data\.shards"):
        tiny_config(tiny_shards, data={"shards": {str(tiny_shards): 0.0}})
