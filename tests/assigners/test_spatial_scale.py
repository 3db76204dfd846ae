import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, make_gt

from atss import BACKGROUND, Anchors
from atss.assigners import SpatialScale

pytestmark = pytest.mark.usefixtures("both_engines")

REFERENCE = np.load(GOLDEN / "fcos_assignment.npz")
RANGES = (64, 128, 256, 512)


@pytest.mark.parametrize("case", ["typical", "crowded", "borders"])
@pytest.mark.parametrize(("name", "radius"), [("plain", 0), ("center_sampling", 1.5)])
def test_reference_vectors(case, name, radius):
    """From mmdet, made with strides 4 to 64 on levels of the sizes for strides 8 to 128, and a
    margin of 0."""
    height, width = REFERENCE[f"{case}/image_size"]
    sizes = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    anchors = Anchors.on_levels(sizes, (4, 8, 16, 32, 64))
    gt = make_gt(REFERENCE[f"{case}/gt"])
    gt_index = SpatialScale(radius=radius, margin=0)(anchors, gt).gt_index[0].numpy()
    np.testing.assert_array_equal(gt_index, REFERENCE[f"{case}/{name}"])


def brute_force(anchors, gt, radius, top_k):
    """(R,) by FCOS's definition, over all locations, in float64."""
    points, boxes = oracle.locations(anchors), gt.astype(np.float64)
    strides = np.repeat(anchors.strides, anchors.per_level)
    low = np.repeat((-1, *RANGES), anchors.per_level)
    high = np.repeat((*RANGES, np.inf), anchors.per_level)
    owner, smallest = np.full(len(points), -1), np.full(len(points), np.inf)
    for g, box in enumerate(boxes):
        sides = np.concatenate([points - box[:2], box[2:] - points], axis=1)
        farthest = sides.max(axis=1)
        positive = (sides.min(axis=1) > 0.01) & (farthest >= low) & (farthest <= high)
        away = points - (box[:2] + box[2:]) / 2
        if radius:
            positive &= np.abs(away).max(axis=1) < radius * strides
        if top_k:
            near, start = np.zeros(len(points), bool), 0
            for count in anchors.per_level:
                order = np.argsort((away[start : start + count] ** 2).sum(axis=1), kind="stable")
                near[start + order[: top_k * anchors.num_anchors]] = True
                start += count
            positive &= near
        area = np.prod(box[2:] - box[:2])
        wins = positive & (area < smallest)
        owner[wins], smallest[wins] = g, area
    return owner


@pytest.mark.parametrize(("radius", "top_k"), [(0, 0), (1.5, 0), (0, 9), (0, 2)])
@pytest.mark.parametrize("step", [None, 4], ids=["real", "integer"])
@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 2.0)])
def test_equals_brute_force(radius, top_k, step, ratios):
    """Integer boxes whose farthest side is exactly an end of a range belong to both levels."""
    hw = (320, 700)
    anchors = Anchors.grid(hw, ratios=ratios)
    rng = np.random.default_rng(0)
    images = [oracle.random_boxes(rng, count, hw, step) for count in (50, 0, 9)]
    image_index = np.repeat(np.arange(3), [len(b) for b in images])
    gt = make_gt(np.concatenate(images), image_index, 3)
    assigned = SpatialScale(radius=radius, top_k=top_k)(anchors, gt).gt_index.numpy()
    first = 0
    for image, boxes in zip(assigned, images, strict=True):
        expected = brute_force(anchors, boxes, radius, top_k)
        np.testing.assert_array_equal(image, np.where(expected >= 0, expected + first, -1))
        first += len(boxes)


def test_no_object():
    gt_index = SpatialScale()(Anchors.grid((64, 64)), make_gt([], num_images=2)).gt_index
    assert (gt_index == BACKGROUND).all()
    assert gt_index.shape[0] == 2


def test_conflicts_go_to_smaller_then_to_first_object():
    anchors = Anchors.grid((64, 64))
    small, large = [16, 16, 40, 40], [8, 8, 56, 56]
    assert SpatialScale()(anchors, make_gt([large, small])).gt_index[0, 3 * 8 + 3] == 1
    assert SpatialScale()(anchors, make_gt([small, large])).gt_index[0, 3 * 8 + 3] == 0
    assert SpatialScale()(anchors, make_gt([small, small])).gt_index.max() == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ranges": (128, 64)}, "ranges must increase and be above 0, got"),
        ({"radius": -1}, "radius must be >= 0, got -1"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
    ],
)
def test_refuses_impossible_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpatialScale(**arguments)


def test_refuses_ranges_of_other_levels():
    with pytest.raises(ValueError, match="ranges for 5 levels, but there are 1"):
        SpatialScale()(Anchors.grid((64, 64), strides=(8,)), make_gt([]))


def test_gt_index_is_int64():
    gt_index = SpatialScale()(Anchors.grid((64, 64)), make_gt([[0, 0, 40, 40]])).gt_index
    assert gt_index.dtype == torch.int64


def test_location_on_the_border_is_outside():
    """The location at (12, 12), on the left side of the object."""
    anchors = Anchors.grid((64, 64))
    gt_index = SpatialScale(margin=0)(anchors, make_gt([[12, 4, 60, 60]])).gt_index
    assert gt_index[0, 1 * 8 + 1] == BACKGROUND
    assert gt_index[0, 1 * 8 + 2] == 0
