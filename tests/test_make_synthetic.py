"""Synthetic people: their files, their annotations, and what a network can learn from them."""

from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from common.errors import InputError
from configs.skeleton import (
    HEAD_TOP,
    L_ANKLE,
    L_SHOULDER,
    L_WRIST,
    PELVIS,
    R_ANKLE,
    R_SHOULDER,
    R_WRIST,
    THORAX,
    UPPER_NECK,
)
from pipelines import synthetic
from tools.make_synthetic import main

TRAIN, VALID = 90, 60
SMALL = ("--train", "5", "--valid", "2", "--max-width", "480", "--workers", "1")


def draw(output: Path, *options: str) -> Path:
    main(["--output", str(output), *options])
    return output


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def columns(folder: Path, split: str) -> dict[str, np.ndarray]:
    with h5py.File(folder / "annot" / f"{split}.h5") as file:
        return {key: file[key][:] for key in file}


def marked(rows: dict[str, np.ndarray]) -> np.ndarray:
    return rows["part"].any(axis=2)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    counts = ("--train", str(TRAIN), "--valid", str(VALID), "--max-width", "640")
    return draw(tmp_path_factory.mktemp("data") / "people", *counts, "--workers", "1")


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("small") / "one", *SMALL)


def test_the_number_of_workers_changes_no_byte(small_set, tmp_path):
    one, two = contents(small_set), contents(draw(tmp_path / "two", *SMALL, "--workers", "2"))
    assert len(one) == 8 and one == two


def test_another_seed_draws_other_pictures(small_set, tmp_path):
    other = contents(draw(tmp_path / "other", *SMALL, "--seed", "1"))
    assert not set(contents(small_set).values()) & set(other.values())


def test_train_and_valid_share_no_picture(data_set):
    images = contents(data_set / "images")
    assert len(set(images.values())) == len(images) > 100
    train, valid = (set(columns(data_set, split)["imgname"]) for split in ("train", "valid"))
    assert not train & valid
    assert {name.decode() for name in train | valid} == images.keys()


def test_h5_has_the_keys_types_and_shapes_of_mpii(data_set):
    layout = {key: (v.dtype.str, v.shape[1:]) for key, v in columns(data_set, "train").items()}
    # As in princeton-vl's valid.h5.
    floats = ("index", "normalize", "person", "scale", "torsoangle")
    assert layout == {
        "center": ("<f8", (2,)), "imgname": ("|S13", ()), "part": ("<f8", (16, 2)),
        "visible": ("<f8", (16,)), **dict.fromkeys(floats, ("<f8", ())),
    }  # fmt: skip
    assert [len(columns(data_set, s)["scale"]) for s in ("train", "valid")] == [TRAIN, VALID]


def test_marked_joints_are_inside_the_picture_and_some_are_hidden(data_set):
    rows = columns(data_set, "train")
    assert set(np.unique(rows["visible"])) == {0.0, 1.0}
    assert 0.02 < (~marked(rows)).mean() < 0.12
    assert not rows["visible"][~marked(rows)].any()
    assert 0.04 < 1 - rows["visible"][marked(rows)].mean() < 0.3
    assert marked(rows)[:, [HEAD_TOP, UPPER_NECK]].all() and marked(rows).sum(1).min() >= 8
    for name, part in zip(rows["imgname"], rows["part"], strict=True):
        height, width = cv2.imread(str(data_set / "images" / name.decode())).shape[:2]
        assert (part >= 0).all() and (part <= [width - 1, height - 1]).all()


def test_scale_and_head_length_follow_mpii(data_set):
    rows = columns(data_set, "train")
    head = rows["part"][:, HEAD_TOP] - rows["part"][:, UPPER_NECK]
    np.testing.assert_allclose(rows["normalize"], 0.75 * np.hypot(head[:, 0], head[:, 1]))
    whole = marked(rows).all(1)
    extent = np.ptp(rows["part"][whole], axis=1).max(1)
    # Hands and feet are outside the joints; the scale is jittered by 5 %.
    ratio = 1.25 * extent / (200 * rows["scale"][whole])
    assert len(ratio) > 25 and ratio.min() > 0.7 and ratio.max() < 1.06


def test_the_mean_pose_is_a_bad_answer(data_set):
    train, valid = columns(data_set, "train"), columns(data_set, "valid")

    def in_box(rows):
        return (rows["part"] - rows["center"][:, None]) / (200 * rows["scale"][:, None, None])

    weight = marked(train)[..., None]
    mean = (in_box(train) * weight).sum(0) / weight.sum(0)
    error = np.linalg.norm(in_box(valid) - mean, axis=2) * 200 * valid["scale"][:, None]
    right = error < 0.5 * valid["normalize"][:, None]
    assert 0.01 < right[marked(valid)].mean() < 0.2


def hues_deg(data_set: Path, joints: tuple[int, int]) -> np.ndarray:
    """Hue of the mean colour of 3 x 3 px around visible joints."""
    rows, hues = columns(data_set, "train"), []
    for row, name in enumerate(rows["imgname"]):
        image = cv2.imread(str(data_set / "images" / name.decode()))
        for joint in joints:
            if rows["visible"][row, joint]:
                x, y = np.round(rows["part"][row, joint]).astype(int)
                patch = image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                mean = patch.mean((0, 1)).astype(np.float32).reshape(1, 1, 3)
                hues.append(float(cv2.cvtColor(mean, cv2.COLOR_BGR2HSV)[0, 0, 0]))
    return np.array(hues)


def test_right_wrists_and_ankles_are_red_and_left_ones_blue(data_set):
    right = hues_deg(data_set, (R_WRIST, R_ANKLE))
    left = hues_deg(data_set, (L_WRIST, L_ANKLE))
    assert min(len(right), len(left)) > 100
    # The halves of the hue circle around 343 and 206 degrees meet near 94 and 274.
    assert ((right > 274) | (right < 94)).mean() > 0.95
    assert ((left > 94) & (left < 274)).mean() > 0.95


def test_left_is_left_seen_from_the_person():
    # Left x up = front in the axes x right, y down, z away: (1,0,0) x (0,-1,0) = (0,0,-1).
    for seed in range(50):
        body = synthetic.sample_body(np.random.default_rng(seed))
        left = body[L_SHOULDER] - body[R_SHOULDER]
        front = np.cross(left, body[THORAX] - body[PELVIS])
        assert front @ (body[synthetic.FACE] - body[synthetic.SKULL]) > 0


def test_a_second_run_changes_nothing_and_other_options_are_refused(small_set, tmp_path, capsys):
    before = contents(small_set)
    draw(small_set, *SMALL)
    assert "already drawn" in capsys.readouterr().out
    for folder, options in ((small_set, ("--seed", "5")), (tmp_path, ())):
        with pytest.raises(InputError, match="delete"):
            draw(folder, *SMALL, *options)
    assert contents(small_set) == before and not list(tmp_path.iterdir())
