import numpy as np
import oracle
import pytest
from conftest import GOLDEN, make_gt

from atss import BACKGROUND, IGNORE, Anchors
from atss.assigners import NWD, IoU, MaxIoU, SimD, use_engine
from atss.assigners.box_index import BoxIndex

pytestmark = pytest.mark.usefixtures("both_engines")

REFERENCE = np.load(GOLDEN / "iou_assignment.npz")
CASES = sorted({key.split("/")[0] for key in REFERENCE.files})


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(case):
    """Detectron2's Matcher([0.4, 0.5], low-quality matches) on float64 overlaps."""
    anchors = Anchors.grid(
        tuple(REFERENCE[f"{case}/image_size"].tolist()),
        scales=REFERENCE[f"{case}/scales"].tolist(),
        ratios=REFERENCE[f"{case}/ratios"].tolist(),
    )
    gt_index = MaxIoU()(anchors, make_gt(REFERENCE[f"{case}/gt"])).gt_index[0].numpy()
    tie = np.unpackbits(REFERENCE[f"{case}/tie"])[: len(gt_index)].astype(bool)
    np.testing.assert_array_equal(gt_index[~tie], REFERENCE[f"{case}/matched"][~tie])


def brute_force(anchors, gt, low_quality, in_box, like="iou", claimant=False):
    """(R,) over all anchors, in float64."""
    boxes = anchors.boxes.double().numpy()
    if len(gt) == 0:
        return np.full(len(boxes), BACKGROUND)
    overlap = oracle.SIMILARITIES[like](gt.astype(np.float64), boxes)
    overlap[overlap < 1e-12] = 0
    owner, best = overlap.argmax(axis=0), overlap.max(axis=0)
    result = np.where(best >= 0.5, owner, np.where(best < 0.4, BACKGROUND, IGNORE))
    if low_quality:
        top = overlap.max(axis=1, keepdims=True)
        claims = (overlap == top) & (top > 0)
        last = len(gt) - 1 - claims[::-1].argmax(axis=0)
        result = np.where(claims.any(axis=0), last if claimant else owner, result)
    if in_box:
        centre, mine = (boxes[:, :2] + boxes[:, 2:]) / 2, gt.astype(np.float64)[owner]
        inside = np.minimum(centre - mine[:, :2], mine[:, 2:] - centre).min(axis=1) > 0.01
        result = np.where((result >= 0) & ~inside, IGNORE, result)
    return result


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("in_box", [False, True])
@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 2.0)])
def test_equals_brute_force(low_quality, in_box, ratios):
    """Integer boxes, so that overlaps tie exactly; some lie outside the canvas."""
    hw = (160, 350)
    anchors = Anchors.grid(hw, ratios=ratios)
    rng = np.random.default_rng(0)
    images = [oracle.random_boxes(rng, count, hw, 1) for count in (60, 0, 5)]
    images[0][-1] = (900, 900, 950, 950)  # overlaps no anchor, and claims none
    image_index = np.repeat(np.arange(3), [len(b) for b in images])
    rule = MaxIoU(low_quality_matches=low_quality, in_box=in_box)
    assigned = rule(anchors, make_gt(np.concatenate(images), image_index, 3)).gt_index.numpy()
    first = 0
    for image, boxes in zip(assigned, images, strict=True):
        expected = brute_force(anchors, boxes, low_quality, in_box)
        np.testing.assert_array_equal(image, np.where(expected >= 0, expected + first, expected))
        first += len(boxes)


@pytest.mark.parametrize("like", ["iou", "nwd", "simd"])
@pytest.mark.parametrize("claimed", ["best", "claimant"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_by_any_similarity(like, claimed, seed):
    """Objects of a pixel, of the whole canvas, and far outside."""
    hw = (160, 350)
    anchors = Anchors.grid(hw, scales=(1.0, 4.0))
    rng = np.random.default_rng(seed)
    objects = oracle.random_boxes(rng, 50, hw)
    objects[:20, 2:] = objects[:20, :2] + rng.uniform(1, 9, (20, 2))
    objects[-1] = (900, 900, 950, 950)
    objects[-2] = (1e5, 10, 1e5 + 40, 60)
    similarity = {"iou": IoU, "nwd": NWD, "simd": SimD}[like]()
    rule = MaxIoU(0.3, 0.6, similarity=similarity, claims_go_to=claimed)
    found = rule(anchors, make_gt(objects)).gt_index[0].numpy()
    overlap = oracle.SIMILARITIES[like](objects.astype(np.float64), anchors.boxes.double().numpy())
    expected = brute_force(anchors, objects, True, False, like, claimed == "claimant")
    # The thresholds of this rule.
    best = overlap.max(axis=0)
    plain = np.where(best >= 0.6, overlap.argmax(axis=0), np.where(best < 0.3, BACKGROUND, IGNORE))
    top = overlap.max(axis=1, keepdims=True)
    claims = ((overlap == top) & (top >= 1e-12)).any(axis=0)
    np.testing.assert_array_equal(found, np.where(claims, expected, plain))


@pytest.mark.parametrize("in_box", [False, True])
def test_equals_brute_force_with_few_candidates(in_box):
    """Objects from one pixel to the canvas, on whole pixels: most pairs are no candidates, and the
    anchors that tiny objects claim may belong to huge ones."""
    hw = (512, 640)
    anchors = Anchors.grid(hw)
    rng = np.random.default_rng(1)
    for _ in range(4):
        corner = rng.integers(0, [640, 512], (40, 2))
        size = np.concatenate([rng.integers(1, 12, (20, 2)), rng.integers(200, 700, (20, 2))])
        objects = np.concatenate([corner, corner + size], axis=1)[rng.permutation(40)]
        expected = brute_force(anchors, objects, True, in_box)
        found = MaxIoU(in_box=in_box)(anchors, make_gt(objects)).gt_index[0].numpy()
        np.testing.assert_array_equal(found, expected)


def test_few_pairs_of_huge_objects_are_compared(monkeypatch):
    """The objects overlap every anchor of a large canvas."""
    compared, near = [], BoxIndex.near

    def counted(*args):
        pairs = near(*args)
        compared.append(len(pairs[0]))
        return pairs

    monkeypatch.setattr(BoxIndex, "near", counted)
    anchors = Anchors.grid((2048, 2048))
    MaxIoU()(anchors, make_gt([[10, 20, 1900, 2000]] * 5))
    assert 0 < sum(compared) < 0.05 * 5 * len(anchors.boxes)


def test_no_object():
    gt_index = MaxIoU()(Anchors.grid((64, 64)), make_gt([], num_images=2)).gt_index
    assert (gt_index == BACKGROUND).all()
    assert gt_index.shape[0] == 2


def test_refuses_thresholds_out_of_order():
    with pytest.raises(ValueError, match=r"background_below <= positive_from, got 0.6 and 0.5"):
        MaxIoU(background_below=0.6)


def test_thresholds_are_inclusive():
    """Anchors of 16 px; half of the one at (12, 12) has IoU 1/2 with it, a quarter of it 1/4."""
    anchors = Anchors.grid((32, 32), strides=(8,), scales=(2.0,))
    rule = MaxIoU(background_below=0.25, low_quality_matches=False)
    assert rule(anchors, make_gt([[4, 4, 20, 12]])).gt_index[0, 5] == 0
    assert rule(anchors, make_gt([[4, 4, 12, 12]])).gt_index[0, 5] == IGNORE


@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_first_of_equal_objects_gets_the_anchors(piece, monkeypatch):
    """With any size of pieces."""
    monkeypatch.setattr("atss.assigners.lists.PIECE", piece)
    with use_engine("auto", limit=piece):
        gt_index = MaxIoU()(Anchors.grid((64, 64)), make_gt([[0, 0, 50, 50]] * 3)).gt_index
    assert set(gt_index.unique().tolist()) <= {0, BACKGROUND, IGNORE}
    assert (gt_index == 0).any()


@pytest.mark.parametrize(("inside", "expected"), [(0.02, 0), (0.005, IGNORE)])
def test_centre_is_inside_above_a_hundredth_of_a_pixel(inside, expected):
    """The anchor of 16 px at (12, 12), an object that covers a little more than its right half."""
    anchors = Anchors.grid((32, 32), strides=(8,), scales=(2.0,))
    gt = make_gt([[12 - inside, 4, 20, 20]])
    assert MaxIoU(in_box=True)(anchors, gt).gt_index[0, 5] == expected
