"""A batch of images, and its candidate pairs of objects and anchors: what costs, ranks and scores
are functions of. What decides is float64, so that it does not depend on rounding."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..anchors import Anchors
from ..deprecated import renamed_names
from ..errors import UserError
from ..geometry import area, centres, nearest_side
from ..structures import GroundTruth, HeadOutput, Predictions, cached_property
from .engine import table_limit
from .similarities import IOU, Similarity

__getattr__ = renamed_names(__name__)
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
    def shape(self) -> tuple[int, int]:
        """(N, R)"""
        return self.gt.num_images, len(self.anchors.boxes)

    @cached_property
    def objects(self) -> Tensor:
        """(G, 4) float64 boxes."""
        return self.gt.boxes.double()

    @cached_property
    def areas(self) -> Tensor:
        """(G,) float64 of the objects."""
        return area(self.objects)

    @cached_property
    def nonempty(self) -> Tensor:
        """(G,) bool: objects with an area. No box code can describe the others to a head."""
        return self.areas > 0

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
        """(N, R) bool: predicted boxes without NaN and infinity."""
        return self.boxes.isfinite().all(dim=-1)

    def anchors_at(self, location: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """(g, C) locations and whether they exist -> (g, C * A) of their A anchors."""
        many = self.anchors.num_anchors
        if many > 1:
            each = torch.arange(many, device=location.device)
            location = (location[..., None] * many + each).flatten(1)
            exists = exists.repeat_interleave(many, dim=1)
        return location, exists

    @cached_property
    def output(self) -> HeadOutput:
        """The head's."""
        assert self.predictions is not None
        return self.predictions.output

    @cached_property
    def classes(self) -> Tensor:
        """(N * R, K) predicted: logits, or probabilities."""
        if self.output.classes is None:
            raise UserError("a rule looks at the classes of an output that has none")
        return self.output.classes.flatten(0, 1)

    def class_loss(self, loss: ClassLoss, classes: Tensor, targets: Tensor) -> Tensor:
        """Elementwise class loss of predicted classes, in their dtype."""
        predicted = HeadOutput(classes, targets, None, self.output.probabilities)
        return loss(predicted.probability(), predicted.cross_entropy(targets), targets)

    def sum_over_classes(self, loss: ClassLoss, classes: Tensor) -> Tensor:
        """(M,) float64 class loss of (M, K) predictions without an object, all classes added up. It
        is the same in all pairs of an anchor, so its terms need be no more than float32."""
        count, classes = len(classes), classes.float()
        if classes.device.type == "cpu":
            # The last few of each thread's elements take other instructions, which round otherwise,
            # so that equal predictions would have unequal losses.
            classes = F.pad(classes, (0, 0, 0, -count % (64 * torch.get_num_threads())))
        zero = classes.new_zeros(()).expand_as(classes)
        return self.class_loss(loss, classes, zero)[:count].sum(dim=1, dtype=torch.float64)

    def background(self, loss: ClassLoss) -> Tensor:
        """(N, R) float64 class loss of anchors without an object, all classes added up."""
        return self.once(("background", loss), lambda: self._background(loss))

    def _background(self, loss: ClassLoss) -> Tensor:
        # A few images at a time bound memory.
        step = max(1, 2 * table_limit() // (self.shape[1] * self.classes.shape[1])) * self.shape[1]
        parts = [self.sum_over_classes(loss, x) for x in self.classes.split(step)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs of objects and anchors.

    Shapes are written (...): (P,) in a list, (g, R) in a table of g objects, (N, R) of matches.
    A rule's costs, ranks and scores are elementwise over pairs, so they run on all of them.

    Attributes:
        batch: of the images.
        owner, index: int64 objects, into G, and anchors, into R, which broadcast to (...).
    """

    batch: AssignmentBatch
    owner: Tensor
    index: Tensor

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

    @property
    def anchor_overlap(self) -> Tensor:
        """(...) float64 similarity of anchors and objects."""
        return self.batch.similarity(self.batch.anchors.boxes[self.index].double(), self.objects)

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
        """(...) bool: the anchor's centre lies less than ``radius`` strides from the object's,
        along both axes."""
        return self._once(("around", radius), lambda: self._offset < radius * self.strides)

    @property
    def _offset(self) -> Tensor:
        return (self.points - centres(self.objects)).abs().amax(dim=-1)

    def _once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        computed = self.__dict__.setdefault("_computed", {})
        if key not in computed:
            computed[key] = compute()
        return computed[key]

    def background_loss(self, loss: ClassLoss) -> Tensor:
        """(...) float64 class loss of the anchor without an object, all classes added up."""
        return self.per_anchor(self.batch.background(loss))

    # What follows is for the frame. Rows are the pairs of an object each.

    @cached_property
    def slot(self) -> Tensor:
        """(...) int64: the anchor of the image, among the N * R."""
        return self.batch.gt.image_index[self.owner] * self.batch.shape[1] + self.index

    @property
    def shape(self) -> torch.Size:
        """(...)"""
        return torch.broadcast_shapes(self.owner.shape, self.index.shape)

    @property
    def address(self) -> Tensor:
        """(M, ...) int64 into dimension 0 of :meth:`view`."""
        return self.slot.flatten()

    def view(self, per_slot: Tensor) -> Tensor:
        """(N * R,) values, as :attr:`address` finds them."""
        return per_slot

    def per_anchor(self, values: Tensor) -> Tensor:
        """(N, R) -> (...)"""
        return values.flatten()[self.slot]

    def rows(self, values: Tensor, fill: float) -> Tensor:
        """(...) -> (g, M): the values of each object, then ``fill``."""
        return values

    def from_rows(self, table: Tensor) -> Tensor:
        """(g, M) -> (...)"""
        return table

    @property
    def row_ids(self) -> Tensor:
        """(g,) int64 the object of each row."""
        return self.owner[:, 0]


def alignment(pairs: CandidatePairs, alpha: float, beta: float) -> Tensor:
    """(...) p^alpha * IoU^beta of the prediction for the object (TOOD, arXiv 2108.07755, section
    3.2), with the rule's similarity for the IoU."""
    return pairs.probability**alpha * pairs.overlap**beta


def class_cost(pairs: CandidatePairs, loss: ClassLoss, targets: Tensor) -> Tensor:
    """(...) class loss, all classes added up, if the object's class has the target and others 0:
    the loss of an anchor without an object, but for one class.

    Args:
        targets: (...) float64.
    """
    batch, classes = pairs.batch, pairs.classes.double()
    positive = batch.class_loss(loss, classes, targets)
    negative = batch.class_loss(loss, classes, torch.zeros_like(targets))
    return pairs.background_loss(loss) + (positive - negative)
