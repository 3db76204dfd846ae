"""Pictures of a report."""

import base64

import cv2
import numpy as np

from atss.analysis.thumbnails import COLOURS, LONGEST, Mark, thumbnail


def decode(address):
    kind, _, data = address.partition(",")
    assert kind == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)


def test_marks_are_scaled_with_the_image():
    image = np.full((2 * LONGEST, 4 * LONGEST, 3), 255, np.uint8)
    picture = decode(thumbnail(image, [Mark((400, 400, 800, 400), "missed")]))
    assert picture.shape == (LONGEST // 2, LONGEST, 3)
    assert np.abs(picture[100, 150].astype(int) - COLOURS["missed"]).max() < 60
    assert (picture[150, 200] > 230).all()


def test_labels_never_cover_each_other():
    """The label of the upper mark is above the box, that of the next below, others are left out."""
    image = np.full((100, 200, 3), 255, np.uint8)
    box = (60, 30, 60, 40)
    kinds = ("found", "missed", "wrong")
    picture = decode(thumbnail(image, [Mark(box, kind, "name") for kind in kinds])).astype(int)
    at = {
        y: min(COLOURS, key=lambda k: np.abs(picture[y, 61] - COLOURS[k]).sum()) for y in (22, 73)
    }
    assert at == {22: "wrong", 73: "missed"}
    assert (picture[90:] > 230).all()


def test_small_images_keep_their_size():
    assert decode(thumbnail(np.zeros((30, 50, 3), np.uint8), [])).shape == (30, 50, 3)
