"""Pictures with an EXIF orientation: whether they were labelled as turned or as stored."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import exif, make_trainer, tiny_config, with_segment
from PIL import Image, ImageOps

import evaluate
from common.errors import InputError
from configs.skeleton import MPII
from pipelines.annotations import read_annotations
from pipelines.shards import ShardSet
from tools import make_shards

WIDTH, HEIGHT = 64, 48  # as stored


def picture(orientation: int, dot: tuple[int, int], size: tuple[int, int]) -> bytes:
    """A grey JPEG of the stored size with a white dot of 3 x 3 px."""
    image = np.full((size[1], size[0], 3), 60, np.uint8)
    image[dot[1] - 1 : dot[1] + 2, dot[0] - 1 : dot[0] + 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return with_segment(buffer.getvalue(), exif(orientation))


def dot_in(data: bytes, turned: bool) -> tuple[float, float]:
    """The middle of the dot, in the picture as Pillow turns it, or as stored."""
    image = Image.open(io.BytesIO(data))
    grey = np.asarray((ImageOps.exif_transpose(image) if turned else image).convert("L"))
    y, x = np.nonzero(grey > 200)
    return float(x.mean()), float(y.mean())


def write_table(
    folder: Path,
    dots: dict[int, tuple[int, int]],
    turned: bool,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    """Pictures of these EXIF orientations, and a table in which the dot is labelled."""
    rows = ["scorer,a,a,a,a", "bodyparts,dot,dot,corner,corner", "coords,x,y,x,y"]
    for orientation, dot in dots.items():
        data = picture(orientation, dot, size)
        (folder / f"{orientation}.jpg").write_bytes(data)
        x, y = dot_in(data, turned)
        rows.append(f"{orientation}.jpg,{x},{y},2,3")
    (folder / "CollectedData.csv").write_text("\n".join(rows))
    return folder / "CollectedData.csv"


@pytest.mark.parametrize(
    ("turned", "dot", "words"),
    [
        (True, (20, 30), ""),  # inside of both, so turned is assumed
        (True, (61, 30), ""),  # y = 61 or x = 48 - 1 - 30 in the turned one
        (False, (61, 30), ""),
        (False, (20, 30), "--exif stored"),
    ],
)
def test_joints_are_packed_where_they_were_labelled(tmp_path, capsys, turned, dot, words):
    path = write_table(tmp_path, dict.fromkeys(range(1, 9), dot), turned)
    output = tmp_path / "shards"
    options = ["--annotations", path, "--output", output, "--splits", "train", "--workers", 0]
    make_shards.main([*map(str, options), *words.split()])
    shards = ShardSet(output / "train")
    people, samples = shards.people()
    assert people.count == 8
    for row, sample in enumerate(samples):
        np.testing.assert_allclose(
            people.joints[row, 0], dot_in(shards.picture(sample), False), atol=0.6
        )
        width, height = Image.open(io.BytesIO(shards.picture(sample))).size
        middle = (width - 1) / 2, (height - 1) / 2  # the box is the whole picture
        np.testing.assert_allclose(people.center[row], middle)
    printed = capsys.readouterr().out
    kind = "JPEG turned as its EXIF says" if turned else "JPEG kept as stored, against its EXIF"
    assert f"quality 95: 7 x {kind}\n" in printed and "--exif stored or --exif turned" in printed


def turned_of(path: Path, **how: str) -> list[int]:
    people, _ = read_annotations(path, "train", images=path.parent, **how)
    return people.turned.tolist()


def test_clear_pictures_decide_for_those_that_their_joints_leave_open(tmp_path):
    # Half turns and mirror images have one size; only picture 6, a quarter turn, tells.
    assert turned_of(write_table(tmp_path, {3: (9, 9), 2: (9, 9), 6: (61, 30)}, False)) == [0] * 3
    assert turned_of(tmp_path / "CollectedData.csv", exif="turned") == [1] * 3
    assert turned_of(write_table(tmp_path, {3: (9, 9), 2: (9, 9), 6: (61, 30)}, True)) == [1] * 3
    assert turned_of(write_table(tmp_path, {6: (9, 9)}, False, size=(WIDTH, WIDTH))) == [1]


def test_sizes_in_the_labels_decide_before_joints_and_option(tmp_path):
    sizes = {1: (48, 64), 2: (64, 48), 3: (48, 64), 4: (60, 48), 5: (0, 0)}
    for number in sizes:
        (tmp_path / f"{number}.jpg").write_bytes(picture(6, (9, 9), (WIDTH, HEIGHT)))
    images = [
        {"id": n, "file_name": f"{n}.jpg", "width": w, "height": h} for n, (w, h) in sizes.items()
    ]
    person = {"category_id": 1, "bbox": [1, 1, 9, 9], "keypoints": [5, 5, 2]}
    people = [{"id": n, "image_id": n, **person} for n in sizes]
    facts = {"images": images, "annotations": people}
    facts["categories"] = [{"id": 1, "name": "dot", "keypoints": ["dot"]}]
    (tmp_path / "train.json").write_text(json.dumps(facts))
    expected = [1, 0, 1, -1]  # -1: another picture was labelled
    assert turned_of(tmp_path / "train.json") == [*expected, 1]  # as most of the others
    assert turned_of(tmp_path / "train.json", exif="stored") == [*expected, 0]


def test_turned_labels_of_pictures_outside_of_shards_are_refused(tmp_path, tiny_shards):
    """The network would read these pictures as stored."""
    make_trainer(tiny_config(tiny_shards), tmp_path).save(["a.pt"])
    (tmp_path / "a.jpg").write_bytes(picture(6, (9, 9), (WIDTH, HEIGHT)))
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    facts = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": HEIGHT, "height": WIDTH}],
        "annotations": [{**person, "keypoints": [5, 5, 2] * 16}],
        "categories": [{"id": 1, "name": "person", "keypoints": list(MPII.names)}],
    }
    (tmp_path / "valid.json").write_text(json.dumps(facts))
    words = ["--checkpoint", tmp_path / "a.pt", "--annotations", tmp_path, "--images", tmp_path]
    with pytest.raises(InputError, match="their EXIF turns them"):
        evaluate.main([*map(str, words), "--workers", "0", "--device", "cpu"])


@pytest.mark.parametrize("name", ["a\0.jpg", "x" * 300, "y" * 252 + ".jpg", "../x.jpg"])
def test_names_of_pictures_are_checked_before_they_are_opened(tmp_path, name):
    facts = {"images": [{"id": 1, "file_name": name, "width": 10**30, "height": 5}]}
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    facts["annotations"] = [{**person, "keypoints": [5, 5, 2]}]
    facts["categories"] = [{"id": 1, "name": "dot", "keypoints": ["dot"]}]
    (tmp_path / "train.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="leaves the folder"):
        read_annotations(tmp_path / "train.json", "train", images=tmp_path)


def test_labels_that_are_shares_of_the_picture_are_of_the_turned_one(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(6, (9, 9), (WIDTH, HEIGHT)))
    (tmp_path / "a.txt").write_text("0 0.5 0.5 1 1 0.25 0.75 2\n")
    (tmp_path / "data.yaml").write_text("{train: ., val: ., kpt_shape: [1, 3]}")
    for exif_option, size in (("auto", (48, 64)), ("stored", (64, 48))):
        people, _ = read_annotations(tmp_path / "data.yaml", "train", exif=exif_option)
        np.testing.assert_allclose(people.joints[0, 0], np.multiply(size, (0.25, 0.75)))
