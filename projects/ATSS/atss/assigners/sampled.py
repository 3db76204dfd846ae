"""Random samples of another rule's anchors, as in R-CNN's region proposal network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import Checked, arg
from ..structures import BACKGROUND, IGNORE, Assigner, Assignment, GroundTruth, Predictions
from .atss import ATSS

DEFAULT = ATSS()


@dataclass(frozen=True)
class Sampled(Checked):
    """Random sample of a rule's positives and background anchors in each image; the other anchors
    are ignored (Faster R-CNN, arXiv 1506.01497, section 3.1.3).

    Args:
        rule: assigns the anchors.
        num: anchors per image. Background fills the places that positives leave.
        positive_fraction: greatest share of positives.
    """

    rule: Assigner = DEFAULT
    num: int = arg(256, low=1)
    positive_fraction: float = arg(0.5, low=0, high=1)

    @property
    def looks_at_predictions(self) -> bool:
        return getattr(self.rule, "looks_at_predictions", False)

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        assigned = self.rule(anchors, gt, predictions)
        order = torch.rand(assigned.gt_index.shape, device=assigned.gt_index.device)
        is_background = assigned.gt_index == BACKGROUND
        limit = torch.full_like(order[:, :1], int(self.num * self.positive_fraction))
        positive = self._draw(order, assigned.positive, limit)
        background = self._draw(order, is_background, self.num - positive.sum(1, keepdim=True))
        return Assignment(
            assigned.gt_index.masked_fill(~(positive | background), IGNORE), assigned.score
        )

    def _draw(self, order: Tensor, eligible: Tensor, limit: Tensor) -> Tensor:
        """Select the (N, 1) ``limit`` of (N, R) eligible anchors that come first. All shapes are
        known in advance, so the host never waits for a GPU."""
        first = torch.where(eligible, order, -1).topk(min(self.num, order.shape[1]), dim=1)
        place = torch.arange(first.values.shape[1], device=order.device)
        selected = (first.values >= 0) & (place < limit)
        return torch.zeros_like(eligible).scatter(1, first.indices, selected)
