"""The data that the parts hand to one another, and the one legend of shape letters.

Shape letters, used in every docstring and comment of this package:

    N  images in the batch               G  ground truths of the WHOLE batch
    R  anchors over all levels           K  classes
    L  pyramid levels                    k  anchors taken, of each level or of each object
    A  anchors per location              P  candidate pairs (ground truth, anchor)
    g  some of the G, or rows of them    C  candidates of each object, M  of no fixed number

(...) is any shape, the same throughout a docstring.

Boxes are (x1, y1, x2, y2) in absolute pixels of the padded canvas, continuous: width is x2 - x1.
Anchors are flattened by level, row, column, anchor; within a location by scale, then ratio
(Detectron2's order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .anchors import Anchors
from .deprecated import warn
from .errors import UserError

if TYPE_CHECKING:
    from detectron2.structures import Instances

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "Anchors",
    "Assigner",
    "Assignment",
    "GroundTruth",
    "HeadOutput",
    "Matched",
    "Predictions",
]

BACKGROUND = -1
IGNORE = -2


class cached_property:
    """functools' without the lock of Python 3.11, at which torch.compile breaks the graph."""

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a whole batch, ragged: no padding, no mask. Boxes of another dtype become
    float32, as anchors and predictions are, and whole numbers int64.

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
        object.__setattr__(self, "boxes", self.boxes.float())
        for name in ("classes", "image_index"):
            object.__setattr__(self, name, getattr(self, name).long())
        count = len(self.boxes)
        if self.boxes.shape != (count, 4):
            raise UserError(f"boxes must be (G, 4), got {tuple(self.boxes.shape)}")
        for name in ("classes", "image_index"):
            if getattr(self, name).shape != (count,):
                shape = tuple(getattr(self, name).shape)
                raise UserError(
                    f"{name} must be ({count},) as there are {count} boxes, got {shape}"
                )
        # Only where looking is free: on a GPU it would make the host wait.
        if self.boxes.device.type == "cpu" and count:
            finite = torch.isfinite(self.boxes).all(dim=1)
            if not finite.all():
                bad = int(finite.logical_not().nonzero()[0])
                raise UserError(f"box {bad} is not finite: {self.boxes[bad].tolist()}")
            low, high = int(self.image_index.min()), int(self.image_index.max())
            if low < 0 or high >= self.num_images:
                raise UserError(
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

    def to(self, device: torch.device) -> GroundTruth:
        """The same there. The host does not wait for what a GPU still has to do."""
        boxes, classes, image_index = (
            x.to(device, non_blocking=True) for x in (self.boxes, self.classes, self.image_index)
        )
        return GroundTruth(boxes, classes, image_index, self.num_images)

    def __len__(self) -> int:
        return len(self.boxes)


class HeadOutput(NamedTuple):
    """What the head predicts for every anchor, levels flattened.

    Attributes:
        classes: (N, R, K) logits, or probabilities where it says so; None where other outputs of
            the head have them.
        box_regression: (N, R, D) encoded boxes, see :mod:`atss.modeling.box_coding`.
        quality: (N, R) logits of the quality branch, or None where the head has none.
        probabilities: whether classes are probabilities.
    """

    classes: Tensor | None
    box_regression: Tensor
    quality: Tensor | None
    probabilities: bool = False

    @property
    def numbers(self) -> Tensor:
        """Deprecated: box_regression."""
        warn("HeadOutput.numbers", "HeadOutput.box_regression")
        return self.box_regression

    def at(self, index: int | slice) -> HeadOutput:
        """Of some images, or of one without N; of that, of some anchors."""
        return self.map(lambda x: x[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadOutput:
        """What a function makes of each tensor."""
        return HeadOutput(
            None if self.classes is None else function(self.classes),
            function(self.box_regression),
            None if self.quality is None else function(self.quality),
            self.probabilities,
        )

    def probability(self) -> Tensor:
        """(N, R, K) of the classes."""
        if self.classes is None:
            raise UserError("an output without classes detects nothing")
        return self.classes if self.probabilities else self.classes.sigmoid()

    def confidence(self) -> Tensor:
        """(N, R) highest class probability."""
        if self.classes is None:
            raise UserError("an output without classes has no confidence")
        best = self.classes.amax(dim=-1)
        return best if self.probabilities else best.sigmoid()

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """(N, R, K) of the classes with targets in [0, 1]."""
        assert self.classes is not None
        if self.probabilities:
            # torch's refuses what is no number, of which nobody could say where it came from.
            wrong = self.classes.isnan()
            found = F.binary_cross_entropy(
                torch.where(wrong, 0, self.classes), targets, reduction="none"
            )
            return torch.where(wrong, self.classes, found)
        return F.binary_cross_entropy_with_logits(self.classes, targets, reduction="none")


class Predictions(NamedTuple):
    """What the model says now. Rules that look at it get it detached.

    Attributes:
        output: the head's.
        boxes: (N, R, 4), its numbers decoded.
    """

    output: HeadOutput
    boxes: Tensor


@dataclass(frozen=True)
class Assignment:
    """Which ground truth each anchor of each image learns.

    Attributes:
        gt_index: (N, R) int64 into the G ground truths of the batch, or BACKGROUND, or IGNORE.
        score: (N, R) float32 in [0, 1], how well each positive suits its ground truth, for class
            targets and box weights that ask for it; None where the rule only says yes or no.
    """

    gt_index: Tensor
    score: Tensor | None = None

    @classmethod
    def hard(cls, gt_index: Tensor) -> Assignment:
        """Deprecated: the constructor."""
        warn("Assignment.hard", "Assignment(gt_index)")
        return cls(gt_index)

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


class Assigner(Protocol):
    """A rule that chooses training samples. One that needs predictions has an attribute
    ``looks_at_predictions``, which is true."""

    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assign the anchors of every image of the batch.

        Args:
            anchors: R anchors, the same for all images.
            gt: G objects of N images.
            predictions: of the images, detached; None if there is no model.
        Returns:
            the assignment, (N, R).
        """
        ...


@dataclass(frozen=True)
class Matched:
    """What the parts of a criterion see of all anchors and their objects.

    What does not count is replaced, since it may be infinite: classes of ignored anchors, and
    numbers and quality away from positives, are 0; away from positives both boxes are the anchor.

    Attributes:
        whole_output: the head's, in which nothing is replaced.
        counts: (N, R) bool: the anchor is not ignored.
        boxes: (N, R, 4), its numbers decoded.
        anchors: R anchors, with the stride of each.
        target_classes: (N, R) int64 in [0, K).
        target_boxes: (N, R, 4).
        positive: (N, R) bool.
        score: (N, R) float32, the rule's, or None where it gives none.
    """

    whole_output: HeadOutput
    counts: Tensor
    boxes: Tensor
    anchors: Anchors
    target_classes: Tensor
    target_boxes: Tensor
    positive: Tensor
    score: Tensor | None

    @cached_property
    def output(self) -> HeadOutput:
        """The head's. Made when it is asked for first: a copy of all classes takes longer than the
        losses of a branch that has none of them."""
        # Not multiplied by zero: it may be infinite.
        classes, numbers, quality, probabilities = self.whole_output
        return HeadOutput(
            None if classes is None else torch.where(self.counts[..., None], classes, 0),
            torch.where(self.positive[..., None], numbers, 0),
            None if quality is None else torch.where(self.positive, quality, 0),
            probabilities,
        )
