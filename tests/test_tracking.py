"""People followed through videos, smoothed joints, ONNX detectors, and DeepLabCut's columns."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import make_trainer, tiny_config

from common.errors import InputError
from evaluation.detector import Detector
from evaluation.estimator import PoseEstimator, Poses
from evaluation.predictions import deeplabcut_table
from evaluation.tracking import OneEuroFilter, Track, Tracker, iou, square_of_joints
from pipelines.boxes import Square
from tools import predict

SURE_4 = np.ones(4)


def joints_about(x: float, y: float) -> np.ndarray:
    """Four joints in a box of 81 x 81 px, whose middle is (x, y)."""
    return np.array([[x - 40.0, y - 40], [x + 40, y - 40], [x, y + 40], [x, y]])


def test_a_jump_is_smoothed_as_worked_by_hand():
    """At 2 pi frames/s a cutoff of 1 Hz has the weight 1/2, and f Hz the weight f / (f + 1)."""
    smooth = OneEuroFilter(1.0, 1.0, frames_per_second=2 * np.pi)
    np.testing.assert_array_equal(smooth(np.zeros((1, 2)), 10.0), [[0, 0]])
    jump = np.array([[6.0, 8.0]])  # 10 px are one side of the square, so 2 pi sides/s
    speed = np.pi  # half of it
    first = 10 * (1 + speed) / (2 + speed)
    np.testing.assert_allclose(smooth(jump, 10.0), [[0.6 * first, 0.8 * first]])
    speed = (speed + (10 - first) * 2 * np.pi / 10) / 2
    second = first + (10 - first) * (1 + speed) / (2 + speed)
    np.testing.assert_allclose(smooth(jump, 10.0), [[0.6 * second, 0.8 * second]])


def test_noise_of_a_joint_at_rest_is_smoothed_more_than_a_fast_joint_lags():
    rng = np.random.default_rng(0)
    smooth = OneEuroFilter(1.0, 30.0, 30.0)
    rest = 50 + rng.normal(0, 0.3, (300, 1, 2))
    found = np.array([smooth(points, 100.0) for points in rest])
    assert np.diff(found[30:], axis=0).std() < 0.3 * np.diff(rest[30:], axis=0).std()
    smooth = OneEuroFilter(1.0, 30.0, 30.0)
    walk = np.stack([np.arange(300.0) * 5, np.zeros(300)], axis=1)[:, None]
    found = np.array([smooth(points, 100.0) for points in walk])
    assert 0 < (walk - found)[30:, 0, 0].max() < 5  # less than the way of one frame


def test_the_square_about_joints_is_the_boxs_square_with_mpiis_margin():
    joints = np.array([[10.0, 20.0], [50.0, 100.0], [30.0, 40.0]])  # 41 x 81 px
    assert square_of_joints(joints) == pytest.approx((30.0, 60.0, 1.25 * 81 / 200))
    assert square_of_joints(joints[:1]) is None
    assert square_of_joints(np.repeat(joints[:1], 3, axis=0)) is None


def test_iou_of_squares_as_worked_by_hand():
    a = Square(50, 50, 0.1)  # 20 px
    assert iou(a, a) == pytest.approx(1)
    assert iou(a, Square(60, 50, 0.1)) == pytest.approx(200 / 600)
    assert iou(a, Square(50, 50, 0.2)) == pytest.approx(400 / 1600)
    assert iou(a, Square(70, 50, 0.1)) == 0 == iou(a, Square(100, 100, 0.1))


def test_a_joint_that_is_not_found_moves_as_the_others():
    """Its arbitrary place does not count, and the square does not shrink to the other joints."""
    track = Track(0, None)
    first = track.next_square(joints_about(100, 100), SURE_4)
    moved = joints_about(103, 98)
    moved[2] = 500, 500
    square = track.next_square(moved, np.array([1, 1, 0.1, 1]))
    assert square == pytest.approx((first.x + 3, first.y - 2, first.scale))
    only_two = track.next_square(moved, np.array([1, 0.1, 0.1, 1]))
    assert only_two == pytest.approx(square)
    assert track.next_square(moved, np.array([1, 0.1, 0.1, 0.1])) is None
    track = Track(0, None)
    # Nothing is known of the others yet.
    again = track.next_square(joints_about(30, 30), np.array([1, 1, 0, 0]))
    assert again == pytest.approx(square_of_joints(joints_about(30, 30)[:2]))


def test_a_person_is_looked_for_about_the_last_joints_until_lost():
    start = Square(100, 100, 1.0)
    tracker = Tracker(True, lambda: None)
    (track,) = tracker.look([start])
    assert track.square == start
    tracker.update(track, joints_about(120, 90), SURE_4)
    assert tracker.look([]) == [track]
    assert track.square == square_of_joints(joints_about(120, 90))
    tracker.update(track, joints_about(121, 90), SURE_4)
    assert track.square == square_of_joints(joints_about(120, 90))  # one pixel does not move it
    tracker.update(track, joints_about(121, 90), 0.1 * SURE_4)
    assert tracker.identities() == set()
    assert tracker.look([]) == []


def test_a_person_whose_joints_fall_onto_one_place_is_lost():
    tracker = Tracker(True, lambda: None)
    (track,) = tracker.look([Square(100, 100, 1.0)])
    tracker.update(track, 100 + np.array([[0, 0], [3, 0], [0, 3], [3, 3.0]]), SURE_4)
    assert tracker.identities() == set()


def found_at(tracker: Tracker, places: dict[int, float], score: float = 1.0) -> None:
    """Give each identity its joints at (x, 100)."""
    for track in tracker.tracks:
        tracker.update(track, joints_about(places[track.identity], 100), score * SURE_4)


def squares(tracks: list[Track]) -> dict[int, float]:
    return {track.identity: track.square.x for track in tracks}


def test_detections_keep_the_identities_of_the_people_whom_they_overlap():
    tracker = Tracker(True, lambda: None)
    assert squares(tracker.look([Square(100, 100, 0.5), Square(180, 100, 0.5)])) == {0: 100, 1: 180}
    found_at(tracker, {0: 100, 1: 180})
    # In another order, both moved to the right; then only one is detected; then nobody.
    assert squares(tracker.look([Square(190, 100, 0.5), Square(110, 100, 0.5)])) == {0: 110, 1: 190}
    found_at(tracker, {0: 112, 1: 192})
    assert squares(tracker.look([Square(189, 100, 0.5)])) == {0: 110, 1: 189}
    found_at(tracker, {0: 112, 1: 192})
    assert [track.identity for track in tracker.look([])] == [0, 1]


def test_a_new_person_gets_the_lowest_free_identity():
    tracker = Tracker(True, lambda: None)
    one, two = tracker.look([Square(100, 100, 0.5), Square(180, 100, 0.5)])
    tracker.update(one, joints_about(100, 100), 0 * SURE_4)
    tracker.update(two, joints_about(180, 100), SURE_4)
    assert [t.identity for t in tracker.look([Square(400, 100, 0.5), Square(600, 100, 0.5)])] == [
        0, 1, 2
    ]  # fmt: skip


def test_two_tracks_of_the_same_person_become_one():
    tracker = Tracker(True, lambda: None)
    one, _ = tracker.look([Square(100, 100, 0.5), Square(180, 100, 0.5)])
    found_at(tracker, {0: 100, 1: 100})
    assert tracker.look([]) == [one]


def test_without_following_only_the_given_people_are_looked_for():
    tracker = Tracker(False, lambda: None)
    (track,) = tracker.look([Square(100, 100, 0.5)])
    tracker.update(track, joints_about(300, 300), SURE_4)
    assert tracker.look([Square(105, 100, 0.5)]) == [track] and track.square.x == 105
    assert tracker.look([]) == []


def test_smoothing_begins_anew_when_a_person_is_lost():
    tracker = Tracker(False, lambda: OneEuroFilter(1.0, 0.0, 30))
    (track,) = tracker.look([Square(100, 100, 0.5)])
    first, later = joints_about(100, 100), joints_about(110, 100)
    np.testing.assert_array_equal(tracker.update(track, first, SURE_4), first)
    assert (tracker.update(track, later, SURE_4) < later)[:, 0].all()
    np.testing.assert_array_equal(tracker.update(track, later, 0 * SURE_4), later)
    np.testing.assert_array_equal(tracker.update(track, later, SURE_4), later)


def test_joints_beyond_the_picture_do_not_keep_a_person():
    """Else the square would leave the picture too."""
    tracker = Tracker(True, lambda: None)
    (track,) = tracker.look([Square(50, 50, 0.5)])
    keypoints = [[120.0, 50.0, 1.0], [-1.0, 50.0, 1.0], [50.0, 99.5, 1.0], [50.0, 99.0, 1.0]]
    person = {"width": 100, "height": 100, "keypoints": keypoints}
    predict.smooth_joints(person, track, tracker)
    assert track.square is None and person["keypoints"] == keypoints


def test_the_csv_is_deeplabcuts():
    """As its documentation shows: scorer, bodyparts, coords, and a row for each frame."""
    first = {"frame": 0, "person": 0, "keypoints": [[1.5, 2.0, 0.9], [3.0, 4.25, 0.123456]]}
    table = deeplabcut_table([first], ("nose", "tail"), "DLC", frames=2)
    assert table == (
        "scorer,DLC,DLC,DLC,DLC,DLC,DLC\n"
        "bodyparts,nose,nose,nose,tail,tail,tail\n"
        "coords,x,y,likelihood,x,y,likelihood\n"
        "0,1.5,2.0,0.9,3.0,4.25,0.1235\n"
        "1,,,,,,\n"
    )
    second = {"frame": 1, "person": 4, "keypoints": [[5.0, 6.0, 1.0], [7.0, 8.0, 1.0]]}
    lines = deeplabcut_table([first, second], ("nose", "tail"), "DLC", frames=2).splitlines()
    assert lines[1].split(",")[5:9] == ["individual0"] * 2 + ["individual4"] * 2
    assert lines[4:] == ["0,1.5,2.0,0.9,3.0,4.25,0.1235,,,,,,", "1,,,,,,,5.0,6.0,1.0,7.0,8.0,1.0"]


def write_detector(path: Path, rows: list[list[float]]) -> Path:
    """An ONNX graph for 64 x 48 px with these rows, whose scores it multiplies by the mean red."""
    onnx = pytest.importorskip("onnx", reason="no onnx (pip install -e '.[export]')")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    table = np.array([rows], np.float32)
    scores = np.zeros_like(table)
    scores[..., 4] = table[..., 4]
    constants = {"first": np.array([0]), "rest": table - scores, "scores": scores}
    nodes = [
        helper.make_node("Gather", ["picture", "first"], ["red"], axis=1),
        helper.make_node("ReduceMean", ["red"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["scores", "mean"], ["scaled"]),
        helper.make_node("Add", ["rest", "scaled"], ["found"]),
    ]
    graph = helper.make_graph(
        nodes, "detector",
        [helper.make_tensor_value_info("picture", kind, [1, 3, 48, 64])],
        [helper.make_tensor_value_info("found", kind, list(table.shape))],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_a_detectors_boxes_are_in_px_of_the_picture(tmp_path):
    """100 x 50 px become 64 x 32, with 8 grey rows above and below."""
    rows = [
        [16, 16, 48, 32, 0.5, 0],
        [0, 0, 32, 48, 1, 0],
        [1, 9, 9, 20, 1, 3],
        [1, 9, 9, 20, 0.3, 0],
    ]
    detect = Detector(write_detector(tmp_path / "d.onnx", rows), 1.25, min_score=0.2)
    picture = np.zeros((50, 100, 3), np.uint8)
    picture[..., 2] = 153  # BGR
    first, second = detect(picture)  # the mean red is 0.549, so the last row's score is 0.16
    assert first == pytest.approx((25 + 49 / 2, 12.5 + 24 / 2, 1.25 * 50 / 200))
    assert second == pytest.approx((49 / 2, 49 / 2, 1.25 * 50 / 200))  # cut to the picture


def test_a_detector_of_another_layout_is_refused(tmp_path):
    detect = Detector(write_detector(tmp_path / "d.onnx", [[0, 0, 9, 9, 1]]), 1.25, 0.0)
    with pytest.raises(InputError, match=r"(?s)shape \(1, 1, 5\).*\(1, N, 6\)"):
        detect(np.zeros((50, 100, 3), np.uint8))


# Videos: a white spot moves on black. The network is replaced by one that finds the spot.


@pytest.fixture(scope="module")
def checkpoint(tiny_shards, tmp_path_factory) -> Path:
    run = make_trainer(tiny_config(tiny_shards), tmp_path_factory.mktemp("runs") / "tiny")
    run.save(["best.pt"])
    return run.folder / "best.pt"


def find_the_spot(self: PoseEstimator, crops: list) -> Poses:
    """A grid of 16 joints about the spot, 6 px apart; scores of 0 if it is not in the crop."""
    grid = 6.0 * np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2) - 9
    joints, scores = [], []
    for crop in crops:
        y, x = np.nonzero(crop.images_NHW3[0].numpy().max(axis=-1) > 128)
        middle = np.array([x.mean(), y.mean()]) if len(x) else np.zeros(2)
        place = np.linalg.inv(np.vstack([crop.input_from_image_N23[0], [0, 0, 1]])) @ [*middle, 1]
        joints.append(place[:2] + grid)
        scores.append(np.full(16, float(len(x) > 0)))
    count = len(crops)
    shape, unknown = (count, 16), np.full((count, 16), np.nan)
    return Poses(np.reshape(joints, (*shape, 2)), np.reshape(scores, shape), unknown)


@pytest.fixture
def video(checkpoint, tmp_path, monkeypatch):
    """Write a video of spots and predict it: returns the entries. spots: for each frame."""
    monkeypatch.setattr(PoseEstimator, "predict", find_the_spot)

    def run(spots: list[list[tuple[int, int]]], *words: object) -> list[dict]:
        code, path = cv2.VideoWriter.fourcc(*"MJPG"), tmp_path / "video.avi"
        writer = cv2.VideoWriter(str(path), code, 30.0, (320, 240))
        for places in spots:
            image = np.zeros((240, 320, 3), np.uint8)
            for place in places:
                cv2.circle(image, place, 6, (255, 255, 255), -1)
            writer.write(image)
        writer.release()
        line = ["--checkpoint", checkpoint, "--device", "cpu", path, *words]
        predict.main([*map(str, line), "--save-predictions", str(tmp_path / "p.json")])
        return json.loads((tmp_path / "p.json").read_text())

    return run


def middles(entries: list[dict]) -> np.ndarray:
    return np.array([np.mean(entry["keypoints"], axis=0)[:2] for entry in entries])


WALK = [[(60 + 6 * n, 100)] for n in range(30)]
"""A spot that walks 174 px to the right."""
BOX = ("--box", 40, 80, 41, 41)


def test_a_person_is_followed_from_a_box_in_the_first_frame(video, tmp_path):
    entries = video(WALK, *BOX, "--save-csv", tmp_path / "joints.csv")
    assert [(e["frame"], e["person"]) for e in entries] == [(n, 0) for n in range(30)]
    np.testing.assert_allclose(middles(entries), [spot[0] for spot in WALK], atol=0.5)
    assert max(e["scale"] for e in entries) < 0.3  # never the whole picture
    lines = (tmp_path / "joints.csv").read_text().splitlines()
    assert len(lines) == 33 and lines[-1].startswith("29,")
    entries = video(WALK, *BOX, "--no-track")
    assert [max(s for _, _, s in e["keypoints"]) for e in entries][:2] == [1, 1]
    assert sum(max(s for _, _, s in e["keypoints"]) for e in entries) < 10


def test_a_lost_person_is_found_again_in_the_whole_picture(video):
    """The spot is gone in frames 10 and 11, and jumps."""
    spots = WALK[:10] + [[], []] + [[(30, 200)]] * 3
    entries = video(spots)
    whole = [n for n, e in enumerate(entries) if e["scale"] == 320 / 200]
    assert whole == [0, 11, 12]  # frame 10 is looked at where frame 9 had the spot
    np.testing.assert_allclose(middles(entries)[12:], [[30, 200]] * 3, atol=0.5)


def test_the_finder_looks_at_the_whole_picture_in_place_of_the_network(video, checkpoint):
    entries = video([*WALK[:10], [], *WALK[:3]], "--finder", checkpoint)
    whole = [n for n, e in enumerate(entries) if e["scale"] == 320 / 200]
    assert whole == []
    np.testing.assert_allclose(middles(entries)[[0, 11]], [[60, 100]] * 2, atol=0.5)


def test_smoothing_delays_the_joints_and_the_square_follows_the_unsmoothed(video):
    plain, smooth = (middles(video(WALK, *BOX, *words)) for words in ((), ("--smooth", 1)))
    delay = (plain - smooth)[5:, 0]
    assert delay.min() > 0 and delay.max() < 6
    slower = middles(video(WALK, *BOX, "--smooth", 1, "--beta", 0))
    assert (plain - slower)[-1, 0] > 3 * delay[-1]


def test_coco_detections_of_frames_keep_their_identities_and_weak_ones_are_left_out(
    video, tmp_path
):
    spots = [[(60 + 4 * n, 60), (200 - 4 * n, 180)] for n in range(8)]
    rows = [
        {"image_id": n, "category_id": 1, "bbox": [x - 10, y - 10, 21, 21], "score": score}
        for n in (0, 4)
        for (x, y), score in zip(reversed(spots[n]), (0.9, 0.8), strict=True)
    ]
    rows.append({"image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.2})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    entries = video(spots, "--people", tmp_path / "d.json", "--save-coco", tmp_path / "c.json")
    assert len(entries) == 16
    found = {
        (e["frame"], e["person"]): middle
        for e, middle in zip(entries, middles(entries), strict=True)
    }
    for n, (one, other) in enumerate(spots):  # the file names the second spot first
        np.testing.assert_allclose(found[n, 0], other, atol=0.5)
        np.testing.assert_allclose(found[n, 1], one, atol=0.5)
    coco = json.loads((tmp_path / "c.json").read_text())
    assert [result["image_id"] for result in coco] == [n for n in range(8) for _ in range(2)]
    assert len(video(spots, "--people", tmp_path / "d.json", "--no-track")) == 4


def test_a_video_takes_its_people_from_a_detector(video, tmp_path):
    path = write_detector(tmp_path / "d.onnx", [[10, 14, 14, 18, 1, 0]])  # the spot at (60, 80)
    entries = video([[(60, 80)]] * 3, "--detector", path, "--min-box-score", 0)
    assert [(e["frame"], e["person"]) for e in entries] == [(0, 0), (1, 0), (2, 0)]
    assert entries[1]["center"] == [59.5, 79.5] and entries[1]["scale"] == 1.25 * 20 / 200


def test_a_video_in_which_nobody_is_found_gives_empty_files(video, tmp_path, capsys):
    path, table = (
        write_detector(tmp_path / "d.onnx", [[10, 14, 14, 18, 0.1, 0]]),
        tmp_path / "x.csv",
    )
    table.write_text("of an earlier run")
    assert video([[(60, 80)]] * 3, "--detector", path, "--save-csv", table) == []
    assert "nobody was found in 3 frames" in capsys.readouterr().err
    header, cells = 3, 16 * 3 * ","
    assert table.read_text().splitlines()[header:] == [f"{n}{cells}" for n in range(3)]


@pytest.mark.parametrize("options", [("--smooth", "-1"), ("--smooth", "nan"), ("--beta", "-5")])
def test_a_filter_without_a_positive_frequency_is_refused(video, options):
    with pytest.raises(InputError, match="not positive"):
        video([[(60, 80)]], *options)
