from functools import partial

import pytest
import torch
from conftest import make_gt
from detectron2.structures import Boxes, Instances

from atss import BACKGROUND, IGNORE, Anchors, Assignment, GroundTruth, HeadOutput, Predictions
from atss.assigners import ASSIGNER_REGISTRY, Sampled, SpatialScale
from atss.modeling.criterion import Criterion


def test_ground_truth_gathers_instances():
    boxes = torch.tensor([[0.0, 0, 5, 5], [1, 1, 7, 7], [2, 2, 9, 9]])
    instances = [Instances((10, 10)) for _ in range(3)]
    for x, image_boxes in zip(instances, (boxes[:2], boxes[:0], boxes[2:]), strict=True):
        x.gt_boxes, x.gt_classes = Boxes(image_boxes), torch.arange(len(image_boxes))
    gt = GroundTruth.from_instances(instances)
    assert torch.equal(gt.boxes, boxes)
    assert gt.classes.tolist() == [0, 1, 0]
    assert gt.image_index.tolist() == [0, 0, 2]
    assert (len(gt), gt.num_images) == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"boxes": [[0, 0, float("nan"), 5]]}, "box 0 is not finite"),
        ({"boxes": [[0, 0, 1, 1]], "image_index": [2]}, "but there are 1 images"),
        ({"boxes": [[0, 0, 1, 1]], "classes": [0, 1]}, "classes must be"),
    ],
)
def test_ground_truth_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_gt(**arguments)


RULES = {name: rule for name, rule in ASSIGNER_REGISTRY if name != "SpatialScale"}
RULES["ranges"] = partial(SpatialScale, ranges=(64,))
RULES["Sampled"] = partial(Sampled, num=100_000, positive_fraction=1.0)  # all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("rule", RULES)
def test_objects_of_any_dtype_give_the_same_losses(rule, dtype):
    anchors = Anchors.grid((64, 96), strides=(8, 16))
    boxes = torch.tensor([[4.0, 6, 40, 50], [30, 10, 90, 60]])
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(anchors.boxes))
    logits = torch.randn(*shape, 3, generator=generator)
    deltas = torch.randn(*shape, 4, generator=generator)
    output = HeadOutput(logits, deltas, logits[..., 0])
    predictions = Predictions(output, anchors.boxes + deltas)
    found = []
    for float_type, int_type in ((torch.float32, torch.int64), (dtype, torch.int32)):
        classes = torch.tensor([2, 1], dtype=int_type)
        image_index = torch.zeros(2, dtype=int_type)
        gt = GroundTruth(boxes.to(float_type), classes, image_index, 1)
        assignment = RULES[rule]()(anchors, gt, predictions)
        losses = Criterion()(output, predictions.boxes, anchors, gt, assignment)
        found.append((assignment.gt_index, torch.stack([*losses.values()])))
    assert (found[0][0] >= 0).any()
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_positives_per_object():
    gt_index = torch.tensor([[0, BACKGROUND, 0], [2, IGNORE, BACKGROUND]])
    assert Assignment(gt_index).positives_per_object(3).tolist() == [2, 0, 1]
    assert Assignment(gt_index.clamp(max=-1)).positives_per_object(0).tolist() == []
