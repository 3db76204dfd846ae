"""The data that the parts hand to one another, and the one legend of shape letters.

Shape letters, used in every docstring and comment of this package:

    N  images in the batch               G  ground truths of the WHOLE batch
    R  anchors over all levels           K  classes
    L  pyramid levels                    k  locations taken per level (top-k)
    A  anchors per location              P  candidate pairs (ground truth, anchor)

Boxes are (x1, y1, x2, y2) in absolute pixels of the padded canvas, continuous: width is x2 - x1.
Anchors are flattened by level, row, column, anchor; within a location by scale, then ratio
(Detectron2's order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from detectron2.structures import Instances

BACKGROUND = -1
IGNORE = -2


@dataclass(frozen=True)
class Anchors:
    """Anchors on a pyramid of regular grids, together with the grids that made them.

    Location (row i, column j) of a level has its centre at
    ``((j + offset) * stride, (i + offset) * stride)`` and carries A boxes around it.

    Attributes:
        boxes: (R, 4) float32.
        strides: pixels between neighbouring locations, per level.
        sizes: (height, width) of each level, in locations.
        offset: position of the first centre, in strides.
        per_location: A.
    """

    boxes: Tensor
    strides: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    offset: float
    per_location: int

    @classmethod
    def on_levels(
        cls,
        sizes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
        device: torch.device | str | None = None,
    ) -> Anchors:
        """Anchors for levels of known size.

        Args:
            sizes: (height, width) of each level, in locations.
            strides: pixels between locations, per level.
            scales: square root of the anchors' area, in strides (paper, Table 5).
            ratios: height / width.
            offset: position of the first centre, in strides.
        """
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} level sizes for {len(strides)} strides")
        boxes = []
        for (height, width), stride in zip(sizes, strides, strict=True):
            x = (torch.arange(width, dtype=torch.float32, device=device) + offset) * stride
            y = (torch.arange(height, dtype=torch.float32, device=device) + offset) * stride
            centres = torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)
            cells = [
                (-w / 2, -h / 2, w / 2, h / 2)
                for scale in scales
                for ratio in ratios
                for w in [scale * stride / math.sqrt(ratio)]
                for h in [w * ratio]
            ]
            cells = torch.tensor(cells).to(centres.device, non_blocking=True)
            boxes.append((centres.repeat(1, 1, 2)[:, :, None] + cells).reshape(-1, 4))
        return cls(
            boxes=torch.cat(boxes),
            strides=tuple(strides),
            sizes=tuple((int(h), int(w)) for h, w in sizes),
            offset=float(offset),
            per_location=len(scales) * len(ratios),
        )

    @classmethod
    def grid(
        cls,
        canvas_hw: tuple[int, int],
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
        device: torch.device | str | None = None,
    ) -> Anchors:
        """Anchors for a canvas of (height, width) pixels, on levels as FPN makes them:
        ceil(height / stride) x ceil(width / stride). Other arguments as in :meth:`on_levels`."""
        sizes = [tuple(-(-side // stride) for side in canvas_hw) for stride in strides]
        return cls.on_levels(sizes, strides, scales, ratios, offset, device)

    @cached_property
    def per_level(self) -> list[int]:
        """Number of anchors of each level; they sum to R."""
        return [height * width * self.per_location for height, width in self.sizes]

    @cached_property
    def sides(self) -> Tensor:
        """(4, R) float64: the boxes in memory x1 of all, then y1 of all, which is faster to work
        on than box by box."""
        return self.boxes.T.to(torch.float64, memory_format=torch.contiguous_format)

    def centres_of(self, location: Tensor, level: int) -> Tensor:
        """(..., 2) float64 centres in pixels of locations of one level.

        Args:
            location: (...) int64 among the locations of all levels.
        """
        local = location - sum(height * width for height, width in self.sizes[:level])
        width = self.sizes[level][1]
        cell = torch.stack([local % width, local // width], dim=-1)
        return (cell.double() + self.offset) * self.strides[level]

    @cached_property
    def lattice(self) -> Tensor:
        """(L, 4) float64 on the boxes' device: stride, width, height, index of the level's first
        location among the locations of all levels."""
        first, rows = 0, []
        for stride, (height, width) in zip(self.strides, self.sizes, strict=True):
            rows.append((stride, width, height, first))
            first += height * width
        # Not torch.tensor(..., device=...): that would make the host wait for the GPU.
        lattice = torch.tensor(rows, dtype=torch.float64)
        return lattice.to(self.boxes.device, non_blocking=True)


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a whole batch, ragged: no padding, no mask.

    Attributes:
        boxes: (G, 4) float32.
        classes: (G,) int64 in [0, K).
        image_index: (G,) int64 in [0, N).
        num_images: N.
    """

    boxes: Tensor
    classes: Tensor
    image_index: Tensor
    num_images: int

    def __post_init__(self) -> None:
        count = len(self.boxes)
        if self.boxes.shape != (count, 4):
            raise ValueError(f"boxes must be (G, 4), got {tuple(self.boxes.shape)}")
        for name in ("classes", "image_index"):
            if getattr(self, name).shape != (count,):
                shape = tuple(getattr(self, name).shape)
                raise ValueError(
                    f"{name} must be ({count},) as there are {count} boxes, got {shape}"
                )
        # Only where looking is free: on a GPU it would make the host wait.
        if self.boxes.device.type == "cpu" and count:
            finite = torch.isfinite(self.boxes).all(dim=1)
            if not finite.all():
                bad = int(finite.logical_not().nonzero()[0])
                raise ValueError(f"box {bad} is not finite: {self.boxes[bad].tolist()}")
            low, high = int(self.image_index.min()), int(self.image_index.max())
            if low < 0 or high >= self.num_images:
                raise ValueError(
                    f"image_index runs from {low} to {high}, but there are {self.num_images} images"
                )

    @classmethod
    def from_instances(cls, instances: Sequence[Instances]) -> GroundTruth:
        """Gathers ``gt_boxes`` and ``gt_classes`` of one Detectron2 Instances per image."""
        boxes = [x.gt_boxes.tensor for x in instances]
        image_index = [x.new_full((len(x),), i, dtype=torch.long) for i, x in enumerate(boxes)]
        return cls(
            boxes=torch.cat(boxes),
            classes=torch.cat([x.gt_classes for x in instances]),
            image_index=torch.cat(image_index),
            num_images=len(instances),
        )

    def __len__(self) -> int:
        return len(self.boxes)


class HeadOutput(NamedTuple):
    """What the head predicts for every anchor, levels flattened.

    Attributes:
        logits: (N, R, K) class logits.
        deltas: (N, R, 4) boxes as the box coder writes them.
        quality: (N, R) logits of the quality branch, or None where the head has none.
    """

    logits: Tensor
    deltas: Tensor
    quality: Tensor | None


@dataclass(frozen=True)
class Predictions:
    """What the model says now, detached, for rules that look at it.

    Attributes:
        logits: (N, R, K) class logits.
        boxes: (N, R, 4) decoded boxes.
        quality: (N, R) logits of the quality branch, or None.
    """

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None


@dataclass(frozen=True)
class Assignment:
    """Which ground truth each anchor of each image learns.

    Attributes:
        gt_index: (N, R) int64 into the G ground truths of the batch, or BACKGROUND, or IGNORE.
        cls_target: (N, R) float32, target of the assigned class, 0 or 1.
        box_weight: (N, R) float32, weight of the box loss.
    """

    gt_index: Tensor
    cls_target: Tensor
    box_weight: Tensor

    @classmethod
    def hard(cls, gt_index: Tensor) -> Assignment:
        """A rule that only says yes or no: targets and weights are 1."""
        ones = torch.ones_like(gt_index, dtype=torch.float32)
        return cls(gt_index, ones, ones)

    @property
    def positive(self) -> Tensor:
        """(N, R) bool: the anchor has a ground truth."""
        return self.gt_index >= 0

    def positives_per_object(self, num_objects: int) -> Tensor:
        """(G,) int64: how many anchors each ground truth got."""
        index = self.gt_index.flatten()
        counts = index.new_zeros(num_objects + 1)
        # Anchors without a ground truth are counted in a last slot, which is dropped.
        slot = torch.where(index >= 0, index, num_objects)
        return counts.scatter_add_(0, slot, torch.ones_like(index))[:num_objects]
