import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from atss import Anchors
from atss.modeling.box_coding import (
    BoxDeltas,
    Corners,
    Distribution,
    LegacyPixels,
    LogDistances,
    PointDistances,
)

STRIDE = torch.tensor(4.0)


def random_boxes(seed: int) -> torch.Tensor:
    corner, size = torch.rand(2, 100, 2, generator=torch.Generator().manual_seed(seed)) * 200
    return torch.cat([corner, corner + size + 1], dim=1)


def test_by_hand():
    """An anchor of 20 x 40 around (20, 40), moved by (2, 4) and doubled in width."""
    anchor = torch.tensor([10.0, 20, 30, 60])
    deltas = torch.tensor([1.0, 1.0, 5 * math.log(2), 0])
    box = BoxDeltas().decode(deltas, anchor, STRIDE)
    torch.testing.assert_close(box, torch.tensor([2.0, 24, 42, 64]))
    torch.testing.assert_close(BoxDeltas().encode(box, anchor, STRIDE), deltas)


def test_deltas_equal_detectron2():
    weights = (10.0, 10.0, 5.0, 5.0)
    boxes, anchors = random_boxes(0), random_boxes(1)
    theirs = Box2BoxTransform(weights)
    deltas = BoxDeltas(weights).encode(boxes, anchors, STRIDE)
    torch.testing.assert_close(deltas, theirs.get_deltas(anchors, boxes))
    torch.testing.assert_close(BoxDeltas(weights).decode(deltas, anchors, STRIDE), boxes)
    wild = torch.randn(100, 4, generator=torch.Generator().manual_seed(2)) * 30
    ours = BoxDeltas(weights).decode(wild, anchors, STRIDE)
    expected = theirs.apply_deltas(wild, anchors)
    # Sides are a centre plus or minus half a size, and float32 is 6e-5 apart at 1,000 pixels.
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("coder", [BoxDeltas(), PointDistances(), LogDistances(), Corners()])
def test_decode_is_finite_for_any_finite_delta(coder):
    deltas = torch.tensor([[1e4, -1e4, 1e4, -1e4], [0, 0, 1e30, -1e30]])
    assert torch.isfinite(coder.decode(deltas, torch.tensor([0.0, 0, 64, 64]), STRIDE)).all()


def test_points_by_hand():
    """An anchor of 8 strides of 4 px around (20, 40)."""
    anchor = torch.tensor([4.0, 24, 36, 56])
    box = PointDistances().decode(torch.tensor([1.0, 2, 0.5, -3]), anchor, STRIDE)
    torch.testing.assert_close(box, torch.tensor([16.0, 32, 22, 40]))  # nothing below -3
    distances = PointDistances().encode(torch.tensor([16.0, 32, 22, 48]), anchor, STRIDE)
    torch.testing.assert_close(distances, torch.tensor([1.0, 2, 0.5, 2]))
    whole = PointDistances().decode(torch.full((4,), PointDistances.initial), anchor, STRIDE)
    torch.testing.assert_close(whole, anchor)  # before training each box is its anchor


@pytest.mark.parametrize("ratio", [0.25, 2.0])
@pytest.mark.parametrize("scale", [5.0, 8.0])
def test_points_depend_on_stride_not_on_anchor_size(scale, ratio):
    anchors = Anchors.grid((16, 16), strides=(8,), scales=(scale,), ratios=(ratio,))
    box = PointDistances().decode(torch.ones(4), anchors.boxes[0], anchors.stride[0])
    torch.testing.assert_close(box, torch.tensor([-4.0, -4, 12, 12]))


def test_logarithms_by_hand():
    anchor = torch.tensor([4.0, 24, 36, 56])
    logarithms = torch.tensor([1.0, 2, 4, 8]).log()
    box = LogDistances().decode(logarithms, anchor, STRIDE)
    torch.testing.assert_close(box, torch.tensor([19.0, 38, 24, 48]))
    torch.testing.assert_close(LogDistances().encode(box, anchor, STRIDE), logarithms)
    # The widest image that anyone has: 2^16 pixels to a side.
    far = torch.tensor([-65000.0, 38, 65000, 48])
    box = LogDistances().decode(LogDistances().encode(far, anchor, STRIDE), anchor, STRIDE)
    torch.testing.assert_close(box, far, rtol=1e-5, atol=1e-3)


def test_distributions_by_hand():
    """Sides lie where their bins are on average, in strides: all alike at 8, one alone at its own,
    two alike in the middle. What is encoded are targets: no farther than bins reach."""
    code, anchor = Distribution(), torch.tensor([4.0, 24, 36, 56])  # around (20, 40)
    assert (code.channels, code.bins, code.encode(anchor, anchor, STRIDE).shape) == (68, 17, (4,))
    assert code.decode(torch.zeros(68), anchor, STRIDE).tolist() == [-12.0, 8, 52, 72]
    logits = torch.full((4, 17), -1e4)
    logits[0, 1] = logits[1, 2] = logits[2, 0] = logits[3, 3] = logits[3, 4] = 0
    box = code.decode(logits.flatten(), anchor, STRIDE)
    torch.testing.assert_close(box, torch.tensor([16.0, 32, 20, 54]))
    torch.testing.assert_close(code.encode(box, anchor, STRIDE), torch.tensor([1.0, 2, 0, 3.5]))
    far = code.encode(torch.tensor([-200.0, 32, 19, 48]), anchor, STRIDE)
    torch.testing.assert_close(far, torch.tensor([15.9, 2, 0, 2]))
    logits = torch.zeros(17)
    logits[3], logits[4] = 2.0, 1.0
    box = code.decode(logits.repeat(4), torch.zeros(4), torch.tensor(1.0))
    torch.testing.assert_close(box[2], torch.tensor(6.453902))
    short = Distribution(reg_max=4)
    assert short.decode(torch.zeros(20), anchor, STRIDE).tolist() == [12.0, 32, 28, 48]
    for wrong in (0, 2.5, "16"):
        with pytest.raises(ValueError, match="reg_max must be"):
            Distribution(wrong)


def test_corners_by_hand():
    box, anchor = torch.tensor([4.0, 8, 20, 10]), torch.zeros(4)
    numbers = Corners().encode(box, anchor, STRIDE)
    assert numbers.tolist() == [1.0, 2, 5, 2.5]
    assert torch.equal(Corners().decode(numbers, anchor, STRIDE), box)


def test_legacy_pixels_shift_decoded_boxes():
    """Deltas know the last pixel, half of it on each side; distances do not."""
    anchor = torch.tensor([4.0, 24, 36, 56])
    for code, moved in ((BoxDeltas(), [0.5] * 4), (PointDistances(), [0.0, 0, 1, 1])):
        numbers = torch.full((4,), code.initial)
        plain = code.decode(numbers, anchor, STRIDE)
        found = LegacyPixels(code).decode(numbers, anchor, STRIDE)
        assert (found - plain).tolist() == moved


def test_legacy_pixels_refuse_distributions():
    with pytest.raises(ValueError, match="LEGACY_PIXELS True is for weights of the authors' code"):
        LegacyPixels(Distribution())


def test_refuses_invalid_weights():
    with pytest.raises(ValueError, match="weights must be between 1e-06 and 1e"):
        BoxDeltas((1, 1, 0, 1))
    with pytest.raises(ValueError, match="weights must be four numbers"):
        BoxDeltas((1, 1))
