"""Candidate pairs of objects and anchors: the input of costs, ranks and scores. Values that decide
are float64, so that rounding does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..anchors import Anchors
from ..caching import cached, cached_property
from ..deprecated import renamed_attribute, renamed_names
from ..errors import UserError
from ..geometry import area, centres, nearest_side
from ..structures import GroundTruth, HeadOutput, Predictions
from .engine import table_limit
from .similarities import IOU, Similarity

__getattr__ = renamed_names(__name__)
# (probability, cross entropy, targets) -> elementwise losses, as in atss.losses.
ClassLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AssignmentBatch:
    """Arguments of a rule, and values derived from them.

    Attributes:
        anchors, gt, predictions: see :class:`~atss.structures.Assigner`.
        similarity: of predicted boxes and objects.
        eligible_radius: None: every anchor may be selected. A number: anchors inside any object of
            their image, or less than this many strides from its centre along both axes.
    """

    anchors: Anchors
    gt: GroundTruth
    predictions: Predictions | None
    similarity: Similarity = IOU
    eligible_radius: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, R)."""
        return self.gt.num_images, len(self.anchors.boxes)

    @cached_property
    def objects(self) -> Tensor:
        """(G, 4) float64."""
        return self.gt.boxes.double()

    @cached_property
    def areas(self) -> Tensor:
        """(G,) float64 of the objects."""
        return area(self.objects)

    @cached_property
    def nonempty(self) -> Tensor:
        """(G,) bool: objects with an area. No box code can encode others."""
        return self.areas > 0

    @property
    def boxes(self) -> Tensor:
        """(N, R, 4) predicted."""
        assert self.predictions is not None
        return self.predictions.boxes

    @cached_property
    def finite(self) -> Tensor:
        """(N, R) bool: predicted boxes without NaN and infinity."""
        return self.boxes.isfinite().all(dim=-1)

    @property
    def output(self) -> HeadOutput:
        assert self.predictions is not None
        return self.predictions.output

    @cached_property
    def classes(self) -> Tensor:
        """(N * R, K) predicted classes: logits, or probabilities."""
        if self.output.classes is None:
            raise UserError("the assigner needs predicted classes, which this output does not have")
        return self.output.classes.flatten(0, 1)

    def class_loss(self, loss: ClassLoss, classes: Tensor, targets: Tensor) -> Tensor:
        """Return the elementwise loss, in the dtype of the classes."""
        output = self.output._replace(classes=classes)
        return loss(output.probability(), output.cross_entropy(targets), targets)

    def background_loss(self, loss: ClassLoss, classes: Tensor) -> Tensor:
        """Return (M,) float64: the loss of (M, K) classes without an object, summed over classes.
        All pairs of an anchor share it, so float32 suffices for its terms."""
        count, classes = len(classes), classes.float()
        if classes.device.type == "cpu":
            # The last elements of each thread are computed by other instructions, which round
            # differently, so that equal predictions would have unequal losses.
            classes = F.pad(classes, (0, 0, 0, -count % (64 * torch.get_num_threads())))
        zero = classes.new_zeros(()).expand_as(classes)
        return self.class_loss(loss, classes, zero)[:count].sum(dim=1, dtype=torch.float64)

    @cached
    def background(self, loss: ClassLoss) -> Tensor:
        """Return (N, R) float64: :meth:`background_loss` of all anchors."""
        # A few images at a time bound memory.
        step = max(1, 2 * table_limit() // (self.shape[1] * self.classes.shape[1])) * self.shape[1]
        parts = [self.background_loss(loss, x) for x in self.classes.split(step)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs of objects and anchors, of shape (...): (P,) in a list, (g, R) in a table of g objects,
    (N, R) for matches. Elementwise functions fit all shapes.

    Attributes:
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
    def similarity(self) -> Tensor:
        """(...) float64 similarity of predicted boxes and objects, by default their IoU; 0 if it is
        not finite."""
        return self.batch.similarity(self.boxes, self.objects).nan_to_num(0)

    @property
    def anchor_similarity(self) -> Tensor:
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

    @cached
    def inside(self, margin: float = 0.0) -> Tensor:
        """Return (...) bool: the anchor's centre is in the object, by more than ``margin`` px."""
        return nearest_side(self.points, self.objects) > margin

    @cached
    def is_near_centre(self, radius: float) -> Tensor:
        """Return (...) bool: the anchor's centre is less than ``radius`` strides from that of the
        object along both axes."""
        offset = (self.points - centres(self.objects)).abs().amax(dim=-1)
        return offset < radius * self.strides

    def is_central(self, radius: float, margin: float = 0.0) -> Tensor:
        """Return (...) bool: :meth:`inside` the object and near its centre."""
        return self.inside(margin) & self.is_near_centre(radius)

    def background_loss(self, loss: ClassLoss) -> Tensor:
        """Return (...) float64: the anchors' :meth:`AssignmentBatch.background_loss`."""
        return self.per_anchor(self.batch.background(loss))

    overlap = renamed_attribute("pairs.overlap", "pairs.similarity")
    around = renamed_attribute("pairs.around", "pairs.is_near_centre")

    # Below: for Matching. Rows are the pairs of one object each.

    @cached_property
    def slot(self) -> Tensor:
        """(...) int64: the anchor of the image, among the N * R."""
        return self.batch.gt.image_index[self.owner] * self.batch.shape[1] + self.index

    @property
    def shape(self) -> torch.Size:
        """Return (...)."""
        return torch.broadcast_shapes(self.owner.shape, self.index.shape)

    @property
    def address(self) -> Tensor:
        """(M, ...) int64 index of the pairs' anchors into dimension 0 of :meth:`view`."""
        return self.slot.flatten()

    def view(self, per_slot: Tensor) -> Tensor:
        """View (N * R,) values as (S, ...), for gather and scatter by :attr:`address`."""
        return per_slot

    def per_anchor(self, values: Tensor) -> Tensor:
        """Gather (N, R) values: (...)."""
        return values.flatten()[self.slot]

    def rows(self, values: Tensor, fill: float) -> Tensor:
        """Arrange (...) values as (g, M): those of each object, then ``fill``."""
        return values

    def from_rows(self, table: Tensor) -> Tensor:
        """Invert :meth:`rows`: (g, M) to (...)."""
        return table

    @property
    def row_ids(self) -> Tensor:
        """(g,) int64 object of each row."""
        return self.owner[:, 0]


def alignment(pairs: CandidatePairs, alpha: float, beta: float) -> Tensor:
    """Return (...) p^alpha * IoU^beta of the prediction for the object (TOOD, arXiv 2108.07755,
    section 3.2), with the rule's similarity as the IoU."""
    return pairs.probability**alpha * pairs.similarity**beta


def class_cost(pairs: CandidatePairs, loss: ClassLoss, targets: Tensor) -> Tensor:
    """Return the (...) class loss, summed over classes, with (...) float64 targets for the object's
    class and 0 for others: the background loss with one class replaced."""
    batch, classes = pairs.batch, pairs.classes.double()
    positive = batch.class_loss(loss, classes, targets)
    negative = batch.class_loss(loss, classes, torch.zeros_like(targets))
    return pairs.background_loss(loss) + (positive - negative)
