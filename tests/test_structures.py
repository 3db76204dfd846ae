import pytest
import torch
from conftest import make_gt
from detectron2.structures import Boxes, Instances

from atss import BACKGROUND, IGNORE, Assignment, GroundTruth


def test_ground_truth_gathers_instances():
    boxes = torch.tensor([[0.0, 0, 5, 5], [1, 1, 7, 7], [2, 2, 9, 9]])
    instances = [Instances((10, 10)) for _ in range(3)]
    for x, own in zip(instances, (boxes[:2], boxes[:0], boxes[2:]), strict=True):
        x.gt_boxes, x.gt_classes = Boxes(own), torch.arange(len(own))
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


def test_positives_per_object():
    gt_index = torch.tensor([[0, BACKGROUND, 0], [2, IGNORE, BACKGROUND]])
    assert Assignment.hard(gt_index).positives_per_object(3).tolist() == [2, 0, 1]
    assert Assignment.hard(gt_index.clamp(max=-1)).positives_per_object(0).tolist() == []
