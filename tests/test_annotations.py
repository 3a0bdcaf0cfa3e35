"""Annotation files: the numbers of the real ones, and what is said of damaged ones."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import random_people, write_h5

from common.errors import InputError
from configs.skeleton import MPII
from pipelines.annotations import People, head_length, read_annotations, safe_name


def good_columns(count: int = 3) -> dict[str, Any]:
    columns = random_people(np.random.default_rng(3), [(300, 200)] * count)
    columns["imgname"] = np.array([f"{i:09d}.jpg".encode() for i in range(count)], "S13")
    return columns


def json_entry(**changes: Any) -> dict[str, Any]:
    """A person in the layout of mpii_annotations.json."""
    joints = [[10.0 * j + 5, 7.0 * j + 3, 1.0] for j in range(16)]
    entry = {
        "img_paths": "000000001.jpg", "isValidation": 1.0, "objpos": [594.0, 257.0],
        "scale_provided": 3.0, "joint_self": joints, "annolist_index": 5, "people_index": 2,
    }  # fmt: skip
    return {**entry, **changes}


def write_json(path: Path, entries: Any) -> Path:
    path.write_text(json.dumps(entries))
    return path


def error_of(path: Path, split: str = "valid") -> InputError:
    with pytest.raises(InputError) as caught:
        read_annotations(path, split)
    assert str(path) in caught.value.where
    return caught.value


# The real files


def test_first_person_of_the_real_validation_file(shared: Path) -> None:
    people, skeleton = read_annotations(shared / "data/mpii_annot", "valid")
    # Literals from the first row of princeton-vl's valid.h5.
    assert people.count == 2958
    assert people.images[0] == "005808361.jpg"
    np.testing.assert_allclose(people.center[0], [966, 410.7773184], atol=1e-7)
    np.testing.assert_allclose(people.scale[0], 5.89810987, atol=1e-8)
    np.testing.assert_allclose(people.normalize[0], 117.96219733, atol=1e-8)
    assert people.joints.shape == (2958, 16, 2)
    assert skeleton is MPII


@pytest.fixture(scope="module")
def matched(shared: Path) -> tuple[People, People]:
    """The same validation people from the h5 file and from the JSON."""
    folder = shared / "data/mpii_annot"
    tables = []
    for name in ("valid.h5", "mpii_annotations.json.gz"):
        people, _ = read_annotations(folder / name, "valid")
        facts = zip(people.images, people.center[:, 0], people.scale, strict=True)
        rows = {(n, round(x), round(s, 2)): row for row, (n, x, s) in enumerate(facts)}
        tables.append((people, rows))
    (a, rows_a), (b, rows_b) = tables
    both = sorted(rows_a.keys() & rows_b.keys())
    return a.select([rows_a[key] for key in both]), b.select([rows_b[key] for key in both])


def test_json_and_h5_agree_on_the_same_real_people(matched: tuple[People, People]) -> None:
    a, b = matched
    assert a.count > 2700
    # The JSON is rounded to 0.001 of the scale, and the shift of the centre is 15 times that.
    np.testing.assert_allclose(a.center, b.center, atol=0.01)
    np.testing.assert_allclose(a.scale, b.scale, atol=0.001)
    # The h5 file holds whole pixels; its one joint at x = 0.273 became 0, which is "unmarked".
    assert (a.marked != b.marked).sum() == 1
    both = a.marked & b.marked
    assert both.sum() > 40_000
    np.testing.assert_allclose(a.joints[both], b.joints[both], atol=1.0 + 1e-6)
    np.testing.assert_array_equal(a.visible, b.visible)


def test_the_real_json_has_as_many_training_people_as_papers_say(shared: Path) -> None:
    path = shared / "data/mpii_annot/mpii_annotations.json.gz"
    assert read_annotations(path, "train")[0].count == 22246


def test_head_length_stands_in_for_the_head_box(matched: tuple[People, People]) -> None:
    a, b = matched
    known = b.normalize > 0
    assert known.sum() > 2500
    # The h5 file has 0.6 x the diagonal of the head box; for most people that is the same length.
    assert abs(np.median(b.normalize[known] / a.normalize[known]) - 1) < 0.001


# The rules


def test_a_joint_is_unmarked_when_x_is_zero_even_if_y_is_not(tmp_path: Path) -> None:
    columns = good_columns()
    columns["part"][1, 4] = (0, 121)
    columns["part"][1, 5] = (121, 0)
    columns["visible"][1, 4:6] = 1
    write_h5(tmp_path / "valid.h5", columns)
    people, _ = read_annotations(tmp_path / "valid.h5", "valid")
    assert not people.marked[1, 4]
    assert people.marked[1, 5]
    np.testing.assert_array_equal(people.joints[1, 4], (0, 121))


def test_json_is_enlarged_as_the_h5_files_are(tmp_path: Path) -> None:
    joints = json_entry()["joint_self"]
    joints[3] = [0.0, 0.0, 0.0]
    joints[4][2] = 0.0
    path = write_json(tmp_path / "a.json", [json_entry(joint_self=joints)])
    people, _ = read_annotations(path, "valid")
    np.testing.assert_allclose(people.center, [[594, 257 + 15 * 3.0]])
    np.testing.assert_allclose(people.scale, [1.25 * 3.0])
    np.testing.assert_array_equal(people.joints[0, 15], (155, 108))
    np.testing.assert_array_equal(np.flatnonzero(~people.marked[0]), [3])
    np.testing.assert_array_equal(np.flatnonzero(~people.visible[0]), [3, 4])
    assert (people.index[0], people.person[0]) == (5, 2)


def test_json_gives_each_split_its_own_people(tmp_path: Path) -> None:
    entries = [json_entry(img_paths=f"{i}.jpg", isValidation=float(i % 2)) for i in range(5)]
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        json.dump(entries, file)
    train, _ = read_annotations(tmp_path / "a.json.gz", "train")
    valid, _ = read_annotations(tmp_path / "a.json.gz", "valid")
    assert (train.images, valid.images) == (("0.jpg", "2.jpg", "4.jpg"), ("1.jpg", "3.jpg"))


def test_head_length_is_three_quarters_of_neck_to_top() -> None:
    joints, marked = np.zeros((2, 16, 2)), np.ones((2, 16), dtype=bool)
    joints[:, 8], joints[:, 9] = (10, 20), (40, 60)  # a 3-4-5 triangle of 50 px
    marked[1, 9] = False
    np.testing.assert_allclose(head_length(joints, marked), [37.5, 0])


def test_h5_without_normalize_takes_the_head_length(tmp_path: Path) -> None:
    columns = good_columns()
    del columns["normalize"], columns["person"]
    columns["part"][0, 8:10] = [(10, 20), (40, 60)]
    write_h5(tmp_path / "train.h5", columns)
    people, _ = read_annotations(tmp_path, "train")
    assert people.normalize[0] == pytest.approx(37.5)
    np.testing.assert_array_equal(people.person, [-1, -1, -1])


def test_select_keeps_rows_together(tmp_path: Path) -> None:
    write_h5(tmp_path / "valid.h5", good_columns(4))
    people, _ = read_annotations(tmp_path, "valid")
    some = people.select([3, 1])
    assert some.images == (people.images[3], people.images[1])
    np.testing.assert_array_equal(some.joints[0], people.joints[3])
    np.testing.assert_array_equal(some.center[1], people.center[1])


# Bad input


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "nothing.h5").found == "no such file"
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path, "train")
    assert caught.value.where == str(tmp_path / "train.h5")


@pytest.mark.parametrize("content", [b"", b"\x00", bytes(range(256)) * 40])
def test_file_that_is_no_hdf5_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "valid.h5").write_bytes(content)
    assert "not a readable HDF5 file" in error_of(tmp_path / "valid.h5").found


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_hdf5_is_named(tmp_path: Path, part: float) -> None:
    path = tmp_path / "valid.h5"
    write_h5(path, good_columns())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "not a readable HDF5 file" in error_of(path).found


def test_flipped_bytes_in_hdf5_never_end_in_another_error(tmp_path: Path) -> None:
    write_h5(tmp_path / "good.h5", good_columns())
    data, rng = (tmp_path / "good.h5").read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "valid.h5", 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 40):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_annotations(path, "valid")
        except InputError as error:
            refused += 1
            assert str(path) in error.where
    assert refused > 75


@pytest.mark.parametrize("name", ["imgname", "center", "scale", "part", "visible"])
def test_missing_dataset_is_named(tmp_path: Path, name: str) -> None:
    columns = good_columns()
    del columns[name]
    write_h5(tmp_path / "valid.h5", columns)
    assert f"no dataset {name} " in error_of(tmp_path / "valid.h5").found


@pytest.mark.parametrize(
    ("name", "shape"),
    [("center", (3, 3)), ("center", (2, 2)), ("scale", (3, 1)), ("part", (3, 15, 2)),
     ("visible", (16, 3)), ("normalize", (4,)), ("person", (3, 2))],
)  # fmt: skip
def test_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write_h5(tmp_path / "valid.h5", {**good_columns(), name: np.ones(shape)})
    error = error_of(tmp_path / "valid.h5")
    assert error.where.endswith(f"dataset {name}")
    assert str(shape) in error.found


def test_dataset_of_text_for_numbers_is_named(tmp_path: Path) -> None:
    columns = {**good_columns(), "scale": np.array([b"a", b"b", b"c"])}
    write_h5(tmp_path / "valid.h5", columns)
    assert error_of(tmp_path / "valid.h5").where.endswith("dataset scale")


def test_names_of_numbers_or_of_two_axes_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate([np.arange(3.0), np.full((3, 2), b"a.jpg"), np.float64(4)]):
        path = tmp_path / f"{number}.h5"
        write_h5(path, {**good_columns(), "imgname": names})
        assert "dataset imgname" in error_of(path).where


@pytest.mark.parametrize(
    ("name", "row", "value", "text"),
    [
        ("center", (1, 0), np.nan, "center not a number"),
        ("center", (1, 1), np.inf, "center not a number"),
        ("scale", 1, np.nan, "scale not a number"),
        ("scale", 1, 0.0, "scale not above 0"),
        ("scale", 1, -2.0, "scale not above 0"),
        ("part", (1, 5, 0), np.nan, "joints not a number"),
        ("normalize", 1, -1.0, "normalize not a length"),
        ("normalize", 1, np.nan, "normalize not a length"),
        ("index", 1, np.nan, "dataset index"),
        ("person", 1, np.inf, "dataset person"),
    ],
)
def test_impossible_value_is_named_with_its_row(
    tmp_path: Path, name: str, row: Any, value: float, text: str
) -> None:
    columns = {"index": np.arange(3.0), **good_columns()}
    columns[name][row] = value
    write_h5(tmp_path / "valid.h5", columns)
    error = error_of(tmp_path / "valid.h5")
    assert text in error.where + error.found
    assert "row" in error.found and "1" in error.found


@pytest.mark.parametrize(
    "name", [b"../x.jpg", b"/etc/x.jpg", b"", b"a/../x.jpg", b"a\\..\\x", b"C:\\x", b".", b"a\nb"]
)
def test_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: bytes) -> None:
    columns = good_columns()
    columns["imgname"] = np.array([b"a.jpg", name, b"b.jpg"], "S13")
    write_h5(tmp_path / "valid.h5", columns)
    error = error_of(tmp_path / "valid.h5")
    assert "file name that leaves the folder" in error.found
    assert repr(name.decode()) in error.found


def test_plain_names_are_safe() -> None:
    assert all(map(safe_name, ["000001.jpg", "a b.jpg", "sub/x.jpg", "..a.jpg", "x..jpg"]))


def test_no_people_is_refused(tmp_path: Path) -> None:
    columns = {name: values[:0] for name, values in good_columns().items()}
    write_h5(tmp_path / "valid.h5", columns)
    assert "no people" in error_of(tmp_path / "valid.h5").found
    path = write_json(tmp_path / "a.json", [json_entry(isValidation=0.0)])
    assert "no people" in error_of(path).found


def test_group_in_place_of_a_dataset_is_refused(tmp_path: Path) -> None:
    columns = good_columns()
    del columns["part"]
    write_h5(tmp_path / "valid.h5", columns)
    with h5py.File(tmp_path / "valid.h5", "a") as file:
        file.create_group("part")
    assert "no dataset part" in error_of(tmp_path / "valid.h5").found


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "3", "null", '"text"', "\x00", "[" * 100_000, "[1e999999, nan"]
)
def test_bad_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert error_of(tmp_path / "a.json").expected.startswith("a JSON list of people")


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([json_entry()] * 50).encode())
    flipped = whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    for number, data in enumerate([b"not gzip", whole[:-20], whole[:40], flipped]):
        path = tmp_path / f"{number}.json.gz"
        path.write_bytes(data)
        assert "not readable as JSON" in error_of(path).found


@pytest.mark.parametrize(
    "changes",
    [
        {"joint_self": [[1, 2, 3]] * 15},
        {"joint_self": "text"},
        {"joint_self": None},
        {"objpos": [1.0]},
        {"objpos": None},
        {"scale_provided": "large"},
        {"annolist_index": []},
        {"annolist_index": 1e400},
        {"annolist_index": 10**30},
    ],
)
def test_bad_json_entry_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_json(tmp_path / "a.json", [json_entry(), json_entry(**changes)])
    assert error_of(path).where == f"{path}: entry 1"


@pytest.mark.parametrize("missing", ["img_paths", "isValidation", "objpos", "scale_provided"])
def test_json_entry_without_a_key_is_named(tmp_path: Path, missing: str) -> None:
    entry = json_entry()
    del entry[missing]
    error = error_of(write_json(tmp_path / "a.json", [json_entry(), json_entry(), entry]))
    assert error.where.endswith("entry 2")
    assert missing in error.found


def test_json_entry_that_is_no_person_is_named(tmp_path: Path) -> None:
    for number, entry in enumerate([None, 3, "text", []]):
        path = write_json(tmp_path / f"{number}.json", [json_entry(), entry])
        assert error_of(path).where == f"{path}: entry 1"


def test_nan_in_json_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [json_entry(objpos=[float("nan"), 3.0])])
    assert "center not a number" in error_of(path).found


def test_no_permission_is_left_to_the_program(tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copy(__file__, tmp_path / "valid.h5")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "valid.h5")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(PermissionError):
        read_annotations(tmp_path / "valid.h5", "valid")
