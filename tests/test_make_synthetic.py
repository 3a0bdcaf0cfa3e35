import hashlib
import json
import sys
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
from tools import make_synthetic
from tools.synthetic_people import (
    PARTS,
    Body,
    Canvas,
    draw_person,
    sample_body,
    sample_look,
    visible_joints,
)
from tools.synthetic_scenes import THING, torso_angle

TRAIN, VALID = 170, 130


def draw(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_synthetic.py", "--output", str(output), *options])
    make_synthetic.main()


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def columns(folder: Path, split: str) -> dict[str, np.ndarray]:
    with h5py.File(folder / "annot" / f"{split}.h5") as file:
        return {key: file[key][:] for key in file}


def marked(rows: dict[str, np.ndarray]) -> np.ndarray:
    return rows["part"].any(axis=2)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "synthetic"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw(monkeypatch, output, "--train", str(TRAIN), "--valid", str(VALID), "--workers", "2")
    return output


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("small") / "one"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw(monkeypatch, output, *SMALL, "--workers", "1")
    return output


SMALL = ("--train", "9", "--valid", "4", "--max-width", "480")


def test_one_and_two_workers_write_the_same_bytes(small_set, tmp_path, monkeypatch):
    draw(monkeypatch, tmp_path / "two", *SMALL, "--workers", "2")
    one, two = hashes(small_set), hashes(tmp_path / "two")
    assert len(one) > 6 and {"annot/train.h5", "annot/valid.h5", "synthetic.json"} <= one.keys()
    assert one == two


def test_another_seed_draws_other_pictures(small_set, tmp_path, monkeypatch):
    draw(monkeypatch, tmp_path / "other", *SMALL, "--workers", "1", "--seed", "1")
    one, other = hashes(small_set), hashes(tmp_path / "other")
    assert not set(one.values()) & set(other.values())


def test_train_and_valid_share_no_picture(data_set):
    images = hashes(data_set / "images")
    assert len(set(images.values())) == len(images) > 100
    train, valid = (set(columns(data_set, split)["imgname"]) for split in ("train", "valid"))
    assert not train & valid
    assert {name.decode() for name in train | valid} == images.keys()


@pytest.mark.parametrize(("split", "people"), [("train", TRAIN), ("valid", VALID)])
def test_h5_has_the_keys_types_and_shapes_of_mpii(data_set, split, people):
    with h5py.File(data_set / "annot" / f"{split}.h5") as file:
        assert file.attrs["name"] == "synthetic"
        layout = {key: (file[key].dtype.str, file[key].shape) for key in file}
    # As in princeton-vl's valid.h5.
    assert layout == {
        "center": ("<f8", (people, 2)),
        "imgname": ("|S13", (people,)),
        "index": ("<f8", (people,)),
        "normalize": ("<f8", (people,)),
        "part": ("<f8", (people, 16, 2)),
        "person": ("<f8", (people,)),
        "scale": ("<f8", (people,)),
        "torsoangle": ("<f8", (people,)),
        "visible": ("<f8", (people, 16)),
    }


def test_unmarked_joints_are_zero_and_not_visible(data_set):
    rows = columns(data_set, "train")
    assert set(np.unique(rows["visible"])) == {0.0, 1.0}
    assert 0.02 < (~marked(rows)).mean() < 0.12
    assert not rows["visible"][~marked(rows)].any()


def test_some_marked_joints_are_hidden(data_set):
    rows = columns(data_set, "train")
    hidden = 1 - rows["visible"][marked(rows)].mean()
    assert 0.08 < hidden < 0.35


def test_everyone_has_head_and_neck_and_eight_joints_inside_the_picture(data_set):
    rows = columns(data_set, "train")
    assert marked(rows)[:, [HEAD_TOP, UPPER_NECK]].all()
    assert marked(rows).sum(1).min() >= 8
    for name, part in zip(rows["imgname"], rows["part"], strict=True):
        height, width = cv2.imread(str(data_set / "images" / name.decode())).shape[:2]
        assert (part >= 0).all() and (part <= [width - 1, height - 1]).all()


def test_normalize_is_three_quarters_of_neck_to_head_top(data_set):
    rows = columns(data_set, "valid")
    head = rows["part"][:, 9] - rows["part"][:, 8]
    np.testing.assert_allclose(rows["normalize"], 0.75 * np.hypot(head[:, 0], head[:, 1]))
    assert rows["normalize"].min() > 3


def test_scale_is_the_enlarged_extent_of_the_person(data_set):
    rows = columns(data_set, "train")
    whole = marked(rows).all(1)
    assert whole.sum() > 50
    extent = np.ptp(rows["part"][whole], axis=1).max(1)
    # Hands and feet reach beyond the joints; the scale itself is jittered by 5 %.
    ratio = 1.25 * extent / (200 * rows["scale"][whole])
    assert ratio.min() > 0.7 and ratio.max() < 1.06 and 0.85 < ratio.mean() < 1.0


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
    """Hue of the mean colour of 5 x 5 px around visible joints."""
    rows, hues = columns(data_set, "train"), []
    for row, name in enumerate(rows["imgname"]):
        image = cv2.imread(str(data_set / "images" / name.decode()))
        for joint in joints:
            if rows["visible"][row, joint]:
                x, y = np.round(rows["part"][row, joint]).astype(int)
                patch = image[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                mean = patch.mean((0, 1)).astype(np.float32).reshape(1, 1, 3)
                hues.append(float(cv2.cvtColor(mean, cv2.COLOR_BGR2HSV)[0, 0, 0]))
    return np.array(hues)


def test_right_wrists_and_ankles_are_red_and_left_ones_blue(data_set):
    right = hues_deg(data_set, (R_WRIST, R_ANKLE))
    left = hues_deg(data_set, (L_WRIST, L_ANKLE))
    assert min(len(right), len(left)) > 150
    # The halves of the hue circle around 343 and 206 degrees meet near 94 and 274.
    assert ((right > 274) | (right < 94)).mean() > 0.95
    assert ((left > 94) & (left < 274)).mean() > 0.95


def a_drawn_person(seed: int) -> tuple[Canvas, Body]:
    rng = np.random.default_rng(seed)
    body = sample_body(rng).placed(200.0, np.array([250.0, 250.0]))
    canvas = Canvas(np.zeros((500, 500, 3), np.uint8), np.zeros((500, 500), np.uint8))
    draw_person(canvas, body, sample_look(rng), 1)
    return canvas, body


def test_a_thing_in_front_hides_exactly_the_joints_it_covers():
    for seed in range(10):
        canvas, body = a_drawn_person(seed)
        before = visible_joints(canvas.owners, body, 1)
        middle = body.joints[PELVIS, 0]
        canvas.owners[:, int(middle) :] = THING
        after = visible_joints(canvas.owners, body, 1)
        clear_right = body.joints[:, 0] > middle + 8
        clear_left = body.joints[:, 0] < middle - 8
        assert before[clear_right].any() or before[clear_left].any()
        assert not after[clear_right].any()
        assert (after[clear_left] == before[clear_left]).all()


def test_another_person_in_front_hides_joints():
    canvas, body = a_drawn_person(3)
    before = visible_joints(canvas.owners, body, 1)
    draw_person(canvas, body, sample_look(np.random.default_rng(0)), 1 + PARTS)
    assert before.sum() >= 8
    assert not visible_joints(canvas.owners, body, 1).any()


def test_left_is_left_seen_from_the_person():
    # Left x up = front in the axes x right, y down, z away: (1,0,0) x (0,-1,0) = (0,0,-1).
    for seed in range(50):
        body = sample_body(np.random.default_rng(seed))
        left = body.joints[L_SHOULDER] - body.joints[R_SHOULDER]
        up = body.joints[THORAX] - body.joints[PELVIS]
        assert np.cross(left, up) @ body.chest_3 > 0


def test_torso_angle_is_that_of_mpii():
    joints = np.zeros((16, 2))
    joints[[PELVIS, THORAX]] = [[974, 446], [985, 253]]
    assert torso_angle(joints) == pytest.approx(3.2620334773967556)  # row 0 of MPII's valid.h5
    joints[THORAX] = [974 - 68, 446 + 19]
    assert torso_angle(joints) == pytest.approx(
        254.38901147
    )  # a thorax left of and below the pelvis


def test_pictures_are_jpegs_of_three_channels_up_to_1280_x_720(data_set):
    sizes = set()
    for path in (data_set / "images").iterdir():
        assert path.read_bytes()[:3] == b"\xff\xd8\xff"
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert image.ndim == 3 and image.shape[2] == 3
        sizes.add((image.shape[1], image.shape[0]))
    assert len(sizes) >= 4
    assert max(w for w, _ in sizes) == 1280 and max(h for _, h in sizes) == 720


def test_max_width_keeps_pictures_narrow(small_set):
    widths = {cv2.imread(str(path)).shape[1] for path in (small_set / "images").iterdir()}
    assert widths == {480}


def test_a_second_run_says_already_drawn_and_touches_nothing(small_set, monkeypatch, capsys):
    before = hashes(small_set)
    draw(monkeypatch, small_set, *SMALL, "--workers", "1")
    assert "already drawn" in capsys.readouterr().out
    assert hashes(small_set) == before


def test_a_folder_of_other_options_is_refused(small_set, monkeypatch):
    before = hashes(small_set)
    with pytest.raises(InputError, match="delete"):
        draw(monkeypatch, small_set, *SMALL, "--seed", "5")
    assert hashes(small_set) == before


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="did not write"):
        draw(monkeypatch, tmp_path, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_what_an_interrupted_run_left_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "out.partial" / "images").mkdir(parents=True)
    (tmp_path / "out.partial" / "images" / "stale.jpg").write_bytes(b"")
    draw(monkeypatch, tmp_path / "out", *SMALL, "--workers", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "images" / "stale.jpg").exists()
    assert json.loads((tmp_path / "out" / "synthetic.json").read_text())["train"] == 9


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train", "-1"),
        ("--valid", "0"),
        ("--seed", "-3"),
        ("--max-width", "100"),
        ("--workers", "0"),
    ],
)
def test_an_option_out_of_range_is_named(option, value, tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught:
        draw(monkeypatch, tmp_path / "out", option, value)
    assert caught.value.where == option and caught.value.found == value
    assert not list(tmp_path.iterdir())
