"""The anchors of an image under a rule, by object, and the picture of them."""

import numpy as np
import pytest
import torch

from atss import Anchors, GroundTruth, HeadOutput, Predictions
from atss.analysis.explain import explain
from atss.assigners import (
    ATSS,
    DDOD,
    OTA,
    PAA,
    POTO,
    TAL,
    IoU,
    MaxIoU,
    SimOTA,
    SoftLabel,
    SpatialScale,
)

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
    pairs = zip(
        found.pairs["owner"][found.is_lost], found.pairs["index"][found.is_lost], strict=True
    )
    assert {*pairs} == lost


def test_objects_that_overlap_lose_anchors():
    found = explain(ATSS(), ANCHORS, objects())
    owners, index = (found.pairs[x][found.is_lost] for x in ("owner", "index"))
    assert {0, 1} >= {*owners} != set()
    assert (found.gt_index[index] == 1 - owners).all()


def test_candidates_of_atss_are_k_on_each_level():
    found = explain(ATSS(top_k=3), ANCHORS, objects())
    counts = np.bincount(found.pairs["owner"])
    on_level = [min(3, int((ANCHORS.stride == s).sum())) for s in ANCHORS.stride.unique()]
    assert counts.tolist() == [sum(on_level)] * 3
    positive = found.gt_index >= 0
    assert set(np.flatnonzero(positive)) <= set(found.pairs["index"])
    mean, std = ATSS(top_k=3).statistics(ANCHORS, objects().boxes)
    assert found.objects["mean"].tolist() == mean.tolist()
    assert found.objects["threshold"].tolist() == (mean + std).tolist()
    similarity = found.of_object(1)["similarity"]
    assert similarity.mean() == pytest.approx(mean[1])


@pytest.mark.parametrize("rule", [SimOTA(), SoftLabel(), OTA(), POTO(), PAA(), TAL(), DDOD()])
def test_positives_are_chosen_pairs_with_values_of_predictions(rule):
    seen = predictions()
    found = explain(rule, ANCHORS, objects(), seen)
    pairs, chosen = found.pairs, found.pairs["chosen"]
    assert {*pairs["index"][chosen]} == {*np.flatnonzero(found.gt_index >= 0)}
    if isinstance(rule, DDOD):
        return
    boxes = seen.boxes[0][pairs["index"]].double()
    overlap = IoU()(boxes, objects().boxes.double()[pairs["owner"]])
    assert np.array_equal(pairs["similarity"], overlap)
    logits = seen.output.classes[0, pairs["index"], 0].double()
    assert np.array_equal(pairs["probability"], logits.sigmoid())
    for number in range(3) if isinstance(rule, SimOTA | SoftLabel) else ():
        assert found.of_object(number)["chosen"].sum() == found.objects["k"][number]


def test_a_rule_without_records_has_its_positives():
    class Own:
        def __call__(self, anchors, gt, predictions=None):
            return MaxIoU()(anchors, gt)

    found = explain(Own(), ANCHORS, objects())
    positive = np.flatnonzero(found.gt_index >= 0)
    assert {*found.pairs["index"]} == {*positive}
    boxes = ANCHORS.boxes[found.pairs["index"]].double()
    overlap = IoU()(boxes, objects().boxes.double()[found.pairs["owner"]])
    assert np.array_equal(found.pairs["similarity"], overlap)


@pytest.mark.parametrize("rule", [SpatialScale(top_k=3), MaxIoU()])
def test_candidates_are_more_than_the_chosen(rule):
    found = explain(rule, ANCHORS, objects())
    assert len(found.pairs["owner"]) > found.pairs["chosen"].sum() > 0
    assert np.isfinite(found.pairs["similarity"]).all()


def test_an_image_without_objects_has_no_positive():
    found = explain(ATSS(), ANCHORS, objects([]))
    assert (found.gt_index < 0).all()
    assert found.is_lost.shape == found.pairs["owner"].shape == (0,)
