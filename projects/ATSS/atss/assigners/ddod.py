"""DDOD's rule: ATSS on predictions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import UserError, arg
from ..structures import Assignment, GroundTruth, Predictions
from .atss import ATSS, exact, join
from .conflicts import assign_best
from .matching import NO_PREDICTIONS
from .pairs import AssignmentBatch, CandidatePairs, alignment


@dataclass(frozen=True)
class DDOD(ATSS):
    """ATSS with p^(1 - alpha) * IoU^alpha of the prediction as the IoU of the anchor (DDOD, arXiv
    2107.02963).

    Args:
        top_k, count: see :class:`ATSS`.
        similarity: of predicted boxes and objects.
    """

    looks_at_predictions: ClassVar[bool] = True

    alpha: float = arg(0.8, low=0, high=1)

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        if predictions is None:
            raise UserError(NO_PREDICTIONS.format("DDOD"))
        batch = AssignmentBatch(anchors, gt, predictions, exact(self.similarity))
        ids = torch.arange(len(gt), device=gt.boxes.device)
        pieces = (self.aligned(batch, piece) for piece in ids.split(self.CHUNK))
        return Assignment(assign_best(gt, *join(pieces), len(anchors.boxes)))

    def aligned(self, batch: AssignmentBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        objects = batch.objects[ids]
        index, valid, boxes = self.nearest(batch.anchors, objects)
        pairs = CandidatePairs(batch, ids.expand_as(index), index)
        affinity = alignment(pairs, 1 - self.alpha, self.alpha) * valid
        kept = self.keep_positives(affinity, valid, boxes, objects)
        self._record(index, affinity, valid, kept)
        return index, kept
