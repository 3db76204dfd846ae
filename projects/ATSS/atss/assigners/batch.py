"""A batch, as rules see it that choose among pairs of objects and anchors.

What decides is float64, so that it does not depend on rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import area
from ..structures import GroundTruth, HeadOutput, Predictions
from .engine import table_limit
from .similarities import IOU, Similarity

# (probability, cross entropy, targets) -> elementwise, as in atss.losses.
ClassLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AssignmentBatch:
    """Anchors, objects and predictions of N images, and what rules compute of them once.

    Attributes:
        anchors: R anchors.
        gt: G objects of N images.
        predictions: of the images; None for rules that look at anchors alone.
        similarity: of predicted boxes and objects.
        eligible_radius: None: every anchor may be chosen. A number: those inside any object of
            their image, or less than so many strides from its centre along both axes.
    """

    anchors: Anchors
    gt: GroundTruth
    predictions: Predictions | None
    similarity: Similarity = IOU
    eligible_radius: float | None = None
    _computed: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Compute a value when it is asked for first, and keep it."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    @property
    def num_slots(self) -> int:
        """N * R"""
        return self.shape[0] * self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, R)"""
        return self.gt.num_images, len(self.anchors.boxes)

    @cached_property
    def objects(self) -> Tensor:
        """(G, 4) float64 boxes."""
        return self.gt.boxes.double()

    @cached_property
    def nonempty(self) -> Tensor:
        """(G,) bool: objects with an area. No box code can describe the others to a head."""
        return area(self.objects) > 0

    @property
    def boxes(self) -> Tensor:
        """(N, R, 4) predicted."""
        assert self.predictions is not None
        return self.predictions.boxes

    @cached_property
    def columns(self) -> Tensor:
        """(4, N, R) predicted boxes, in memory x1 of all, then y1 of all."""
        return self.boxes.movedim(-1, 0).contiguous()

    @cached_property
    def finite(self) -> Tensor:
        """(N, R) bool: predicted boxes without NaN and infinity; all, if there are no predictions."""
        if self.predictions is None:
            return self.gt.boxes.new_ones(self.shape, dtype=torch.bool)
        return self.boxes.isfinite().all(dim=-1)

    def anchors_at(self, location: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """(g, C) locations and whether they exist -> (g, C * A) of their A anchors."""
        many = self.anchors.num_anchors
        if many > 1:
            each = torch.arange(many, device=location.device)
            location = (location[..., None] * many + each).flatten(1)
            exists = exists.repeat_interleave(many, dim=1)
        return location, exists

    # --------------------------------------------------------------------------------------------
    # Classes
    # --------------------------------------------------------------------------------------------

    @cached_property
    def output(self) -> HeadOutput:
        """The head's."""
        assert self.predictions is not None
        return self.predictions.output

    @cached_property
    def classes(self) -> Tensor:
        """(N * R, K) predicted: logits, or probabilities."""
        if self.output.classes is None:
            raise ValueError("a rule looks at the classes of an output that has none")
        return self.output.classes.flatten(0, 1)

    def class_loss(self, loss: ClassLoss, classes: Tensor, targets: Tensor) -> Tensor:
        """Elementwise class loss of predicted classes, in their dtype."""
        predicted = HeadOutput(classes, targets, None, self.output.probabilities)
        return loss(predicted.probability(), predicted.cross_entropy(targets), targets)

    def sum_over_classes(self, loss: ClassLoss, classes: Tensor) -> Tensor:
        """(M,) float64 class loss of (M, K) predictions without an object, all classes added up. It
        is the same in all pairs of an anchor, so its terms need be no more than float32."""
        zero = classes.new_zeros((), dtype=torch.float32).expand_as(classes)
        return self.class_loss(loss, classes.float(), zero).sum(dim=1, dtype=torch.float64)

    def background(self, loss: ClassLoss) -> Tensor:
        """(N, R) float64 class loss of anchors without an object, all classes added up."""
        return self.once(("background", loss), lambda: self._background(loss))

    def _background(self, loss: ClassLoss) -> Tensor:
        # A few images at a time bound memory.
        step = max(1, 2 * table_limit() // (self.shape[1] * self.classes.shape[1])) * self.shape[1]
        parts = [self.sum_over_classes(loss, x) for x in self.classes.split(step)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)
