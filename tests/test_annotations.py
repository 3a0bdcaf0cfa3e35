"""Annotation files: the numbers of the real ones, and the errors of damaged ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_people, write_h5

from common.errors import InputError
from configs.skeleton import MPII
from pipelines.annotations import People, read_annotations, safe_name


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
    np.testing.assert_array_equal(a.visible[both], b.visible[both])


def test_the_head_length_is_close_to_that_of_the_head_box(matched: tuple[People, People]) -> None:
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


def test_without_normalize_the_length_is_three_quarters_of_neck_to_top(tmp_path: Path) -> None:
    columns = good_columns()
    del columns["normalize"], columns["person"]
    columns["part"][0, 8:10] = [(10, 20), (40, 60)]  # a 3-4-5 triangle of 50 px
    columns["part"][1, 9] = 0
    write_h5(tmp_path / "train.h5", columns)
    people, _ = read_annotations(tmp_path, "train")
    np.testing.assert_allclose(people.normalize[:2], [37.5, 0])
    np.testing.assert_array_equal(people.person, [-1, -1, -1])


# Bad input


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "nothing.h5").found == "no such file"
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path, "train")
    assert caught.value.where == str(tmp_path)
    assert caught.value.found == "no train.h5, train.json, train.json.gz"


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.h5", "train.json.gz"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"train\.h5 and train\.json\.gz"):
        read_annotations(tmp_path, "train")


def test_damaged_hdf5_never_ends_in_another_error(tmp_path: Path) -> None:
    write_h5(tmp_path / "good.h5", good_columns())
    data, rng = (tmp_path / "good.h5").read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "valid.h5", 0
    for content in (b"", b"\x00", data[: len(data) // 10], data[: len(data) * 9 // 10]):
        path.write_bytes(content)
        assert "not a readable HDF5 file" in error_of(path).found
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 40):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_annotations(path, "valid")
        except InputError as error:
            refused += 1
            assert str(path) in error.where
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("imgname", None),
        ("visible", None),
        ("center", np.ones((3, 3))),
        ("scale", np.array([b"a", b"b", b"c"])),
        ("part", np.ones((3, 15, 2))),
        ("normalize", np.ones(4)),
        ("imgname", np.arange(3.0)),
        ("imgname", np.full((3, 2), b"a.jpg")),
    ],
)
def test_a_missing_dataset_or_another_shape_or_type_is_named(
    tmp_path: Path, name: str, values: np.ndarray | None
) -> None:
    columns = {**good_columns(), name: values}
    if values is None:
        del columns[name]
    write_h5(tmp_path / "valid.h5", columns)
    assert name in error_of(tmp_path / "valid.h5").found


@pytest.mark.parametrize(
    ("name", "row", "value", "text"),
    [
        ("center", (1, 1), np.inf, "center out of range"),
        ("scale", 1, 0.0, "scale out of range"),
        ("scale", 1, 1e9, "scale out of range"),
        ("part", (1, 5, 0), np.nan, "joints out of range"),
        ("part", (1, 5, 0), -1e9, "joints out of range"),
        ("normalize", 1, -1.0, "normalize not a length"),
        ("index", 1, np.nan, "dataset index"),
        ("person", 1, np.inf, "dataset person"),
    ],
)
def test_an_impossible_value_is_named_with_its_row(
    tmp_path: Path, name: str, row: Any, value: float, text: str
) -> None:
    columns = {"index": np.arange(3.0), **good_columns()}
    columns[name][row] = value
    write_h5(tmp_path / "valid.h5", columns)
    error = error_of(tmp_path / "valid.h5")
    assert text in error.where + error.found
    assert "row" in error.found and "1" in error.found


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "", "a/../x.jpg", "a\\..\\x", "C:\\x",
                                  ".", "a\nb", "a//b", "x" * 300])  # fmt: skip
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    assert all(map(safe_name, ["000001.jpg", "a b.jpg", "sub/x.jpg", "..a.jpg", "x..jpg"]))
    columns = good_columns()
    columns["imgname"] = np.array([b"a.jpg", name.encode(), b"b.jpg"])
    write_h5(tmp_path / "valid.h5", columns)
    assert f"file name that leaves the folder ({name!r})" in error_of(tmp_path / "valid.h5").found


def test_a_file_without_people_of_the_split_is_refused(tmp_path: Path) -> None:
    columns = {name: values[:0] for name, values in good_columns().items()}
    write_h5(tmp_path / "valid.h5", columns)
    assert "no people" in error_of(tmp_path / "valid.h5").found
    path = write_json(tmp_path / "a.json", [json_entry(isValidation=0.0)])
    assert "no people" in error_of(path).found


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\x00", "[" * 100_000])
def test_a_file_that_is_no_json_of_people_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert error_of(tmp_path / "a.json").expected.startswith("a JSON list of people")


def test_damaged_gzip_is_one_error(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([json_entry()] * 50).encode())
    flipped = whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    for number, data in enumerate([b"not gzip", whole[:-20], whole[:40], flipped]):
        path = tmp_path / f"{number}.json.gz"
        path.write_bytes(data)
        assert "not usable" in error_of(path).found


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        json_entry(img_paths=3),
        json_entry(isValidation=None),
        json_entry(joint_self=[[1, 2, 3]] * 15),
        json_entry(joint_self=[[1], [2, 3]]),
        json_entry(objpos="text"),
        json_entry(scale_provided="large"),
        json_entry(annolist_index=[]),
        json_entry(annolist_index=10**30),
    ],
)
def test_a_bad_json_entry_is_named(tmp_path: Path, entry: Any) -> None:
    path = write_json(tmp_path / "a.json", [json_entry(), entry])
    assert error_of(path).where == f"{path}: entry 1"


@pytest.mark.parametrize("changes", [{"objpos": [float("nan"), 3]}, {"annolist_index": 1e999}])
def test_a_number_that_is_not_finite_in_json_is_refused(tmp_path: Path, changes: Any) -> None:
    path = write_json(tmp_path / "a.json", [json_entry(**changes)])
    assert error_of(path).where.startswith(str(path))
