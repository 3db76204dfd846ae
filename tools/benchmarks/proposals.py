"""Rules that choose the samples of a region proposal network, beside Detectron2's."""

from collections.abc import Callable

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, Instances

from atss import Anchors, GroundTruth, HeadOutput, Predictions, load_config
from atss.assigners import ASSIGNER_REGISTRY, Sampled

from .assignment import CPU
from .timing import Seconds, in_turn

THEIRS = "Detectron2's Matcher and sampling"
STRIDES, RATIOS = (4, 8, 16, 32, 64), (0.5, 1.0, 2.0)
SIDES = (12, 25, 50, 100, 200, 350, 500)
# Sampled chooses among the samples of another rule; OTA and POTO compare all anchors with all
# objects, which takes minutes.
LEFT_OUT = ("Sampled", "OTA", "POTO")
ARGUMENTS = {
    "SpatialScale": {"ranges": (32, 64, 128, 256)},
    "MaxIoU": {"background_below": 0.3, "positive_from": 0.7},
}


def rules(size: tuple[int, int], num_images: int, runs: int) -> dict[str, Seconds]:
    """Measure the assignment of a training step, with the sampling of 256 anchors of an image.

    Args:
        size: (height, width) of the images, each with an object of each of SIDES.
    """
    torch.manual_seed(0)
    height, width = size
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(STRIDES, start=2)}
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    theirs = build_proposal_generator(cfg, shapes)
    maps = [torch.zeros(num_images, 8, -(-height // s), -(-width // s)) for s in STRIDES]
    instances = [_objects(height, width) for _ in range(num_images)]
    boxes = theirs.anchor_generator(maps)
    anchors = Anchors.on_levels([x.shape[-2:] for x in maps], STRIDES, ratios=RATIOS, offset=0.0)
    scene = (anchors, GroundTruth.from_instances(instances), _predictions(anchors, num_images))
    functions: dict[str, Callable] = {
        THEIRS: lambda: theirs.label_and_sample_anchors(boxes, instances)
    }
    for name, kind in ASSIGNER_REGISTRY:
        if name not in LEFT_OUT:
            rule = Sampled(kind(**ARGUMENTS.get(name, {})))
            functions[name] = lambda rule=rule: rule(*scene)
    return in_turn(functions, runs, CPU)


def _objects(height: int, width: int) -> Instances:
    sides = torch.tensor([[1.2 * x, x / 1.2] for x in SIDES])
    corners = torch.rand(len(SIDES), 2) * (torch.tensor([width, height]) - sides)
    return Instances(
        (height, width),
        gt_boxes=Boxes(torch.cat([corners, corners + sides], dim=1)),
        gt_classes=torch.zeros(len(SIDES), dtype=torch.long),
    )


def _predictions(anchors: Anchors, num_images: int) -> Predictions:
    count = len(anchors.boxes)
    logits, deltas = torch.randn(num_images, count, 1) - 2, torch.zeros(num_images, count, 4)
    output = HeadOutput(logits, deltas, None)
    return Predictions(output, anchors.boxes + 8 * torch.randn(num_images, count, 4))
