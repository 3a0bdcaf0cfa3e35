"""Labels of DeepLabCut, Lightning Pose and YOLO-pose."""

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from conftest import noise_picture, write_jpeg
from helpers import make_trainer, tiny_config

from common.errors import InputError
from configs.skeleton import load_skeleton, skeleton_yaml
from pipelines.annotations import FORMATS, find_annotations, read_annotations
from pipelines.label_files import Labels, read_deeplabcut, read_table, read_yolo
from pipelines.packing import picture_groups, rows_of_split
from pipelines.shards import ShardSet
from tools import make_shards

ONE_ANIMAL = """\
scorer,Ann,Ann,Ann,Ann
bodyparts,snout,snout,tail,tail
coords,x,y,x,y
labeled-data/v1/a.jpg,10.5,20,30,40
labeled-data/v1/b.jpg,1,2,,
labeled-data/v2/c.jpg,,,,
"""
TWO_ANIMALS = """\
scorer,,,Ann,Ann,Ann,Ann,Ann,Ann
individuals,,,left,left,left,left,right,right
bodyparts,,,snout,snout,tail,tail,snout,snout
coords,,,x,y,x,y,x,y
labeled-data,v1,a.jpg,1,2,3,4,5,6
"""


def table(folder: Path, text: str, name: str = "CollectedData.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_table_has_a_row_for_each_picture_and_empty_cells_are_not_marked(tmp_path):
    labels = read_table(table(tmp_path, ONE_ANIMAL))
    assert labels.images == ("labeled-data/v1/a.jpg", "labeled-data/v1/b.jpg")
    assert labels.skeleton.names == ("snout", "tail")
    expected = [[(10.5, 20, 2), (30, 40, 2)], [(1, 2, 2), (0, 0, 0)]]
    np.testing.assert_array_equal(labels.keypoints_NJ3, expected)


def test_each_individual_of_a_table_is_one_animal(tmp_path):
    labels = read_table(table(tmp_path, TWO_ANIMALS))
    assert labels.images == ("labeled-data/v1/a.jpg",) * 2
    expected = [[(1, 2, 2), (3, 4, 2)], [(5, 6, 2), (0, 0, 0)]]
    np.testing.assert_array_equal(labels.keypoints_NJ3, expected)


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", ONE_ANIMAL.replace("30,40", "30"), ONE_ANIMAL.replace("20", "x")]
)
def test_a_table_with_an_unknown_layout_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"CollectedData\.csv"):
        read_table(table(tmp_path, text))


def test_deeplabcuts_own_example_is_read(shared):
    labels = read_deeplabcut(shared / "data" / "dlc_openfield" / "config.yaml")
    assert labels.skeleton.names == ("snout", "leftear", "rightear", "tailbase")
    assert len(labels.images) == 116 and labels.skeleton.flip_pairs == ((1, 2),)
    np.testing.assert_allclose(labels.keypoints_NJ3[0, 3], [87.11, 152.698, 2])


def assert_same_labels(one: Labels, other: Labels) -> None:
    assert one.images == other.images and one.skeleton == other.skeleton
    np.testing.assert_array_equal(one.keypoints_NJ3, other.keypoints_NJ3)


def test_an_h5_file_without_its_csv_has_the_same_labels(shared, tmp_path):
    project = shared / "data" / "dlc_openfield"
    (tmp_path / "labeled-data" / "m4s1").mkdir(parents=True)
    for name in ("config.yaml", "labeled-data/m4s1/CollectedData_Pranav.h5"):
        shutil.copy(project / name, tmp_path / name)
    found, expected = (read_deeplabcut(each / "config.yaml") for each in (tmp_path, project))
    assert_same_labels(found, expected)
    assert {type(name) for name in found.skeleton.names} == {str}  # YAML cannot hold numpy's
    shutil.copy(
        project / "labeled-data/m4s1/CollectedData_Pranav.csv", tmp_path / "labeled-data/m4s1"
    )
    assert len(read_deeplabcut(tmp_path / "config.yaml").images) == 116  # not twice


def write_fixed_layout(path: Path) -> None:
    """TWO_ANIMALS as pandas 3.1 writes a table with path and columns in several levels."""
    levels = {
        "axis1": [(["labeled-data"], [0]), (["v1"], [0]), (["a.jpg"], [0])],
        "block0_items": [(["Ann"], [0] * 6), (["left", "right"], [0, 0, 0, 0, 1, 1]),
                         (["snout", "tail"], [0, 0, 1, 1, 0, 0]), (["x", "y"], [0, 1] * 3)],
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for index, parts in levels.items():
            for number, (names, rows) in enumerate(parts):
                file[f"keypoints/{index}_level{number}"] = np.array([n.encode() for n in names])
                file[f"keypoints/{index}_label{number}"] = np.array(rows, dtype=np.int8)
        file["keypoints/block0_values"] = np.array([[1.0, 2, 3, 4, 5, 6]])


def write_older_layout(path: Path, columns: bytes) -> None:
    """One picture and two joints; columns: a pickle of the columns' names."""
    records = np.array([("a.jpg", (1, 2, 3, 4))], [("index", "S9"), ("values_block_0", "f8", (4,))])
    with h5py.File(path, "w") as file:
        file["df_with_missing/table"] = records
        file["df_with_missing/table"].attrs["values_block_0_kind"] = np.bytes_(columns)


def test_the_fixed_layout_of_pandas_is_read(tmp_path):
    write_fixed_layout(tmp_path / "CollectedData_Ann.h5")
    (tmp_path / "csv").mkdir()
    expected = read_table(table(tmp_path / "csv", TWO_ANIMALS, "CollectedData_Ann.csv"))
    found = read_table(tmp_path / "CollectedData_Ann.h5")
    assert_same_labels(found, expected)
    assert {type(name) for name in found.skeleton.names} == {str}  # YAML cannot hold numpy's


def test_a_damaged_h5_table_is_refused(tmp_path):
    path = tmp_path / "CollectedData_Ann.h5"
    write_fixed_layout(path)
    good = path.read_bytes()
    path.write_bytes(good.replace(b"SNOD", b"SNOX"))  # a node of a group
    with pytest.raises(InputError, match="not readable"):
        read_table(path)
    path.write_bytes(good.replace(b"\x13\x01\0\0", b"\x13\xe1\0\0"))  # a type of text
    with pytest.raises(InputError, match="encoding"):
        read_table(path)


def test_limbs_of_a_project_are_pairs_of_its_body_parts(tmp_path):
    (tmp_path / "labeled-data" / "v1").mkdir(parents=True)
    table(tmp_path / "labeled-data" / "v1", ONE_ANIMAL, "CollectedData_Ann.csv")
    text = "skeleton:\n- [tail, snout]\n- [tail, ear]\n-\n- [a: 1]\n"
    config = table(tmp_path, text, "config.yaml")
    assert read_deeplabcut(config).skeleton.limbs == ((1, 0),)
    config.write_text("skeleton: 5")
    with pytest.raises(InputError, match="pairs of body parts"):
        read_deeplabcut(config)


class _Runs:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize("columns", [b"noise", pickle.dumps([_Runs()], 0), pickle.dumps(["x"], 0)])
def test_a_bad_h5_table_is_refused_and_runs_nothing(columns, tmp_path):
    path = tmp_path / "CollectedData_Ann.h5"
    write_older_layout(path, columns)
    with pytest.raises(InputError, match="not readable"):
        read_annotations(path, "train")
    path.write_bytes(b"noise")
    with pytest.raises(InputError, match="not readable"):
        read_annotations(path, "train")


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A YOLO-pose data set of two joints; its pictures have 200 x 100 px."""
    rng = np.random.default_rng(0)
    rows = {"train/a": "0 0.5 0.5 0.4 0.8 0.25 0.5 2 0.75 0.5 1\n", "val/b": ""}
    rows["val/c"] = "0 0.5 0.5 1 1 0.1 0.2 0 0.3 0.4 2\n" * 2
    for name, text in rows.items():
        for kind in ("images", "labels"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(tmp_path / "images" / f"{name}.jpg", noise_picture(rng, 200, 100))
        (tmp_path / "labels" / f"{name}.txt").write_text(text)
    facts = {"train": "images/train", "val": "images/val", "kpt_shape": [2, 3], "flip_idx": [1, 0]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(facts))
    return tmp_path


def test_yolo_coordinates_are_converted_to_pixels(yolo):
    # DeepLabCut's file has this name too, but no kpt_shape.
    config = (yolo / "data.yaml").rename(yolo / "config.yaml")
    people, skeleton = read_annotations(config, "train")
    assert people.images == ("images/train/a.jpg",)
    # The box is 80 x 80 px at (60, 10) from the corner.
    np.testing.assert_allclose(people.center, [[99.5, 49.5]])
    np.testing.assert_allclose(people.scale, 1.25 * 80 / 200)
    np.testing.assert_allclose(people.joints, [[(50, 50), (150, 50)]])
    assert people.marked.all() and people.visible.tolist() == [[True, False]]
    assert skeleton.flip_pairs == ((0, 1),) and skeleton.mirror
    people, _ = read_annotations(config, "valid")
    assert people.images == ("images/val/c.jpg",) * 2
    assert people.marked.tolist() == [[False, True]] * 2
    # A box of the whole picture: its middle is (W - 1) / 2, its square 1.25 x the longer side.
    np.testing.assert_allclose(people.center[0], [99.5, 49.5])
    np.testing.assert_allclose(people.scale[0], 1.25 * 200 / 200)


def test_a_yolo_row_of_another_length_is_named(yolo):
    (yolo / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(InputError, match=r"a\.txt: line 1"):
        read_yolo(yolo / "data.yaml", "train")
    (yolo / "labels" / "train" / "a.txt").write_bytes(b"0 0.5 0.5 0.4 0.8 0.25 0.5 2 \xff 0.5 1\n")
    with pytest.raises(InputError, match=r"a\.txt: line 1"):
        read_yolo(yolo / "data.yaml", "train")


@pytest.mark.parametrize(
    "change",
    [{"flip_idx": [0, "a"]}, {"flip_idx": 1}, {"flip_idx": [0, 0]}, {"kpt_names": 2},
     {"kpt_names": {0: 2}}, {"kpt_shape": ["2", 3]}, {"kpt_shape": [2.0, 3]},
     {"kpt_shape": [0, 3]}, {"kpt_shape": [10**9, 3]}],
)  # fmt: skip
def test_a_yolo_description_with_other_values_is_refused(yolo, change):
    facts = yaml.safe_load((yolo / "data.yaml").read_text())
    (yolo / "data.yaml").write_text(yaml.safe_dump({**facts, **change}))
    with pytest.raises(InputError, match="kpt_"):
        read_yolo(yolo / "data.yaml", "train")


def test_a_list_of_pictures_may_have_names_in_any_encoding_but_none_outside(yolo):
    facts = yaml.safe_load((yolo / "data.yaml").read_text())
    (yolo / "data.yaml").write_text(yaml.safe_dump({**facts, "train": "list.txt"}))
    (yolo / "list.txt").write_bytes(b"images/train/a.jpg\r\n\nimages/train/\xe9.jpg\n")
    assert read_annotations(yolo / "data.yaml", "train")[0].images == ("images/train/a.jpg",)
    (yolo.parent / "b.txt").write_text("0 0.5 0.5 0.4 0.8 0.25 0.5 2 0.75 0.5 1\n")
    (yolo / "list.txt").write_text(f"{yolo.parent}/b.jpg\n")
    with pytest.raises(InputError, match="leaves the folder"):
        read_annotations(yolo / "data.yaml", "train")


def test_boxes_are_the_picture_the_keypoints_or_a_file(tmp_path):
    for name in ("v1/a.jpg", "v1/b.jpg"):
        path = tmp_path / "labeled-data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(path, noise_picture(np.random.default_rng(0), 64, 48))
    path = table(tmp_path, ONE_ANIMAL)
    whole, _ = read_annotations(path, "train")
    np.testing.assert_allclose(whole.center, [(31.5, 23.5)] * 2)
    np.testing.assert_allclose(whole.scale, 64 / 200)
    tight, _ = read_annotations(path, "train", boxes="keypoints")
    assert tight.images == ("labeled-data/v1/a.jpg",), "one joint makes no box"
    np.testing.assert_allclose(tight.center, [(20.25, 30)])
    np.testing.assert_allclose(tight.scale, 1.25 * 20 / 200)
    boxes = table(
        tmp_path, "image,x,y,width,height\nlabeled-data/v1/b.jpg,0,0,11,21\n", "boxes.csv"
    )
    given, _ = read_annotations(path, "train", boxes=boxes)
    assert given.images == ("labeled-data/v1/b.jpg",)
    np.testing.assert_allclose(given.center, [(5, 10)])


def test_a_video_is_never_divided_among_the_splits():
    videos = [f"labeled-data/v{n // 10}/{n}.png" for n in range(100)]
    groups = picture_groups(videos)
    train, valid = (set(rows_of_split(groups, split, 0.2, 1)) for split in ("train", "valid"))
    assert train | valid == set(range(100)) and not train & valid
    assert {n // 10 for n in valid} == {n // 10 for n in valid} - {n // 10 for n in train}
    assert len(valid) == 20


def test_labels_without_pairs_are_packed_with_a_skeleton_file_and_trained_without_mirroring(
    tmp_path, capsys
):
    rng = np.random.default_rng(0)
    rows = "".join(f"labeled-data/v{n}/a.jpg,{20 + n},20,40,{30 + n}\n" for n in range(4))
    for n in range(4):
        (tmp_path / f"labeled-data/v{n}").mkdir(parents=True)
        write_jpeg(tmp_path / f"labeled-data/v{n}/a.jpg", noise_picture(rng, 64, 64))
    path = table(tmp_path, "".join(ONE_ANIMAL.splitlines(keepends=True)[:3]) + rows)
    shards = tmp_path / "shards"
    words = ["--annotations", str(path), "--valid-fraction", "0.5", "--output", str(shards)]
    make_shards.main([*words, "--workers", "0"])
    assert "does not\n  mirror pictures" in capsys.readouterr().out
    assert [len(ShardSet(shards / split)) for split in ("train", "valid")] == [2, 2]
    skeleton = ShardSet(shards / "train").manifest.skeleton
    assert load_skeleton(shards / "skeleton.yaml") == skeleton
    assert load_skeleton(shards / "skeleton.yaml").names == ("snout", "tail")
    trainer = make_trainer(tiny_config(shards, data={"preset": "newell"}), tmp_path / "run")
    assert trainer.codec.preset.flip_probability == 0 and not trainer.saved_config.eval.flip
    assert trainer.remarks == ["pictures are not mirrored: the left-right pairs are not known"]
    # With pairs written into the file, pictures may be mirrored.
    raw = yaml.safe_load((shards / "skeleton.yaml").read_text())
    raw |= {"mirror": True, "flip_pairs": [["snout", "tail"]]}
    (tmp_path / "paired.yaml").write_text(yaml.safe_dump(raw))
    assert read_annotations(path, "train", load_skeleton(tmp_path / "paired.yaml"))[1].mirror


def test_the_written_skeleton_has_the_projects_joints_and_limbs(tmp_path):
    (tmp_path / "labeled-data" / "v1").mkdir(parents=True)
    table(tmp_path / "labeled-data" / "v1", ONE_ANIMAL, "CollectedData_Ann.csv")
    facts = {"Task": "mice", "scorer": "Ann", "skeleton": [["snout", "tail"], ["snout", "ear"]]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(facts))
    labels = read_deeplabcut(tmp_path / "config.yaml")
    assert labels.skeleton.limbs == ((0, 1),) and labels.skeleton.name == "mice"
    (tmp_path / "skeleton.yaml").write_text(skeleton_yaml(labels.skeleton))
    assert load_skeleton(tmp_path / "skeleton.yaml") == labels.skeleton


def test_bad_pictures_and_labels_of_a_table_are_counted_once(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "labeled-data" / "v1").mkdir(parents=True)
    rows = "".join(f"labeled-data/v1/{n}.jpg,{20 + n},20,40,{30 + n}\n" for n in range(6))
    rows += "labeled-data/v1/6.jpg,20,20,,\n"  # a single joint makes no box
    for n in range(5):  # the last one is missing
        write_jpeg(tmp_path / f"labeled-data/v1/{n}.jpg", noise_picture(rng, 64, 64))
    (tmp_path / "labeled-data/v1/0.jpg").write_bytes(b"damaged")
    path = table(tmp_path, "".join(ONE_ANIMAL.splitlines(keepends=True)[:3]) + rows)
    words = ["--annotations", str(path), "--valid-fraction", "0.3", "--boxes", "keypoints"]
    words += ["--output", str(tmp_path / "shards"), "--workers", "0"]
    with pytest.raises(InputError, match="2 bad of 6 pictures"):
        make_shards.main(words)
    make_shards.main([*words, "--skip-bad"])
    assert sum(len(ShardSet(tmp_path / "shards" / split)) for split in ("train", "valid")) == 4
    printed = capsys.readouterr().err
    for once in ("all pictures are of one video", "labels not used: 1 without a marked joint"):
        assert printed.count(once) == 2  # in each of the two runs


CONTENT = {
    "coco.json": (b'{"images": []', ["coco"]),
    "mpii.json": (b" [{}", ["mpii"]),
    "people.h5": (b"", ["h5", "deeplabcut"]),
    "CollectedData_Ann.h5": (b"", ["deeplabcut"]),
    "CollectedData.csv": (b"", ["deeplabcut", "lightning-pose"]),
    "data.yaml": (b"kpt_shape: [2, 3]", ["yolo"]),
    "config.yaml": (b"Task: mice", ["deeplabcut"]),
    "labels.txt": (b"", []),
}


@pytest.mark.parametrize("name", CONTENT)
def test_a_look_at_the_file_finds_its_format_and_others_are_refused(tmp_path, name):
    content, fitting = CONTENT[name]
    (tmp_path / name).write_bytes(content)
    for given in ("auto", *FORMATS):
        may_be = given in fitting or (not fitting and given != "auto")
        if may_be or (given == "auto" and fitting):
            file, kind = find_annotations(tmp_path / name, "train", given)
            assert file == tmp_path / name
            assert kind is FORMATS[fitting[0] if given == "auto" else given]
            continue
        with pytest.raises(InputError) as caught:
            find_annotations(tmp_path / name, "train", given)
        assert caught.value.where == str(tmp_path / name) and "--format" in caught.value.next_step
        assert (fitting or ["unknown"])[0] in caught.value.found
        assert FORMATS[given if fitting else "coco"].what in caught.value.expected


def test_a_file_whose_name_says_nothing_is_packed_with_its_format(tmp_path):
    for n in range(2):
        (tmp_path / f"labeled-data/v{n}").mkdir(parents=True)
        image = noise_picture(np.random.default_rng(n), 64, 64)
        write_jpeg(tmp_path / f"labeled-data/v{n}/a.jpg", image)
    rows = "".join(f"labeled-data/v{n}/a.jpg,{20 + n},20,40,{30 + n}\n" for n in range(2))
    path = table(tmp_path, "".join(ONE_ANIMAL.splitlines(keepends=True)[:3]) + rows, "labels")
    words = ["--annotations", path, "--valid-fraction", 0.5, "--output", tmp_path / "shards"]
    words = [*map(str, words), "--workers", "0"]
    with pytest.raises(InputError, match="unknown kind"):
        make_shards.main(words)
    make_shards.main([*words, "--format", "lightning-pose"])
    assert ShardSet(tmp_path / "shards" / "valid").manifest.skeleton.names == ("snout", "tail")
    with pytest.raises(InputError, match="not usable"):
        make_shards.main([*words, "--format", "coco", "--images", str(tmp_path)])
