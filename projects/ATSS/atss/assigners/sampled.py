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
    are ignored (Faster R-CNN, arXiv 1506.01497, section 3.1.3). With equal random numbers the
    sample is that of Detectron2's ``subsample_labels``.

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
        sampled = torch.full_like(assigned.gt_index, IGNORE)
        for row, image in zip(sampled, assigned.gt_index, strict=True):
            positive = _draw(image >= 0, int(self.num * self.positive_fraction))
            background = _draw(image == BACKGROUND, self.num - len(positive))
            row[positive] = image[positive]
            row[background] = BACKGROUND
        return Assignment(sampled, assigned.score)


def _draw(eligible: Tensor, num: int) -> Tensor:
    """Return at most ``num`` random indices of (R,) eligible anchors."""
    index = eligible.nonzero().squeeze(1)
    return index[torch.randperm(len(index), device=index.device)[:num]]
