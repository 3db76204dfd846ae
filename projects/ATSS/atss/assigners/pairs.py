"""Candidate pairs of objects and anchors: what costs, ranks and scores are functions of."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..geometry import centres, nearest_side
from .batch import AssignmentBatch, ClassLoss


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs of objects and anchors.

    Shapes are written (...): (P,) in a list, (g, R) in a table of g objects, (N, R) of matches.
    Everything is elementwise over pairs, so a rule's functions run on all of them unchanged.

    Attributes:
        batch: of the images.
        owner: int64 into G, which broadcasts to (...).
        index: int64 into R, which broadcasts to (...).
    """

    batch: AssignmentBatch
    owner: Tensor
    index: Tensor

    # --------------------------------------------------------------------------------------------
    # What a rule reads
    # --------------------------------------------------------------------------------------------

    @cached_property
    def objects(self) -> Tensor:
        """(..., 4) float64 boxes of the objects."""
        return self.batch.objects[self.owner]

    @cached_property
    def boxes(self) -> Tensor:
        """(..., 4) float64 predicted boxes."""
        return self.batch.boxes.flatten(0, 1)[self.slot].double()

    @cached_property
    def points(self) -> Tensor:
        """(..., 2) float64 centres of the anchors."""
        return self.batch.anchors.points[self.index]

    @cached_property
    def strides(self) -> Tensor:
        """(...) float64 strides of the anchors' levels."""
        return self.batch.anchors.stride[self.index].double()

    @cached_property
    def overlap(self) -> Tensor:
        """(...) float64 similarity of predicted boxes and objects; 0 if it is not finite."""
        return self.batch.similarity(self.boxes, self.objects).nan_to_num(0)

    @cached_property
    def classes(self) -> Tensor:
        """(...) prediction for the class of the object: logits, or probabilities."""
        return self.batch.classes[self.slot, self.batch.gt.classes[self.owner]]

    @cached_property
    def probability(self) -> Tensor:
        """(...) float64 predicted probability of the object's class; 0 for NaN."""
        classes = self.classes.double()
        return (classes if self.batch.output.probabilities else classes.sigmoid()).nan_to_num(0)

    def inside(self, margin: float = 0.0) -> Tensor:
        """(...) bool: the anchor's centre lies in the object, by more than ``margin`` pixels."""
        return self._once(
            ("inside", margin), lambda: nearest_side(self.points, self.objects) > margin
        )

    def around(self, radius: float) -> Tensor:
        """(...) bool: the anchor's centre lies less than ``radius`` strides from the object's, along
        both axes."""

        def compute() -> Tensor:
            offset = (self.points - centres(self.objects)).abs().amax(dim=-1)
            return offset < radius * self.strides

        return self._once(("around", radius), compute)

    def background_loss(self, loss: ClassLoss) -> Tensor:
        """(...) float64 class loss of the anchor without an object, all classes added up."""
        return self.per_anchor(self.batch.background(loss))

    # --------------------------------------------------------------------------------------------
    # What the frame reads
    # --------------------------------------------------------------------------------------------

    @cached_property
    def slot(self) -> Tensor:
        """(...) int64: the anchor of the image, among the N * R."""
        return self.batch.gt.image_index[self.owner] * self.batch.shape[1] + self.index

    def per_anchor(self, values: Tensor) -> Tensor:
        """(N, R) -> (...): the value of each pair's anchor."""
        return values.flatten()[self.slot]

    def _once(self, key: Hashable, compute):
        known = self.__dict__.setdefault("_known", {})
        if key not in known:
            known[key] = compute()
        return known[key]


def alignment(pairs: CandidatePairs, alpha: float, beta: float) -> Tensor:
    """(...) p^alpha * IoU^beta of the prediction for the object (TOOD, arXiv 2108.07755, section
    3.2), with the rule's similarity for the IoU."""
    return pairs.probability**alpha * pairs.overlap**beta


def class_cost(pairs: CandidatePairs, loss: ClassLoss, targets: Tensor) -> Tensor:
    """(...) class loss, all classes added up, if the object's class has the target and others 0: the
    loss of an anchor without an object, but for one class.

    Args:
        targets: (...) float64.
    """
    classes = pairs.classes.double()
    positive = pairs.batch.class_loss(loss, classes, targets)
    negative = pairs.batch.class_loss(loss, classes, targets.new_zeros(()).expand_as(targets))
    return pairs.background_loss(loss) + (positive - negative)
