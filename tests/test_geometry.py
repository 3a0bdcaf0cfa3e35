"""geometry.py against OpenCV and hand-worked points."""

import cv2
import numpy as np
import pytest

from pipelines import geometry


def asymmetric_picture() -> np.ndarray:
    rng = np.random.default_rng(5)
    image = cv2.resize(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8), (260, 180))
    cv2.putText(image, "F7", (60, 120), cv2.FONT_HERSHEY_SIMPLEX, 3, (255, 255, 255), 9)
    return image.astype(np.float32)


def test_the_box_fills_the_input_edge_to_edge():
    # A box of side 200 about (300, 200) reaches from 200 to 400: input px -0.5 and 255.5.
    matrix = geometry.input_from_image((300, 200), 1.0, 256)
    edges = geometry.transform(matrix, [[200, 100], [400, 300], [300, 200]])
    np.testing.assert_allclose(edges, [[-0.5, -0.5], [255.5, 255.5], [127.5, 127.5]], atol=1e-9)


def test_a_positive_angle_turns_the_picture_clockwise_on_the_screen():
    # What lay to the right of the centre comes to lie below it.
    matrix = geometry.input_from_image((100, 100), 1.0, 200, rotation_deg=90)
    point = geometry.transform(matrix, [[110, 100]])[0]
    np.testing.assert_allclose(point, [99.5, 109.5], atol=1e-9)


def test_rotation_agrees_with_opencv():
    # OpenCV's own angle counts the other way round.
    theirs = cv2.getRotationMatrix2D((70, 40), -33, 1.0)
    mine = geometry.translation(70, 40) @ geometry.rotation(33) @ geometry.translation(-70, -40)
    np.testing.assert_allclose(mine[:2], theirs, atol=1e-9)


def test_the_flip_mirrors_the_crop_pixel_by_pixel():
    image = asymmetric_picture()
    plain = geometry.input_from_image((130, 90), 0.8, 128)
    flipped = geometry.input_from_image((130, 90), 0.8, 128, flip=True)
    first = cv2.warpAffine(image, plain[:2], (128, 128))
    second = cv2.warpAffine(image, flipped[:2], (128, 128))
    np.testing.assert_allclose(second, first[:, ::-1], atol=0.05)  # float32 coordinates in OpenCV
    assert np.abs(first - first[:, ::-1]).mean() > 10


def test_a_bright_spot_lands_where_the_matrix_says():
    # A blob about (161.3, 70.8), rotated, flipped and half outside: its centroid must follow.
    y, x = np.mgrid[:180, :260]
    image = np.exp(-((x - 161.3) ** 2 + (y - 70.8) ** 2) / (2 * 4.0**2)).astype(np.float32)
    matrix = geometry.input_from_image((200, 20), 0.9, 256, 1.1, 25.0, True)
    crop = cv2.warpAffine(image, matrix[:2], (256, 256))
    rows, columns = np.mgrid[:256, :256]
    centroid = np.array([(columns * crop).sum(), (rows * crop).sum()]) / crop.sum()
    np.testing.assert_allclose(centroid, geometry.transform(matrix, [[161.3, 70.8]])[0], atol=0.02)


def test_transform_takes_a_matrix_for_each_person():
    matrices = np.stack([geometry.translation(1, 2), geometry.scaling(2, 3)])
    points = np.array([[[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [2.0, 2.0]]])
    expected = [[[2, 3], [3, 4]], [[2, 3], [4, 6]]]
    np.testing.assert_array_equal(geometry.transform(matrices, points), expected)


@pytest.mark.parametrize(
    ("shrink", "expected"), [(0.3, 0), (2, 0), (2.01, 1), (4, 1), (4.1, 2), (16, 3), (1e6, 5)]
)
def test_a_picture_is_halved_until_it_is_shrunk_at_most_twice(shrink, expected):
    warp = geometry.rotation(30.0) @ geometry.scaling(1 / shrink, 1 / shrink)
    assert geometry.halvings(warp) == expected


def test_the_corners_of_a_halved_picture_are_those_of_the_picture():
    corners = geometry.transform(geometry.stored_from_half(7, 4), [[-0.5, -0.5], [2.5, 1.5]])
    np.testing.assert_allclose(corners, [[-0.5, -0.5], [6.5, 3.5]])
