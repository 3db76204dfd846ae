"""Mosaic: four training images in one (YOLOv4, arXiv 2004.10934, section 3.4)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

# Range of the point in which the four images meet, relative to height and width.
CENTER = (0.35, 0.65)
# Largest ratio of a resized image to its part of the mosaic; the rest is cropped.
MAX_SCALE = 1.5
# Objects that keep less than this share of their area are dropped.
MIN_AREA = 0.1


class Mosaic:
    """A mapper that sometimes joins four mapped images into one of the first one's size. It draws
    from NumPy's generator, which :class:`~atss.data.loader.TrainLoader` seeds by position.

    Args:
        records: of the other three images.
        probability: of a mosaic.
    """

    def __init__(self, mapper: Callable[[dict], dict], records: Sequence[dict], probability: float):
        self.mapper = mapper
        self.records = records
        self.probability = probability

    def __call__(self, record: dict) -> dict:
        first = self.mapper(record)
        if np.random.rand() >= self.probability:
            return first
        drawn = np.random.randint(len(self.records), size=3)
        return put_together([first, *(self.mapper(self.records[i]) for i in drawn)])


def put_together(mapped: Sequence[dict]) -> dict:
    """Fill the first of four mapped images with the corners upper left, upper right, lower left,
    lower right. Objects keep boxes and classes only."""
    height, width = mapped[0]["image"].shape[1:]
    y = round(height * np.random.uniform(*CENTER))
    x = round(width * np.random.uniform(*CENTER))
    canvas = torch.empty_like(mapped[0]["image"])
    boxes, classes = [], []
    parts = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    for piece, (top, left, bottom, right) in zip(mapped, parts, strict=True):
        pixels, inside, kept = _window(piece, bottom - top, right - left)
        canvas[:, top:bottom, left:right] = pixels
        boxes.append(inside + inside.new_tensor([left, top, left, top]))
        classes.append(piece["instances"].gt_classes[kept])
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat(boxes))
    instances.gt_classes = torch.cat(classes)
    return mapped[0] | {"image": canvas, "instances": instances}


def _window(piece: dict, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crop a random window from an image resized to slightly more.

    Returns:
        (C, height, width) pixels; (M, 4) boxes in it; (N,) bool, which objects they are.
    """
    image = piece["image"]
    scale = max(height / image.shape[1], width / image.shape[2]) * np.random.uniform(1, MAX_SCALE)
    size = [max(round(image.shape[1] * scale), height), max(round(image.shape[2] * scale), width)]
    resized = F.interpolate(
        image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    top = np.random.randint(size[0] - height + 1)
    left = np.random.randint(size[1] - width + 1)
    scales = [size[1] / image.shape[2], size[0] / image.shape[1]]
    boxes = piece["instances"].gt_boxes.tensor
    boxes = boxes * boxes.new_tensor(2 * scales) - boxes.new_tensor(2 * [left, top])
    clipped = Boxes(boxes.clone())
    clipped.clip((height, width))
    kept = clipped.area() >= MIN_AREA * Boxes(boxes).area()
    pixels = resized[:, top : top + height, left : left + width]
    if not image.is_floating_point():
        pixels = pixels.round().clamp(0, 255)
    return pixels.to(image.dtype), clipped.tensor[kept], kept
