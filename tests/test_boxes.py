"""Boxes, centre and scale from a user become squares."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from pipelines.boxes import Person, Square, check_square, read_people, square_about, whole_picture
from pipelines.geometry import input_from_image, transform


def test_the_square_is_about_the_middle_of_the_boxs_pixels_with_the_margin():
    # Columns 10 to 109 have their middle at 59.5; the longer side is 200 px.
    assert square_about((10, 20, 100, 200)) == Square(59.5, 119.5, 1.25)
    assert square_about((10, 20, 100, 200), margin=1.0) == Square(59.5, 119.5, 1.0)


def test_a_square_picture_fills_the_input_edge_to_edge():
    assert whole_picture(400, 100) == Square(199.5, 49.5, 2.0)
    x, y, scale = whole_picture(300, 300)
    corners = transform(input_from_image((x, y), scale, 64), [[-0.5, -0.5], [299.5, 299.5]])
    np.testing.assert_allclose(corners, [[-0.5, -0.5], [63.5, 63.5]])


PEOPLE = [
    Person("a.jpg", Square(59.5, 119.5, 1.25)),
    Person("b/c.png", Square(12.5, 7.25, 0.4)),
    Person("a.jpg", None, 7),
]


def test_csv_and_json_mean_the_same(tmp_path: Path):
    table = tmp_path / "people.csv"
    table.write_text(
        "\ufeffimage,x,y,width,height,center_x,center_y,scale,image_id\r\n"
        "a.jpg,10,20,100,200,,,,\r\nb/c.png,,,,,12.5,7.25,0.4,\r\na.jpg,,,,,,,,7\r\n"
    )
    listed = tmp_path / "people.json"
    rows = [
        {"image": "a.jpg", "box": [10, 20, 100, 200]},
        {"image": "b/c.png", "center": [12.5, 7.25], "scale": 0.4},
        {"image": "a.jpg", "image_id": 7},
    ]
    listed.write_text(json.dumps(rows))
    assert read_people(table) == read_people(listed) == PEOPLE


def test_coco_detections_take_their_pictures_from_the_annotation_file(tmp_path: Path, capsys):
    people, annotations = tmp_path / "detections.json", tmp_path / "coco.json"
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "sub/b.jpg"}],
                "categories": [{"id": 1, "keypoints": ["nose"]}, {"id": 18, "name": "dog"}],
            }
        )
    )
    rows = [
        {"image_id": 9, "category_id": 1, "bbox": [10, 20, 100, 200], "score": 0.75},
        {"image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"image_id": 7, "category_id": 1, "bbox": [10, 20, 100, 200]},
    ]
    people.write_text(json.dumps(rows))
    square = Square(59.5, 119.5, 1.25)
    expected = [Person("sub/b.jpg", square, 9, 0.75), Person("a.jpg", square, 7)]
    assert read_people(people, annotations=annotations) == expected
    assert "1 detections of other categories are not used" in capsys.readouterr().err
    with pytest.raises(InputError, match="--annotations FILE"):
        read_people(people)
    people.write_text(json.dumps([{**rows[0], "image_id": 8}]))
    with pytest.raises(InputError, match="image_id 8 is not in"):
        read_people(people, annotations=annotations)


def test_people_of_a_video_have_frames_and_people_of_pictures_have_none(tmp_path: Path):
    table = tmp_path / "people.csv"
    table.write_text("frame,x,y,width,height,score\n3,10,20,100,200,0.5\n0,,,,,\n")
    expected = [Person("", Square(59.5, 119.5, 1.25), None, 0.5, 3), Person("", None)]
    assert read_people(table, in_video=True) == expected
    for text, found in (("image\na.jpg\n", "no frame"), ("frame\n-1\n", "0 or more")):
        table.write_text(text)
        with pytest.raises(InputError, match=found):
            read_people(table, in_video=True)
    table.write_text("image,frame\na.jpg,1\n")
    with pytest.raises(InputError, match="a frame, but the input is no video"):
        read_people(table)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"image": "a.jpg", "box": [1, 2, 3]}]', "person 0"),
        ('[{"image": "a.jpg"}, {"box": [1, 2, 3, 4]}]', "person 1"),
        ('[{"image": "a.jpg", "box": [1, 2, 0, 4]}]', "a box of 0 x 4 px"),
        ('[{"image": "a.jpg", "center": [1, 2]}]', "scale: center_x, center_y"),
        (
            '[{"image": "a.jpg", "box": [1, 2, 3, 4], "center": [1, 2], "scale": 1}]',
            "neither a box nor centre",
        ),
        ('[{"image": "a.jpg", "bbox": [1, 2, 3, 4]}]', "bbox is not a number"),
        ('[{"image": "a.jpg", "box": [1, 2, "x", 4]}]', "width is not a number: 'x'"),
        ('[{"image": "a", "image_id": Infinity}]', "not a whole number"),
        ("[3]", "person 0"),
        ("[]", "no people"),
        ("[", "not readable"),
        ("[" * 99999, "lists nested too deeply"),
        ("\xff", "not readable"),
        ('{"image": "a.jpg"}', "no list"),
        ('[{"image": 3}]', "no image"),
        ('[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]', "box is not a list of 4"),
        ('[{"image_id": 7, "category_id": 1, "bbox": null}]', "box is not a list of 4"),
        ('[{"image_id": "7", "category_id": 1, "bbox": [1, 2, 3, 4]}]', "image_id '7' is not in"),
        ('[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": "x"}]', "score is not"),
    ],
)
def test_a_person_without_a_picture_or_a_clear_box_is_refused(text, found, tmp_path: Path):
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "coco.json").write_text('{"images": [{"id": 7, "file_name": "a.jpg"}]}')
    with pytest.raises(InputError, match=re.escape(found)) as caught:
        read_people(tmp_path / "p.json", annotations=tmp_path / "coco.json")
    assert not re.search(r"\w(Error|Exception)\b", str(caught.value))


@pytest.mark.parametrize(
    "square",
    [
        Square(50, 50, 0),
        Square(50, 50, -1),
        Square(float("nan"), 50, 1),
        Square(50, 50, float("inf")),
        Square(50, 50, 200),  # px given for px / 200
        Square(-100.5, 50, 1),  # its right edge is the picture's left one
        Square(50, 200, 1),
    ],
)
def test_a_square_that_does_not_overlap_the_picture_is_refused(square: Square):
    check_square(Square(50, 50, 1), 100, 100, "here")
    check_square(Square(-99, 198, 1), 100, 100, "here")
    with pytest.raises(InputError, match="here"):
        check_square(square, 100, 100, "here")
