"""DDOD's rule: ATSS on predictions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import UserError, arg
from ..geometry import centres, nearest_side
from ..structures import Assignment, GroundTruth, Predictions
from .atss import ATSS, above_mean_and_std, exact, join
from .conflicts import assign_best
from .locations import INSIDE_MARGIN
from .pairs import AssignmentBatch, CandidatePairs, alignment


@dataclass(frozen=True)
class DDOD(ATSS):
    """ATSS with p^(1 - alpha) * IoU^alpha of the prediction in place of the IoU of the anchor
    (DDOD, arXiv 2107.02963).

    Args:
        top_k, count: as in ATSS, whose candidates it has.
        similarity: of predicted boxes and objects.
        alpha: weight of the IoU against the class probability.
    """

    looks_at_predictions: ClassVar[bool] = True

    alpha: float = arg(0.8, low=0, high=1)

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`.

        Raises:
            ValueError: without predictions.
        """
        if predictions is None:
            raise UserError("DDOD looks at what a model predicts, and there is none")
        batch = AssignmentBatch(anchors, gt, predictions, exact(self.similarity))
        ids = torch.arange(len(gt), device=gt.boxes.device)
        pairs = (self.aligned(batch, some) for some in ids.split(self.CHUNK))
        return Assignment(assign_best(gt, *join(pairs), len(anchors.boxes)))

    def aligned(self, batch: AssignmentBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Find the candidates of (g,) objects: (C, g) int64 into R, and (C, g) float64 alignment,
        -inf if not positive."""
        objects = batch.objects[ids]
        index, valid, boxes = self.nearest(batch.anchors, objects)
        pairs = CandidatePairs(batch, ids.expand_as(index), index)
        affinity = alignment(pairs, 1 - self.alpha, self.alpha) * valid
        positive = above_mean_and_std(affinity, valid, self.TOLERANCE)
        inside = nearest_side(centres(boxes), objects) > INSIDE_MARGIN
        return index, affinity.masked_fill_(~(positive & inside), -torch.inf)
