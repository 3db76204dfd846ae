import torch
from conftest import make_gt
from predicted_scenes import predict
from rule_scenes import make_scene

from atss import Anchors
from atss.assigners import (
    OTA,
)


def test_ota_ignores_objects_without_candidates():
    """They change nothing for others: one outside the canvas, one between the locations."""
    anchors = Anchors.grid((64, 64))
    objects = torch.tensor([[8.0, 8, 40, 40], [900.0, 900, 930, 930], [17.0, 17, 19.5, 19.5]])
    predicted = anchors.boxes.clone()
    predicted[:20] = objects[2]
    predictions = predict(torch.full((1, len(predicted), 2), -2.0), predicted[None])
    found = OTA()(anchors, make_gt(objects), predictions)
    assert found.positives_per_object(3)[1:].tolist() == [0, 0]
    assert torch.equal(found.gt_index, OTA()(anchors, make_gt(objects[:1]), predictions).gt_index)


def test_ota_gives_anchors_of_duplicates_to_the_first():
    anchors = Anchors.grid((64, 64))
    objects = torch.tensor([[8.0, 8, 40, 40], [30.0, 20, 60, 60], [8.0, 8, 40, 40]])
    predicted = anchors.boxes.clone()
    predicted[:20] = objects[0]
    predictions = predict(torch.full((1, len(predicted), 2), -2.0), predicted[None])
    found = OTA()(anchors, make_gt(objects), predictions).positives_per_object(3).tolist()
    assert found[0] > 0
    assert found[2] == 0


def test_rounding_does_not_decide_ties_of_ota():
    """Class costs tie; lists and tables sum them in different orders."""
    scene = make_scene(171)
    assert (OTA(iou_weight=0.0)(*scene[1:]).gt_index >= 0).any()
