"""Data structures of heads, assigners and the criterion, and the shape letters of all docstrings
and comments.

    N  images in the batch               G  ground truths of the WHOLE batch
    R  anchors over all levels           K  classes
    L  pyramid levels                    k  anchors per level or per object
    A  anchors per location              P  candidate pairs (ground truth, anchor)
    g  a subset of the G ground truths   C  candidates of each object, M  any number

(...) is any shape, the same throughout a docstring.

Boxes are (x1, y1, x2, y2) in absolute pixels of the padded canvas, continuous: width is x2 - x1.
Anchors are flattened by level, row, column, scale, ratio (Detectron2's order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .anchors import Anchors
from .caching import cached_property
from .deprecated import renamed_attribute, warn
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


@dataclass(frozen=True)
class GroundTruth:
    """Objects of a batch, without padding. Boxes become float32, as anchors and predictions, and
    integers int64.

    Attributes:
        boxes: (G, 4).
        classes: (G,) in [0, K).
        image_index: (G,) in [0, N).
        num_images: N.
    """

    boxes: Tensor
    classes: Tensor
    image_index: Tensor
    num_images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", self.boxes.float())
        count = len(self.boxes)
        if self.boxes.shape != (count, 4):
            raise ValueError(f"boxes must be (G, 4), got {tuple(self.boxes.shape)}")
        for name in ("classes", "image_index"):
            values = getattr(self, name).long()
            object.__setattr__(self, name, values)
            if values.shape != (count,):
                shape = tuple(values.shape)
                raise ValueError(f"{name} must be ({count},) for {count} boxes, got {shape}")
        # Only on a CPU: on a GPU the host would have to wait.
        if self.boxes.device.type == "cpu" and count:
            finite = torch.isfinite(self.boxes).all(dim=1)
            if not finite.all():
                bad = int(finite.logical_not().nonzero()[0])
                raise UserError(f"box {bad} is not finite: {self.boxes[bad].tolist()}")
            low, high = int(self.image_index.min()), int(self.image_index.max())
            if low < 0 or high >= self.num_images:
                raise ValueError(
                    f"image_index runs from {low} to {high}, but there are {self.num_images} images"
                )

    @classmethod
    def from_instances(cls, instances: Sequence[Instances]) -> GroundTruth:
        """Gather ``gt_boxes`` and ``gt_classes`` of one Instances per image."""
        boxes = [x.gt_boxes.tensor for x in instances]
        image_index = [x.new_full((len(x),), i, dtype=torch.long) for i, x in enumerate(boxes)]
        return cls(
            boxes=torch.cat(boxes),
            classes=torch.cat([x.gt_classes for x in instances]),
            image_index=torch.cat(image_index),
            num_images=len(instances),
        )

    def to(self, device: torch.device) -> GroundTruth:
        """Copy to a device; the host does not wait."""
        boxes, classes, image_index = (
            x.to(device, non_blocking=True) for x in (self.boxes, self.classes, self.image_index)
        )
        return GroundTruth(boxes, classes, image_index, self.num_images)

    def __len__(self) -> int:
        return len(self.boxes)


class HeadOutput(NamedTuple):
    """Predictions of a head for every anchor.

    Attributes:
        classes: (N, R, K) logits, or probabilities; None if another output of the head has them.
        box_regression: (N, R, D) encoded boxes, see :mod:`atss.modeling.box_coding`.
        quality: (N, R) logits of the quality branch (key CENTERNESS, log ``loss_centerness``, state
            dict ``ctrness``) or None.
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
        """Index the first dimension: images, which an int drops, or anchors of one image."""
        return self.map(lambda x: x[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadOutput:
        return HeadOutput(
            None if self.classes is None else function(self.classes),
            function(self.box_regression),
            None if self.quality is None else function(self.quality),
            self.probabilities,
        )

    @classmethod
    def concatenate(cls, outputs: Sequence[HeadOutput]) -> HeadOutput:
        """Join outputs of one head for several batches of images."""
        first, *others = outputs

        def join(name: str) -> Tensor | None:
            one = getattr(first, name)
            return None if one is None else torch.cat([one, *(getattr(x, name) for x in others)])

        regression = torch.cat([x.box_regression for x in outputs])
        return cls(join("classes"), regression, join("quality"), first.probabilities)

    def probability(self) -> Tensor:
        """Return the (N, R, K) class probabilities."""
        if self.classes is None:
            raise UserError("an output without classes detects nothing")
        return self.classes if self.probabilities else self.classes.sigmoid()

    def confidence(self) -> Tensor:
        """Return the (N, R) highest class probability."""
        if self.classes is None:
            raise UserError("an output without classes has no confidence")
        best = self.classes.amax(dim=-1)
        return best if self.probabilities else best.sigmoid()

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """Return the (N, R, K) binary cross entropy of classes and targets in [0, 1]; NaN if the
        probability is."""
        assert self.classes is not None
        if self.probabilities:
            # torch refuses NaN by a message that names no loss; a NaN loss is logged by its name.
            is_nan = self.classes.isnan()
            classes = torch.where(is_nan, 0, self.classes)
            losses = F.binary_cross_entropy(classes, targets, reduction="none")
            return torch.where(is_nan, self.classes, losses)
        return F.binary_cross_entropy_with_logits(self.classes, targets, reduction="none")


class Predictions(NamedTuple):
    """A model's predictions. Assigners get them detached.

    Attributes:
        boxes: (N, R, 4) decoded boxes.
    """

    output: HeadOutput
    boxes: Tensor


@dataclass(frozen=True)
class Assignment:
    """The ground truth that each anchor of each image is trained for.

    Attributes:
        gt_index: (N, R) int64 into the G ground truths of the batch, or BACKGROUND, or IGNORE.
        score: (N, R) float32 in [0, 1], how well positives suit their ground truth, or None.
    """

    gt_index: Tensor
    score: Tensor | None = None

    @classmethod
    def hard(cls, gt_index: Tensor) -> Assignment:
        """Call the constructor (deprecated)."""
        warn("Assignment.hard", "Assignment(gt_index)")
        return cls(gt_index)

    @property
    def positive(self) -> Tensor:
        """(N, R) bool: the anchor has a ground truth."""
        return self.gt_index >= 0

    def positives_per_object(self, num_objects: int) -> Tensor:
        """Count the positives of each ground truth: (G,) int64."""
        index = self.gt_index.flatten()
        counts = index.new_zeros(num_objects + 1)
        # Other anchors are counted in a last slot, which is dropped.
        slot = torch.where(index >= 0, index, num_objects)
        return counts.scatter_add_(0, slot, torch.ones_like(index))[:num_objects]


class Assigner(Protocol):
    """A rule that chooses training samples. If it needs predictions, its attribute
    ``looks_at_predictions`` is True."""

    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assign the R anchors of each of N images.

        Args:
            gt: G objects.
            predictions: detached; None without a model.
        """
        ...


@dataclass(frozen=True)
class Matched:
    """All anchors with their predictions and targets: the input of a criterion's terms.

    Unused predictions may be infinite, so ``output`` has 0 in place of the classes of ignored
    anchors, and of box_regression and quality of anchors that are not positive.

    Attributes:
        whole_output: of the head, without replacements.
        not_ignored: (N, R) bool.
        boxes: (N, R, 4) decoded; the anchor unless positive.
        anchors: R anchors.
        target_classes: (N, R) int64 in [0, K).
        target_boxes: (N, R, 4); the anchor unless positive.
        positive: (N, R) bool.
        score: (N, R) float32 of the rule, or None.
    """

    whole_output: HeadOutput
    not_ignored: Tensor
    boxes: Tensor
    anchors: Anchors
    target_classes: Tensor
    target_boxes: Tensor
    positive: Tensor
    score: Tensor | None

    @cached_property
    def output(self) -> HeadOutput:
        """Output of the head, with replacements, at first use: copying all classes takes longer
        than the losses of a branch without a class loss."""
        # torch.where, because 0 * infinity is NaN.
        classes, box_regression, quality, probabilities = self.whole_output
        return HeadOutput(
            None if classes is None else torch.where(self.not_ignored[..., None], classes, 0),
            torch.where(self.positive[..., None], box_regression, 0),
            None if quality is None else torch.where(self.positive, quality, 0),
            probabilities,
        )

    counts = renamed_attribute("Matched.counts", "Matched.not_ignored")
