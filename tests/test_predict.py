"""A trained network at work: the Python call, and tools/predict.py over it."""

import csv
import json
import re
import signal
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, noise_picture, write_jpeg
from helpers import exif, make_trainer, steps, tiny_config, with_segment
from PIL import Image

import evaluate
from common import distributed
from common.errors import InputError, run_main
from configs.skeleton import MPII, Skeleton
from evaluation import visualize
from evaluation.estimator import PoseEstimator, Poses, read_picture
from evaluation.video import read_frames
from pipelines import heatmaps
from pipelines.annotations import read_annotations
from tools import predict


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A checkpoint, barely trained."""
    run = make_trainer(tiny_config(tiny_shards), tmp_path_factory.mktemp("runs") / "tiny")
    steps(run, 2)
    run.save(["best.pt"])
    return run.folder / "best.pt"


@pytest.fixture(scope="module")
def estimator(trained) -> PoseEstimator:
    return PoseEstimator.from_checkpoint(trained, device="cpu")


@pytest.fixture
def run(trained):
    """Run tools/predict.py in this process, on the CPU."""

    def run_program(*words: object, checkpoint: Path = trained) -> None:
        line = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", 2, *words]
        predict.main([*map(str, line)])

    return run_program


def read_json(path: Path) -> tuple[list[dict], np.ndarray]:
    entries = json.loads(path.read_text())
    return entries, np.array([entry["keypoints"] for entry in entries])


def write_csv(path: Path, header: str, rows: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def people_file(annotation: Path, out: Path) -> Path:
    """The people of an annotation file as predict.py takes them, in full precision."""
    people, _ = read_annotations(annotation, "valid")
    rows = [
        [name, *map(float, center), float(scale)]
        for name, center, scale in zip(people.images, people.center, people.scale, strict=True)
    ]
    return write_csv(out, "image,center_x,center_y,scale", rows)


@pytest.mark.parametrize("flip", ["--flip", "--no-flip"])
def test_evaluate_and_predict_find_the_same_joints(flip, run, trained, tiny_set, tmp_path, capsys):
    annotation = tiny_set / "annot" / "valid.h5"
    same = ["--batch-size", 3, flip]  # batches of another size round otherwise, by 1e-4 px
    words = ["--checkpoint", trained, "--annotations", annotation, "--images",
             tiny_set / "images", "--save-predictions", tmp_path / "e.json", "--device", "cpu",
             "--workers", 0, *same]  # fmt: skip
    evaluate.main([*map(str, words)])
    people = people_file(annotation, tmp_path / "people.csv")
    run("--people", people, tiny_set / "images", "--save-predictions", tmp_path / "p.json", *same)
    (expected, theirs), (entries, mine) = (read_json(tmp_path / f"{n}.json") for n in "ep")
    assert mine.shape == (5, 16, 3)
    assert all(e["joints"] == [*MPII.names] for e in (*entries, *expected))
    np.testing.assert_array_equal(mine, theirs)
    assert [e["image"] for e in entries] == [e["image"] for e in expected]
    words = ["--predictions", tmp_path / "p.json", "--annotations", annotation]
    evaluate.main([*map(str, words)])
    assert "predictions @0.5" in capsys.readouterr().out


def test_the_python_call_the_json_and_the_coco_results_agree(run, estimator, tiny_set, tmp_path):
    pictures = sorted((tiny_set / "images").glob("*.jpg"))[:5]
    run(*pictures, "--box", 20, 10, 50, 60, "--save-predictions", tmp_path / "p.json",
        "--save-coco", tmp_path / "c.json")  # fmt: skip
    _, mine = read_json(tmp_path / "p.json")
    keypoints, scores, _ = estimator(pictures, boxes=[[20, 10, 50, 60]] * 5)
    np.testing.assert_array_equal(mine[..., :2], keypoints)
    np.testing.assert_array_equal(mine[..., 2], scores)
    coco = json.loads((tmp_path / "c.json").read_text())
    assert [one["image_id"] for one in coco] == list(range(5))
    np.testing.assert_array_equal([one["keypoints"] for one in coco], mine.reshape(5, 48))
    np.testing.assert_allclose([one["score"] for one in coco], scores.mean(axis=1))


def test_a_call_leaves_the_cores_of_the_trainings_workers_to_other_processes(
    tiny_shards, tmp_path, monkeypatch
):
    """Four cores and three workers in training leave one thread; the caller's count is restored."""
    monkeypatch.setattr(distributed, "usable_cores", lambda: 4)
    trainer = make_trainer(tiny_config(tiny_shards, data={"workers": 3}), tmp_path)
    trainer.save(["best.pt"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    image = noise_picture(np.random.default_rng(3), 40, 40)
    PoseEstimator.from_checkpoint(tmp_path / "best.pt", device="cpu")(image)
    assert used == [1, 4]
    used.clear()
    PoseEstimator.from_checkpoint(tmp_path / "best.pt", device="cpu", threads=3)(image)
    assert used == [3, 4]


def test_one_picture_may_hold_any_number_of_people(estimator):
    image = noise_picture(np.random.default_rng(3), 200, 150)
    boxes = [[0, 0, 80, 100], [100, 20, 70, 90], [30, 30, 90, 90]]
    together = estimator(image, boxes)
    apart = estimator([image] * 3, boxes)
    np.testing.assert_array_equal(together.keypoints_NJ2, apart.keypoints_NJ2)
    assert estimator(image, []).keypoints_NJ2.shape == (0, 16, 2)
    assert estimator([]).scores_NJ.shape == (0, 16)


def test_each_box_on_the_command_line_is_a_person_of_every_picture(
    run, estimator, tiny_set, tmp_path
):
    pictures = sorted((tiny_set / "images").glob("*.jpg"))[:2]
    boxes = [[20, 10, 50, 60], [40, 20, 45, 30]]
    words = [word for box in boxes for word in ("--box", *box)]
    run(*pictures, *words, "--save-predictions", tmp_path / "p.json")
    entries, found = read_json(tmp_path / "p.json")
    assert [e["image"] for e in entries] == [str(p) for p in pictures for _ in boxes]
    assert [e["row"] for e in entries] == [0, 1, 2, 3]
    for picture, rows in zip(pictures, (found[:2], found[2:]), strict=True):
        expected = estimator(picture, boxes)
        np.testing.assert_allclose(rows[..., :2], expected.keypoints_NJ2, atol=1e-3)
    words = ["--center", 30, 30, "--scale", 0.2, "--center", 60, 50, "--scale", 0.3]
    run(pictures[0], *words, "--save-predictions", tmp_path / "c.json")
    squares = [(e["center"], e["scale"]) for e in read_json(tmp_path / "c.json")[0]]
    assert squares == [([30, 30], 0.2), ([60, 50], 0.3)]


def test_a_photograph_is_turned_upright_and_its_joints_with_it(run, estimator, tmp_path):
    """Orientation 6: the stored picture is to be turned clockwise (EXIF 2.3, 4.6.4 A)."""
    stored = tmp_path / "stored.jpg"
    write_jpeg(stored, noise_picture(np.random.default_rng(1), 160, 90))
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(with_segment(stored.read_bytes(), exif(6)))
    plain = cv2.imread(str(stored))
    expected = estimator(np.ascontiguousarray(plain.transpose(1, 0, 2)[:, ::-1]))
    np.testing.assert_array_equal(estimator(turned).keypoints_NJ2, expected.keypoints_NJ2)
    run(turned, "--save-predictions", tmp_path / "p.json", "--overlay", tmp_path / "o.png")
    entries, _ = read_json(tmp_path / "p.json")
    assert (entries[0]["width"], entries[0]["height"]) == (90, 160)
    assert cv2.imread(str(tmp_path / "o.png")).shape == (160, 90, 3)
    run(turned, "--ignore-exif", "--save-predictions", tmp_path / "s.json")
    np.testing.assert_array_equal(
        read_json(tmp_path / "s.json")[1][..., :2], estimator(plain).keypoints_NJ2
    )


def test_grey_deep_and_transparent_pictures_become_three_channels_of_8_bits(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    color, triple = np.stack([grey, grey // 2, 255 - grey], axis=-1), np.dstack([grey] * 3)
    deep, transparent = grey.astype(np.uint16) * 257, np.dstack([color, np.zeros_like(grey)])
    for image, expected in ((grey, triple), (deep, triple), (transparent, color)):
        assert cv2.imwrite(str(tmp_path / "a.png"), image)
        np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), expected)
    np.testing.assert_array_equal(read_picture(grey), triple)


def test_each_picture_of_a_list_may_have_its_own_number_of_people(estimator):
    images = [noise_picture(np.random.default_rng(n), 200, 150) for n in range(3)]
    boxes = [[[0, 0, 80, 100], [100, 20, 70, 90]], [], np.array([[30.0, 30, 90, 90]])]
    found = estimator(images, boxes)
    apart = [estimator(images[0], boxes[0]), estimator(images[2], boxes[2])]
    expected = np.concatenate([each.keypoints_NJ2 for each in apart])
    assert found.keypoints_NJ2.shape == (3, 16, 2)
    np.testing.assert_allclose(found.keypoints_NJ2, expected, atol=1e-3)
    assert estimator(images[:2], [[], []]).scores_NJ.shape == (0, 16)


def test_a_files_bytes_and_a_pillow_image_are_the_same_picture_as_the_file(estimator, tmp_path):
    """A PNG with an EXIF orientation of 6: upright, it is turned clockwise."""
    color = noise_picture(np.random.default_rng(4), 60, 40)
    path, tags = tmp_path / "a.png", Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(color[..., ::-1]).save(path, exif=tags)
    upright = color.transpose(1, 0, 2)[:, ::-1]
    for picture in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(read_picture(picture), upright)
        np.testing.assert_array_equal(read_picture(picture, upright=False), color)
    expected = estimator(path).keypoints_NJ2
    np.testing.assert_array_equal(estimator(Image.open(path)).keypoints_NJ2, expected)
    transparent = Image.fromarray(np.dstack([color[..., ::-1], np.zeros((40, 60), np.uint8)]))
    np.testing.assert_array_equal(read_picture(transparent), color)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"pictures": np.zeros((9, 9, 3))}, "float64"),
        ({"pictures": np.zeros((9, 9, 4), np.uint8)}, r"\(9, 9, 4\)"),
        ({"pictures": "nowhere.jpg"}, "no such file"),
        ({"pictures": "."}, "no such file"),
        ({"pictures": np.zeros((9, 9), np.uint8), "boxes": [[1, 1, 0, 3]]}, "above 0"),
        ({"pictures": [np.zeros((9, 9), np.uint8)] * 2, "boxes": [[1, 2, 3, 4]]}, "1 for 2"),
        ({"pictures": np.zeros((9, 9), np.uint8), "centers": [[1, 2]]}, "incomplete one"),
        ({"pictures": np.zeros((9, 9), np.uint8), "boxes": [[90, 2, 3, 4]]}, "overlaps"),
        ({"pictures": None}, "a NoneType"),
        ({"pictures": ["a.jpg", 7]}, "no such file"),
        ({"pictures": [7]}, "a int"),
        ({"pictures": b"noise"}, "no picture .5 bytes"),
        ({"pictures": Image.new("I;16", (9, 9))}, "mode I;16"),
        ({"pictures": np.zeros((9, 9), np.uint8), "boxes": [["x", 2, 3, 4]]}, "numbers: x, y"),
        ({"pictures": np.zeros((9, 9), np.uint8), "boxes": [[1, 2, 3]]}, "numbers: x, y"),
        ({"pictures": [np.zeros((9, 9), np.uint8)] * 2, "boxes": [[[1, 2, 3, 4]]]}, "1 for 2"),
        ({"pictures": np.zeros((9, 9), np.uint8), "centers": [[1, 2]], "scales": [1, 2]}, "2 scal"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(arguments, found, estimator):
    with pytest.raises(InputError, match=found):
        estimator(**arguments)


def test_the_decoder_in_the_documentation_equals_the_rule_exact():
    page = (ROOT / "docs" / "predict.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def decode" in c]
    names = {"np": np}
    exec(code, names)
    heat = np.random.default_rng(8).uniform(-0.1, 1, (3, 16, 16)).astype(np.float32)
    heat[1, 0, 5] = heat[2, 7, 15] = 2  # at a border
    joints, scores = heatmaps.decode(torch.from_numpy(heat)[None], "exact")
    for n, heat_HW in enumerate(heat):
        place, score = names["decode"](heat_HW)
        np.testing.assert_allclose(place, joints[0, n] * 4 + 1.5, atol=1e-3)
        assert score == scores[0, n]


def test_a_truncated_picture_is_called_damaged_and_noise_is_called_no_picture(tmp_path):
    png = cv2.imencode(".png", noise_picture(np.random.default_rng(1), 60, 40))[1].tobytes()
    for data, found in ((png[:200], "a damaged picture"), (b"noise", "no picture")):
        with pytest.raises(InputError, match=found):
            read_picture(data)


def test_folders_show_gif_and_avif(run, tmp_path):
    image = Image.fromarray(noise_picture(np.random.default_rng(1), 60, 40))
    for name in ("a.gif", "b.avif"):
        image.save(tmp_path / name)
    run(tmp_path, "--save-predictions", tmp_path / "p.json")
    assert [e["image"] for e in read_json(tmp_path / "p.json")[0]] == ["a.gif", "b.avif"]


def joints_on_a_grid(self, crops) -> Poses:
    """16 joints about the middle of each square, 8 px apart, so that no dot lies over another."""
    middles = np.concatenate([crop.records_NR[:, 1:3] for crop in crops])
    grid = np.stack(np.meshgrid(np.arange(-16, 16, 8), np.arange(-16, 16, 8)), -1).reshape(-1, 2)
    ones = np.ones((len(crops), 16))
    return Poses(middles[:, None] + grid, ones, ones)


def test_overlays_show_everybody_where_they_are_found(run, tiny_set, tmp_path, monkeypatch):
    """Two people in one picture, one in another that lies in a folder."""
    monkeypatch.setattr(PoseEstimator, "predict", joints_on_a_grid)
    images = tmp_path / "images"
    first, second = sorted((tiny_set / "images").glob("*.jpg"))[:2]
    (images / "more").mkdir(parents=True)
    cv2.imwrite(str(images / "a.png"), cv2.imread(str(first)))  # a JPEG would blur the colours
    cv2.imwrite(str(images / "more" / "b.png"), cv2.imread(str(second)))
    people = write_csv(
        tmp_path / "people.csv", "image,x,y,width,height,image_id",
        [["a.png", 10, 10, 90, 90, 5], ["more/b.png", 20, 20, 80, 90, 8],
         ["a.png", 150, 60, 100, 80, 5]],
    )  # fmt: skip
    run("--people", people, images, "--overlay", tmp_path / "drawn", "--save-coco",
        tmp_path / "c.json", "--save-predictions", tmp_path / "p.json")  # fmt: skip
    entries, keypoints = read_json(tmp_path / "p.json")
    assert [entry["image"] for entry in entries] == ["a.png", "more/b.png", "a.png"]
    coco = json.loads((tmp_path / "c.json").read_text())
    assert [entry["image_id"] for entry in coco] == [5, 8, 5]
    drawn = {"a.png": (0, 2), "more/b.png": (1,)}
    written = {str(p.relative_to(tmp_path / "drawn")) for p in (tmp_path / "drawn").rglob("*.*")}
    assert written == set(drawn)
    colours = np.array([visualize.RIGHT_BGR, visualize.LEFT_BGR, visualize.MIDDLE_BGR])
    for name, rows in drawn.items():
        image = cv2.imread(str(tmp_path / "drawn" / name)).astype(int)
        x, y = np.round(keypoints[list(rows), :, :2]).astype(int).reshape(-1, 2).T
        far = np.abs(image[y, x][:, None] - colours).max(axis=-1).min(axis=-1)
        assert len(far) == 16 * len(rows) and far.max() == 0, name


def test_the_number_of_sure_joints_is_printed_and_a_warning_if_there_are_nearly_none():
    """Three frames: two joints of ten are sure, then none is, then nobody is there."""
    person = {"keypoints": [[1.0, 2.0, 0.5]] * 2 + [[1.0, 2.0, 0.1]] * 8}
    unsure = {"keypoints": [[1.0, 2.0, 0.1]] * 10}
    text = predict.scores_text([[person], [unsure], []], 0.2)
    assert text.startswith("2 of 20 joints score 0.2") and "2 of 3 pictures" in text
    assert "warning: nearly nothing was found" in text
    assert "warning" not in predict.scores_text([[person]], 0.2)


def test_an_annotation_without_limbs_is_seen_around_the_prediction():
    """A white ring around a black one around the joint's own colour, on a grey picture."""
    dots, image = Skeleton("dots", ("a",), (), (), ()), np.full((40, 40, 3), 128, np.uint8)
    for is_truth in (True, False):
        visualize.draw_skeleton(image, np.array([[20, 20]]), np.ones(1, bool), dots, 2, is_truth)
    line = image[20, 20:28].tolist()
    assert line[0] == [*visualize.MIDDLE_BGR] and line[7] == [128] * 3
    assert line[4][0] < 64 and min(line[5]) > 192


def test_unsure_joints_are_not_drawn(estimator):
    image = np.zeros((40, 40, 3), np.uint8)
    keypoints = [[20.0, 20.0, score] for score in np.linspace(0, 0.5, 16)]
    person = {"scale": 0.2, "keypoints": keypoints}
    predict.draw(image, [person], estimator.skeleton, 0.6)
    assert not image.any()
    predict.draw(image, [person], estimator.skeleton, 0.5)
    assert image.any()


def test_a_small_subject_in_a_whole_picture_has_thin_lines(estimator):
    """Joints 30 px apart in a square of 600 px: lines of 1 px, dots of 3 px."""
    image = np.zeros((600, 600, 3), np.uint8)
    grid = np.stack(np.meshgrid(np.arange(300, 331, 10), np.arange(300, 331, 10)), -1)
    keypoints = [[*place, 1.0] for place in grid.reshape(-1, 2).tolist()]
    predict.draw(image, [{"scale": 3.0, "keypoints": keypoints}], estimator.skeleton, 0.2)
    y, x = np.nonzero(image.any(axis=-1))
    assert min(x.min(), y.min()) >= 297 and max(x.max(), y.max()) <= 333


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> Path:
    """An AVI of 11 frames, 96 x 64 px, 12 a second."""
    path = tmp_path_factory.mktemp("movie") / "m.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (96, 64))
    for number in range(11):
        writer.write(noise_picture(np.random.default_rng(number), 96, 64))
    writer.release()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    return list(read_frames(cv2.VideoCapture(str(path)), path.name))


def test_every_frame_of_a_video_is_predicted_and_drawn(run, estimator, movie, tmp_path):
    run(movie, "--box", 10, 5, 60, 50, "--batch-size", 4, "--overlay", tmp_path / "o.avi",
        "--min-score", -1, "--save-predictions", tmp_path / "p.json")  # fmt: skip
    entries, mine = read_json(tmp_path / "p.json")
    assert [entry["frame"] for entry in entries] == list(range(11))
    frames = frames_of(movie)
    expected = estimator(frames, [[10, 5, 60, 50]] * 11)
    np.testing.assert_allclose(mine[..., 2], expected.scores_NJ, atol=1e-5)
    drawn = frames_of(tmp_path / "o.avi")
    assert len(drawn) == 11 and drawn[0].shape == (64, 96, 3)
    assert cv2.VideoCapture(str(tmp_path / "o.avi")).get(cv2.CAP_PROP_FPS) == 12
    changed = [np.abs(a.astype(int) - b).max() for a, b in zip(frames, drawn, strict=True)]
    assert min(changed) > 60
    assert not list(tmp_path.glob("*.tmp*"))


def test_each_frame_of_a_video_may_have_different_people(run, estimator, movie, tmp_path):
    """Two people in frame 3, one in frame 9. A person after the last frame is an error."""
    boxes = [[10, 5, 40, 50], [40, 0, 50, 60], [0, 0, 60, 30]]
    rows = [[3, *boxes[0]], [9, *boxes[1]], [3, *boxes[2]]]
    people = write_csv(tmp_path / "people.csv", "frame,x,y,width,height", rows)
    out = ("--batch-size", 4, "--save-predictions", tmp_path / "p.json")
    run(movie, "--people", people, "--overlay", tmp_path / "o.avi", *out)
    entries, found = read_json(tmp_path / "p.json")
    assert [(e["row"], e["frame"]) for e in entries] == [(0, 3), (1, 3), (2, 9)]
    frames = frames_of(movie)
    expected = estimator([frames[3], frames[3], frames[9]], [boxes[i] for i in (0, 2, 1)])
    np.testing.assert_allclose(found[..., 2], expected.scores_NJ, atol=1e-5)
    assert len(frames_of(tmp_path / "o.avi")) == 11
    write_csv(people, "frame,x,y,width,height", [*rows, [11, *boxes[0]]])
    with pytest.raises(InputError, match=r"(?s)after the last frame.*frames 0 to 10"):
        run(movie, "--people", people, *out)
    assert len(read_json(tmp_path / "p.json")[0]) == 3


def test_the_people_of_coco_detections_are_rescored_by_their_boxes(run, tiny_set, tmp_path):
    """As mmpose does: the box's score times the mean of the joints' scores above 0.2."""
    name = sorted((tiny_set / "images").glob("*.jpg"))[0].name
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 42, "file_name": name}]}))
    detection = {"image_id": 42, "category_id": 1, "bbox": [20, 10, 50, 60], "score": 0.5}
    (tmp_path / "det.json").write_text(json.dumps([detection]))
    run(tiny_set / "images", "--people", tmp_path / "det.json", "--annotations",
        tmp_path / "coco.json", "--save-coco", tmp_path / "c.json")  # fmt: skip
    (result,) = json.loads((tmp_path / "c.json").read_text())
    assert result["image_id"] == 42
    keypoints = [[1.0, 2.0, score] for score in (0.9, 0.1, 0.3)]
    person = {"row": 0, "keypoints": keypoints, "box_score": 0.5}
    assert predict.as_coco(person)["score"] == pytest.approx(0.5 * 0.6)


def test_mmposes_own_sample_of_detections_is_predicted(run, shared, tmp_path):
    folder = shared / "data" / "coco_format" / "coco"
    run(folder, "--people", folder / "test_coco_det_AP_H_56.json", "--annotations",
        folder / "test_coco.json", "--save-coco", tmp_path / "c.json")  # fmt: skip
    results = json.loads((tmp_path / "c.json").read_text())
    detections = json.loads((folder / "test_coco_det_AP_H_56.json").read_text())
    assert len(results) == 118
    assert [r["image_id"] for r in results] == [d["image_id"] for d in detections]


def interrupt_after(monkeypatch, batches: int) -> None:
    """Send Ctrl-C when the network is asked for one batch more."""
    real, asked = PoseEstimator.predict, []

    def interrupted(self, crops):
        asked.append(len(crops))
        if len(asked) > batches:
            signal.raise_signal(signal.SIGINT)
        return real(self, crops)

    monkeypatch.setattr(PoseEstimator, "predict", interrupted)


def test_control_c_leaves_a_whole_video_and_json_of_what_was_finished(
    run, movie, tmp_path, monkeypatch, capsys
):
    interrupt_after(monkeypatch, 2)
    out = tmp_path / "p.json"
    out.write_text("older")
    with pytest.raises(SystemExit) as left:
        run_main(
            lambda: run(movie, "--no-track", "--batch-size", 4, "--overlay", tmp_path / "o.avi",
                        "--save-predictions", out)
        )  # fmt: skip
    assert left.value.code == 130
    assert len(read_json(out)[0]) == 8
    assert len(frames_of(tmp_path / "o.avi")) == 8
    assert "complete files are kept" in capsys.readouterr().err


def test_a_bad_picture_is_named_and_left_out_on_request(run, tiny_set, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    good = next((tiny_set / "images").glob("*.jpg"))
    for name in ("a.jpg", "c.jpg"):
        (images / name).write_bytes(good.read_bytes())
    (images / "b.jpg").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"(?s)b\.jpg.*next: .*--skip-bad"):
        run(images)
    capsys.readouterr()
    run(images, "--skip-bad", "--save-predictions", tmp_path / "p.json")
    entries, _ = read_json(tmp_path / "p.json")
    assert [(e["image"], e["row"]) for e in entries] == [("a.jpg", 0), ("c.jpg", 2)]
    assert "left out: 1 of 3 pictures" in capsys.readouterr().err
    with pytest.raises(InputError, match="all of them bad"):
        run(images / "b.jpg", "--skip-bad")


def test_bad_input_ends_in_one_clear_error(run, tiny_set, movie, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    picture = next((tiny_set / "images").glob("*.jpg"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.avi").write_bytes(b"noise" * 50)
    people = write_csv(tmp_path / "people.csv", "image", [["../secret.jpg"]])
    cases = [
        ([], "no input"),
        ([tmp_path / "empty"], "no picture in this folder"),
        ([picture, movie], "something else"),
        ([picture, "--center", 1, 2], "--center and --scale not together"),
        ([picture, "--box", 9999, 2, 10, 10], "overlaps the picture"),
        ([picture, "--people", people], "without the one folder"),
        ([tmp_path, "--people", people], "secret.jpg"),
        ([tmp_path / "cut.avi"], "cannot be opened"),
        (["--webcam", 99], "--webcam without an output"),
        (["--webcam", 99, "--overlay", "a.avi"], "--webcam 99\n  found:    cannot be opened"),
        ([movie, "--overlay", tmp_path / "o.gif"], "not a video"),
        ([movie, "--overlay", movie], "the input itself"),
        ([picture, picture, "--overlay", tmp_path / "o.jpg"], "2 pictures"),
        ([picture, picture, "--overlay", tmp_path / "o"], "of the same name"),
        ([picture, "--save-coco", people / "c.json"], "in a file"),
    ]
    for words, expected in cases:
        with pytest.raises(SystemExit) as left:
            run_main(lambda words=words: run(*words))
        text = capsys.readouterr().err
        assert left.value.code == 2, words
        assert expected in text and "found:" in text and "next:" in text, (words, text)


def test_pictures_of_absurd_size_are_refused_before_they_are_read_or_decoded(tmp_path):
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(InputError, match=r"8,589,934,592 bytes"):
        read_picture(tmp_path / "sparse.jpg")
    screen = b"GIF89a" + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0)
    (tmp_path / "claims.gif").write_bytes(screen + b",\0\0\0\0" + screen[6:10] + b"\0\2\0;")
    with pytest.raises(InputError, match="30000 x 30000"):
        read_picture(tmp_path / "claims.gif")
