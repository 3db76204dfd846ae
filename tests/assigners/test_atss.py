import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, make_gt

from atss import BACKGROUND, Anchors
from atss.assigners import ATSS
from atss.assigners.locations import nearest_locations
from atss.geometry import iou

REFERENCE = np.load(GOLDEN / "atss_assignment.npz")
CASES = sorted({key.split("/")[0] for key in REFERENCE.files})


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(case):
    get = {key: REFERENCE[f"{case}/{key}"] for key in ("gt", "k", "matched", "tie", "image_size")}
    anchors = Anchors.grid(
        tuple(get["image_size"].tolist()),
        scales=REFERENCE[f"{case}/scales"].tolist(),
        ratios=REFERENCE[f"{case}/ratios"].tolist(),
        offset=float(REFERENCE[f"{case}/offset"]),
    )
    assert anchors.per_level == REFERENCE[f"{case}/anchors_per_level"].tolist()
    gt_index = ATSS(int(get["k"]), "locations")(anchors, make_gt(get["gt"])).gt_index[0].numpy()
    tie = np.unpackbits(get["tie"])[: len(gt_index)].astype(bool)
    np.testing.assert_array_equal(gt_index[~tie], get["matched"][~tie])


@pytest.mark.parametrize("step", [None, 1], ids=["real", "integer"])
@pytest.mark.parametrize("offset", [0.5, 0.0])
@pytest.mark.parametrize(
    ("hw", "k", "scales", "ratios"),
    [
        ((160, 224), 9, (8.0,), (1.0,)),
        ((100, 260), 9, (8.0,), (1.0,)),
        ((24, 333), 17, (8.0,), (1.0,)),
        ((160, 224), 1, (8.0,), (1.0,)),
        ((128, 128), 4, (4.0, 6.0), (0.5, 1.0, 2.0)),
    ],
)
def test_equals_brute_force_including_ties(hw, k, scales, ratios, offset, step):
    anchors = Anchors.grid(hw, scales=scales, ratios=ratios, offset=offset)
    rng = np.random.default_rng(k)
    boxes = [oracle.random_boxes(rng, count, hw, step) for count in (40, 0, 7, 40)]
    image_index = np.repeat(np.arange(4), [len(b) for b in boxes])
    rule = ATSS(k, count="locations")
    assigned = rule(anchors, make_gt(np.concatenate(boxes), image_index, 4)).gt_index.numpy()
    first = 0
    for image, objects in zip(assigned, boxes, strict=True):
        expected = oracle.atss(anchors, objects, k, "locations")
        np.testing.assert_array_equal(image, np.where(expected >= 0, expected + first, -1))
        first += len(objects)


@pytest.mark.parametrize("k", [9, 4, 1])
@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 2.0), (0.5, 1.0, 2.0)])
def test_k_counts_anchors(k, ratios):
    """Algorithm 1, line 4: k anchors per level for any A. If k is not a multiple of A, only the
    first anchors of the last location are candidates."""
    anchors = Anchors.grid((128, 128), ratios=ratios)
    boxes = oracle.random_boxes(np.random.default_rng(k), 60, (128, 128), 1)
    gt_index = ATSS(k)(anchors, make_gt(boxes)).gt_index[0].numpy()
    np.testing.assert_array_equal(gt_index, oracle.atss(anchors, boxes, k, "anchors"))


@pytest.mark.parametrize("k", [1, 2, 3, 9, 19])
def test_nearest_locations_equal_a_full_sort(k):
    anchors = Anchors.grid((70, 90), strides=(8, 16, 32, 64))
    rng = np.random.default_rng(0)
    # Quarter pixels make many exact ties; some points lie far outside.
    points = np.concatenate(
        [np.round(rng.uniform(-30, 120, (300, 2)) * 4) / 4, rng.uniform(-1e5, 1e5, (50, 2))]
    )
    index, valid = nearest_locations(anchors, torch.from_numpy(points), k)
    centres = ((anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2).double().numpy()
    ends = np.cumsum(anchors.per_level)
    for level, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for point, found, ok in zip(points, index[..., level].T, valid[..., level].T, strict=True):
            distance = ((centres[start:end] - point) ** 2).sum(axis=1)
            expected = start + np.argsort(distance, kind="stable")[:k]
            assert found[ok].tolist() == expected.tolist()


def test_by_hand():
    """One level of 4 x 4 locations, stride 8, anchors of 16 pixels, one object of 16 pixels.

    The object is the anchor of location (1, 1). IoUs of the 3 x 3 candidates: 1 for that one, 1/3
    for its four neighbours, 1/7 for the four diagonal ones. mean + std = 0.3228 + 0.2682 = 0.591,
    so only that one is positive.
    """
    anchors = Anchors.grid((32, 32), strides=(8,), scales=(2.0,))
    gt_index = ATSS(9)(anchors, make_gt([[4, 4, 20, 20]])).gt_index
    expected = torch.full((4, 4), BACKGROUND)
    expected[1, 1] = 0
    assert gt_index.view(4, 4).tolist() == expected.tolist()


def test_centre_must_lie_inside():
    """Anchors overlap a tall thin object between two columns, but no centre is inside."""
    anchors = Anchors.grid((64, 64), strides=(8,), scales=(2.0,))
    assert (ATSS(9)(anchors, make_gt([[7, 0, 9, 64]])).gt_index == BACKGROUND).all()
    assert (ATSS(9)(anchors, make_gt([[11, 0, 13, 64]])).gt_index >= 0).any()


@pytest.mark.parametrize("similarity", [iou, lambda a, b: iou(a, b) - 1], ids=["iou", "negative"])
def test_equal_overlaps_leave_positives(similarity):
    """All nine candidates lie inside the object, so the threshold is their common IoU, and rounding
    must not drop them (">=" in line 12). A user's similarity may be negative."""
    anchors = Anchors.grid((256, 256), strides=(8,), scales=(1.7,))
    rng = np.random.default_rng(0)
    centre = rng.uniform(100, 150, (200, 1)).astype(np.float32)
    half = rng.uniform(60, 90, (200, 1)).astype(np.float32)
    boxes = np.concatenate([centre - half, centre - half, centre + half, centre + half], axis=1)
    for i in range(len(boxes)):
        found = ATSS(9, similarity=similarity)(anchors, make_gt(boxes[i])).gt_index
        assert (found == 0).sum() == 9


def test_conflicts_go_to_higher_iou_then_to_lower_index():
    anchors = Anchors.grid((64, 64), strides=(8,), scales=(2.0,))
    wide, exact = [10, 10, 35, 35], [12, 12, 28, 28]  # the anchor of location (2, 2) is `exact`
    for boxes, winner in (([wide, exact], 1), ([exact, wide], 0), ([exact, exact], 0)):
        gt_index = ATSS(9)(anchors, make_gt(boxes)).gt_index.view(8, 8)
        assert gt_index[2, 2] == winner


def test_order_of_objects_does_not_matter():
    anchors = Anchors.grid((160, 224))
    boxes = oracle.random_boxes(np.random.default_rng(3), 30, (160, 224))
    order = np.random.default_rng(4).permutation(30)
    straight = ATSS()(anchors, make_gt(boxes)).gt_index
    shuffled = ATSS()(anchors, make_gt(boxes[order])).gt_index
    back = torch.from_numpy(order)[shuffled.clamp(min=0)]
    assert torch.equal(torch.where(shuffled >= 0, back, BACKGROUND), straight)


def test_scales_with_the_canvas():
    boxes = oracle.random_boxes(np.random.default_rng(5), 20, (160, 224), 1)
    small = ATSS()(Anchors.grid((160, 224)), make_gt(boxes)).gt_index
    strides = tuple(2 * s for s in (8, 16, 32, 64, 128))
    large = ATSS()(Anchors.grid((320, 448), strides=strides), make_gt(boxes * 2)).gt_index
    assert torch.equal(small, large)


def test_degenerate_boxes_are_background():
    boxes = [[20, 20, 20, 20], [30, 10, 20, 40], [500, 500, 600, 600], [-700, 0, -600, 64]]
    assert (ATSS()(Anchors.grid((64, 64)), make_gt(boxes)).gt_index == BACKGROUND).all()


@pytest.mark.parametrize("far", [1e4, 1e9, 1e18, 1e38])
def test_any_finite_box_is_assigned(far):
    boxes = [[-far, -far, far, far], [0, 0, far, 1e-30], [far / 2, far / 2, far, far]]
    gt_index = ATSS()(Anchors.grid((64, 64)), make_gt(boxes)).gt_index
    assert set(gt_index.unique().tolist()) <= {BACKGROUND, 0}


def test_no_object_in_the_whole_batch():
    gt_index = ATSS()(Anchors.grid((64, 64)), make_gt([], num_images=3)).gt_index
    assert gt_index.shape == (3, 64 + 16 + 4 + 1 + 1)
    assert (gt_index == BACKGROUND).all()


def test_a_single_candidate_is_its_own_threshold():
    anchors = Anchors.grid((8, 8), strides=(8,))
    assert ATSS(1)(anchors, make_gt([[0, 0, 8, 8]])).gt_index.tolist() == [[0]]


def test_refuses_k_below_one():
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        ATSS(top_k=0)


def test_refuses_an_unknown_count():
    with pytest.raises(ValueError, match="count is 'levels': choose from"):
        ATSS(count="levels")
