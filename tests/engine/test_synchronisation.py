"""Assignment and criterion never wait for the device: on a GPU the host runs ahead of it.

Tensors of the device "meta" have shapes but no values, so that whatever would have to look at a
value, and wait for it, fails there.
"""

import pytest
import torch

from atss import Anchors, GroundTruth, HeadOutput, Predictions
from atss.assigners import ATSS, MaxIoU, SpatialScale
from atss.modeling.box_coding import BoxDeltas
from atss.modeling.criterion import Criterion

RULES = {
    "ATSS": ATSS(),
    "ATSS, k locations": ATSS(count="locations"),
    "SpatialScale": SpatialScale(),
    "SpatialScale, radius": SpatialScale(radius=1.5),
}


def inputs(device, objects=5):
    """Anchors, ground truth and outputs for two images, the second without an object."""
    anchors = Anchors.grid((96, 128), device=device)
    boxes = torch.tensor([20.0, 20, 90, 80], device=device).expand(objects, 4).contiguous()
    zeros = torch.zeros(objects, dtype=torch.long, device=device)
    shape = (2, len(anchors.boxes))
    shapes = ((*shape, 3), (*shape, 4), shape)
    output = (torch.zeros(x, requires_grad=True, device=device) for x in shapes)
    return anchors, GroundTruth(boxes, zeros, zeros, 2), HeadOutput(*output)


def train(rule, anchors, gt, output):
    boxes = BoxDeltas().decode(output.numbers, anchors.boxes, anchors.stride)
    seen = Predictions(output.map(torch.Tensor.detach), boxes.detach())
    losses = Criterion()(output, boxes, anchors, gt, rule(anchors, gt, seen))
    sum(losses.values()).backward()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("objects", [5, 0])
def test_no_value_is_looked_at(rule, objects):
    train(rule, *inputs("meta", objects))


def test_what_looks_at_values_fails_without_them():
    train(MaxIoU(), *inputs("cpu"))
    with pytest.raises(RuntimeError, match="meta"):
        train(MaxIoU(), *inputs("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_host_does_not_wait_for_the_gpu(rule):
    given = inputs("cuda")
    train(rule, *given)  # what is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(rule, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
