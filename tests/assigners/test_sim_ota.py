import numpy as np
import pytest
import torch
from conftest import make_gt
from predicted_scenes import VECTORS, by_hand, load_case, overlaps, predict

from atss import Anchors
from atss.assigners import (
    SimOTA,
    SoftLabel,
)

CASES = ("typical", "crowded", "empty")


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors_of_soft_labels(case):
    """From mmdet, with the logits of scores."""
    anchors, gt, scores, boxes = load_case(case)
    p = torch.from_numpy(scores).clamp(1e-6, 1 - 1e-6)
    found = SoftLabel()(anchors, gt, predict((p / (1 - p)).log(), boxes))
    matched = VECTORS[f"{case}/soft_matched"]
    np.testing.assert_array_equal(found.gt_index[0], matched)
    overlap = np.where(matched >= 0, VECTORS[f"{case}/soft_overlap"], 0)
    np.testing.assert_allclose(found.score[0], overlap, atol=1e-6)


def test_simota_by_hand():
    """Four anchors for each number of pixels; the ten highest IoUs are 4 of 1, 4 of 31 / 33 and 2
    of 30 / 34."""
    anchors, gt, predictions = by_hand()
    found = SimOTA(radius=8.0)(anchors, gt, predictions)
    k = int(4 * 1 + 4 * overlaps(1) + 2 * overlaps(2))
    assert k == 9
    assert (found.gt_index == 0).sum() == k
    # All lie inside, although others have higher IoUs.
    inside = {row * 8 + column for row in (2, 3, 4, 5) for column in (2, 3, 4, 5)}
    chosen = (found.gt_index[0] == 0).nonzero().squeeze(1).tolist()
    assert chosen == sorted(sorted(inside, key=lambda i: (i % 16, i))[:k])
    np.testing.assert_allclose(found.score[0, chosen], [overlaps(i % 16) for i in chosen])


def test_contested_anchor_goes_to_the_cheapest_of_all():
    """Two objects without anchors inside select the only eligible one; it lies in the third object,
    which has selected others, and costs that less than them."""
    anchors = Anchors.grid((32, 32), strides=(8,), scales=(2.0,))
    objects = torch.tensor([[100.0, 100, 110, 110], [200.0, 0, 220, 20], [0.0, 0, 32, 32]])
    boxes = objects[2].expand(16, 4).clone()
    boxes[5] = torch.tensor([20.0, 20, 24, 24])
    logits = torch.full((16, 2), -6.0)
    logits[5] = torch.tensor([6.0, -6.0])
    found = SimOTA(top_k=3)(
        anchors, make_gt(objects, classes=[0, 0, 1]), predict(logits[None], boxes[None])
    )
    assert found.gt_index[0, 5] == 2
    assert found.positives_per_object(3).tolist() == [0, 0, 4]


def test_fallbacks_if_candidates_are_expensive():
    """Central anchors do not overlap the object, which costs 10 ln 1e7 = 161; an anchor 5.1 strides
    away does, and costs 10^2.1 = 133 for the distance."""
    anchors = Anchors.grid((128, 128), strides=(8,), scales=(2.0,))
    objects = torch.tensor([[51.0, 48, 83, 80], [0.0, 0, 128, 128]])
    boxes = torch.tensor([0.0, 0, 40, 40]).repeat(256, 1)
    far = 7 * 16 + 13  # at (108, 60)
    boxes[far] = objects[0]
    logits = torch.full((256, 2), -4.0)
    predictions = predict(logits[None], boxes[None])
    found = SoftLabel(iou_weight=10.0)(anchors, make_gt(objects, classes=[0, 1]), predictions)
    assert (found.gt_index[0] == 0).nonzero().squeeze(1).tolist() == [far]
