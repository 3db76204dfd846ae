"""Layout and merging of tiles, with a detector that reads objects off the pixels."""

from collections.abc import Callable

import numpy as np
import pytest

from atss_runner.detections import Detections
from atss_runner.tiles import Tiles, tile_size

HW = 300, 420
TILES = Tiles(100, overlap=0.3)
# Complete on a tile; cut by borders of tiles in x, in y, and in both.
BOXES = ([10, 10, 30, 30], [95, 20, 115, 45], [20, 90, 45, 110], [95, 160, 120, 180])


def scene(boxes) -> np.ndarray:
    """Return an image in which object i has the value i + 1."""
    image = np.zeros((*HW, 1), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = i + 1
    return image


def reader(least_side: float = 0.0) -> Callable:
    """Return a detector that sees objects of at least ``least_side``, as a share of the image. The
    score of a smaller part of an object is higher."""

    def detect(images):
        found = []
        for image in images:
            parts = []
            for value in np.unique(image[image > 0]):
                y, x = np.nonzero(image[..., 0] == value)
                if np.ptp(x) + 1 >= least_side * image.shape[1]:
                    parts.append([x.min(), y.min(), x.max() + 1, y.max() + 1, 1 / len(x)])
            rows = np.array(parts, np.float32).reshape(-1, 5)
            found.append(Detections(rows[:, :4], rows[:, 4], np.zeros(len(rows), np.int64)))
        return found

    return detect


def fixed(*rows) -> Callable:
    """Return a detector with the same (box, score, class) on the first tile, and none elsewhere."""
    boxes, scores, classes = zip(*rows, strict=True)
    found = Detections(np.array(boxes, np.float32), np.array(scores), np.array(classes))

    def detect(images):
        results = [found.take(slice(0)) for _ in images]
        if not calls:
            results[0] = found
        calls.append(len(images))
        return results

    calls: list[int] = []
    return detect


@pytest.mark.parametrize("size", [32, 100, 299, 300, 420])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_tiles_cover_the_image(size, overlap):
    covered = np.zeros(HW, int)
    boxes = Tiles(size, overlap).boxes(*HW)
    for x1, y1, x2, y2 in boxes:
        assert (x2 - x1, y2 - y1) == (min(size, HW[1]), min(size, HW[0]))
        covered[y1:y2, x1:x2] += 1
    assert covered.min() == 1
    starts = np.unique(boxes[:, 0])
    assert (np.diff(starts) <= max(round(size * (1 - overlap)), 1)).all()
    assert boxes[:, 2:].max(axis=0).tolist() == [*HW[::-1]]


def test_objects_at_borders_are_found_once_and_complete():
    found = TILES.detect(scene(BOXES), reader(), 100)
    assert sorted(found.boxes.tolist()) == sorted(map(list, BOXES))
    assert found.boxes.dtype == np.float32


@pytest.mark.parametrize("whole", [True, False])
def test_whole_image_has_the_objects_that_no_tile_has(whole):
    large = [5, 5, 400, 280]
    found = Tiles(100, whole=whole).detect(scene([large]), reader(), 100)
    assert (large in found.boxes.tolist()) == whole
    assert len(found.boxes) == 1 if whole else len(found.boxes) > 1


def test_small_objects_are_found_on_tiles_only():
    detect = reader(0.15)
    assert not len(detect([scene(BOXES)])[0].boxes)
    assert len(TILES.detect(scene(BOXES), detect, 100).boxes) == len(BOXES)


def test_image_of_one_tile_is_detected_as_it_is():
    image, seen = scene(BOXES), []
    Tiles(420).detect(image, lambda images: seen.append(images) or [None], 100)
    assert [[x is image for x in images] for images in seen] == [[True]]


def test_tiles_are_views_in_batches():
    image, sizes = scene(BOXES), []

    def detect(images):
        assert all(np.shares_memory(image, x) for x in images)
        sizes.append(len(images))
        return reader()(images)

    tiles = Tiles(100)
    tiles.detect(image, detect, 100, batch=3)
    assert max(sizes) == 3
    assert sum(sizes) == len(tiles.boxes(*HW)) + 1


def test_limit_keeps_the_best():
    found = TILES.detect(scene(BOXES), reader(), 2)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(found.boxes) == 2


CUT = ([60, 10, 100, 50], 0.9, 0)  # by the right border of the first tile


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (([55, 10, 98, 50], 0.2, 0), [0.2]),
        (([55, 10, 98, 50], 0.2, 1), [0.9, 0.2]),
        (([55, 10, 75, 50], 0.2, 0), [0.9, 0.2]),
    ],
    ids=["covered", "other class", "covered in part"],
)
def test_cut_box_goes_only_if_another_covers_it(other, kept):
    assert Tiles(100).detect(scene([]), fixed(CUT, other), 9).scores.tolist() == kept


def test_class_agnostic_tiles_compare_boxes_of_all_classes():
    found = fixed(CUT, ([55, 10, 98, 50], 0.2, 1), ([54, 10, 98, 50], 0.1, 2))
    tiles = Tiles(100, class_agnostic=True)
    assert tiles.detect(scene([]), found, 9).scores.tolist() == [0.2]


def test_border_of_the_image_cuts_no_box():
    at_edge, inside = ([0, 0, 30, 30], 0.9, 0), ([2, 2, 33, 33], 0.2, 0)
    found = Tiles(100).detect(scene([]), fixed(at_edge, inside), 9)
    assert found.scores.tolist() == [0.9]


@pytest.mark.parametrize(("merge", "count"), [("iou", 2), ("ios", 1)])
def test_box_in_another_goes_by_intersection_over_smaller(merge, count):
    outer, inner = ([10, 10, 60, 60], 0.9, 0), ([20, 20, 40, 40], 0.8, 0)
    found = Tiles(100, merge=merge).detect(scene([]), fixed(outer, inner), 9)
    assert len(found.boxes) == count


@pytest.mark.parametrize(("area", "size"), [(0, 0), (1, 32), (7005.5, 480), (3 * 32**2, 320)])
def test_objects_cover_three_percent_of_a_tile(area, size):
    assert tile_size(area) == size
