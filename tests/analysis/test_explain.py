"""The anchors of an image under a rule, by object, and the picture of them."""

import numpy as np
import pytest
import torch

from atss import Anchors, GroundTruth, HeadOutput, Predictions
from atss.analysis.explain import explain
from atss.assigners import ATSS, TAL, MaxIoU

ANCHORS = Anchors.grid((128, 160))
# The first two share most of their area.
BOXES = [[8.0, 8, 104, 104], [20, 20, 130, 110], [120, 20, 150, 100]]


def objects(boxes=BOXES):
    index = torch.zeros(len(boxes), dtype=torch.long)
    return GroundTruth(torch.tensor(boxes).view(-1, 4), index, index, 1)


def predictions():
    generator = torch.Generator().manual_seed(0)
    shape = 1, len(ANCHORS.boxes)
    boxes = ANCHORS.boxes + 4 * torch.randn(*shape, 4, generator=generator)
    logits = torch.randn(*shape, 2, generator=generator)
    return Predictions(HeadOutput(logits, boxes, None), boxes)


@pytest.mark.parametrize("rule", [ATSS(), MaxIoU(), TAL()])
def test_lost_anchors_are_positive_for_the_object_alone(rule):
    seen = predictions()
    found = explain(rule, ANCHORS, objects(), seen)
    assert np.array_equal(found.gt_index, rule(ANCHORS, objects(), seen).gt_index[0])
    lost = set()
    for i, box in enumerate(BOXES):
        alone = rule(ANCHORS, objects([box]), seen).positive[0].numpy()
        lost |= {(i, r) for r in np.flatnonzero(alone) if found.gt_index[r] not in (i, -1, -2)}
    assert {tuple(x) for x in found.lost.tolist()} == lost
    if isinstance(rule, MaxIoU):
        assert not len(found.candidates)


def test_objects_that_overlap_lose_anchors():
    found = explain(ATSS(), ANCHORS, objects())
    assert {0, 1} >= set(found.lost[:, 0]) != set()
    owners = found.gt_index[found.lost[:, 1]]
    assert (owners == 1 - found.lost[:, 0]).all()


def test_candidates_of_atss_are_k_on_each_level():
    found = explain(ATSS(top_k=3), ANCHORS, objects())
    counts = np.bincount(found.candidates[:, 0])
    on_level = [min(3, int((ANCHORS.stride == s).sum())) for s in ANCHORS.stride.unique()]
    assert counts.tolist() == [sum(on_level)] * 3
    positive = found.gt_index >= 0
    assert set(np.flatnonzero(positive)) <= set(found.candidates[:, 1])


def test_an_image_without_objects_has_no_positive():
    found = explain(ATSS(), ANCHORS, objects([]))
    assert (found.gt_index < 0).all()
    assert found.lost.shape == found.candidates.shape == (0, 2)
