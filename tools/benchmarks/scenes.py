"""Random objects, and predictions as of a partly trained model."""

import torch
from torch import Tensor

from atss import Anchors, GroundTruth, HeadOutput
from atss.geometry import area, nearest_side
from atss.structures import Predictions

from .assignment import SMALL, random_objects

NUM_CLASSES = 20
Scene = tuple[Anchors, GroundTruth, Predictions]


def random_scene(count: int, num_images: int = 1, canvas_hw: tuple[int, int] = SMALL) -> Scene:
    """Return objects of random_objects in 20 classes with predictions.

    Each anchor predicts the smallest object that contains its centre, or its own box; each side is
    moved by a tenth (standard deviation) of the box's side."""
    anchors, gt = Anchors.grid(canvas_hw), random_objects(count, canvas_hw, num_images)
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
    gt = GroundTruth(gt.boxes, classes, gt.image_index, num_images)
    shape = (num_images, len(anchors.boxes))
    objects = [gt.boxes[gt.image_index == image] for image in range(num_images)]
    boxes = torch.cat([_smallest_around(anchors, x) for x in objects])
    sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.1 * sizes * torch.randn(boxes.shape, generator=generator)
    boxes = boxes.view(*shape, 4)
    logits = torch.randn(*shape, NUM_CLASSES, generator=generator) - 3
    return anchors, gt, Predictions(HeadOutput(logits, boxes, None), boxes)


def _smallest_around(anchors: Anchors, objects: Tensor) -> Tensor:
    """Return the (R, 4) smallest objects that contain the anchors' centres, or the anchors."""
    boxes, smallest = anchors.boxes.clone(), torch.full((len(anchors.boxes),), torch.inf)
    for part in objects.split(256) if len(objects) else ():  # bounds memory
        inside = nearest_side(anchors.points[:, None], part.double()) > 0
        size, which = torch.where(inside, area(part.double()).float(), torch.inf).min(dim=1)
        smaller = size < smallest
        boxes[smaller], smallest[smaller] = part[which[smaller]], size[smaller]
    return boxes
