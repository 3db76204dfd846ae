"""What becomes of boxes that overlap.

A suppression maps (boxes (M, 4), scores (M,), classes (M,), limit) to the same three of what is
left, best first and at most so many. Votes move boxes, so it is not indices.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from ..errors import Checked, arg
from ..geometry import iou


class ScoredBoxes(NamedTuple):
    """Attributes: boxes (M, 4), scores (M,), classes (M,)."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def take(self, index: Tensor | slice) -> "ScoredBoxes":
        """Those of an index or a mask."""
        return ScoredBoxes(*(x[index] for x in self))


def keep_all(boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
    """No suppression."""
    best = scores.argsort(descending=True, stable=True)[:limit]
    return ScoredBoxes(boxes, scores, classes).take(best)


@dataclass(frozen=True)
class NMS(Checked):
    """Non-maximum suppression of all classes at once.

    Boxes are shifted apart by class, in float64: in float32 the shift would cost the overlaps of
    high classes their last digits.

    Args:
        threshold: a box goes when its IoU with a better one of its class exceeds this.
    """

    threshold: float = arg(0.6, low=0, high=1)
    # Of more boxes, classes are taken one by one: a GPU needs memory for each pair of boxes.
    TOGETHER: ClassVar[int] = 20_000

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
        if len(boxes) > self.TOGETHER:
            of_classes = ((classes == k).nonzero().squeeze(1) for k in classes.unique())
            keep = [
                x[nms(boxes[x].double(), scores[x].double(), self.threshold)] for x in of_classes
            ]
            kept = ScoredBoxes(boxes, scores, classes).take(torch.cat(keep).sort().values)
            return keep_all(*kept, limit)
        precise = boxes.double()
        span = precise.max() - precise.min() + 1 if len(precise) else 1
        keep = nms(precise + (classes * span)[:, None], scores.double(), self.threshold)
        return ScoredBoxes(boxes, scores, classes).take(keep[:limit])


@dataclass(frozen=True)
class ScoreVote(NMS):
    """NMS, after which each box is moved to the mean of all boxes of its class, those that went
    too, weighted by exp(-(1 - IoU)^2 / spread) and score (PAA, arXiv 2007.08103, section 3.4).

    Args:
        threshold: of NMS.
        spread: how fast a vote falls with the IoU.
        min_overlap: the IoU that a voter exceeds.
    """

    spread: float = arg(0.025, low=1e-6, high=1e6)
    min_overlap: float = arg(0.01, low=0, high=1)
    # Pairs of boxes that are looked at together, for memory.
    PAIRS: ClassVar[int] = 1 << 22

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
        kept = super().__call__(boxes, scores, classes, limit)
        voters = ScoredBoxes(boxes, scores, classes).take(torch.isin(classes, kept.classes))
        if not len(voters.boxes):
            return kept
        step = max(1, self.PAIRS // len(voters.boxes))
        moved = [
            self._moved(kept.take(slice(i, i + step)), voters)
            for i in range(0, len(kept.boxes), step)
        ]
        return kept._replace(boxes=torch.cat(moved))

    def _moved(self, kept: ScoredBoxes, voters: ScoredBoxes) -> Tensor:
        """(k, 4) boxes, moved."""
        overlap = iou(kept.boxes[:, None], voters.boxes)
        votes = (-((1 - overlap) ** 2) / self.spread).exp() * voters.scores
        heard = (overlap > self.min_overlap) & (kept.classes[:, None] == voters.classes)
        votes = torch.where(heard, votes, 0).double()
        total = votes.sum(dim=1, keepdim=True)
        mean = (votes @ voters.boxes.double() / total).to(kept.boxes.dtype)
        return torch.where(total > 0, mean, kept.boxes)


@dataclass(frozen=True)
class Vote(Checked):
    """Groups of overlapping boxes of a class become their mean, weighted by score, with the group's
    highest score (box voting, arXiv 1505.01749, section 5).

    Args:
        threshold: a group is the best box that is left and all whose IoU with it is at least so
            much.
    """

    threshold: float = arg(0.66, low=0, high=1)

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
        kept: list[ScoredBoxes] = []
        for k in classes.unique():
            of_class = (classes == k).nonzero().squeeze(1)
            order = of_class[scores[of_class].argsort(descending=True, stable=True)]
            left, left_scores = boxes[order], scores[order]
            if len(left) == 1:
                kept.append(ScoredBoxes(left, left_scores, classes[order]))
                continue
            while len(left):
                overlap = iou(left[0], left)
                # The best is of its group, even where it has no area.
                group = overlap >= self.threshold
                group = group.index_fill(0, left.new_zeros(1, dtype=torch.long), True)
                found, found_scores = self._merge(left[group], left_scores[group], overlap[group])
                kept.append(ScoredBoxes(found, found_scores, k.expand(len(found))))
                left, left_scores = left[~group], left_scores[~group]
        if not kept:
            return ScoredBoxes(boxes, scores, classes)
        boxes, scores, classes = (torch.cat(x) for x in zip(*kept, strict=True))
        return keep_all(boxes, scores, classes, limit)

    def _merge(self, members: Tensor, weights: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of a group: (M, 4) boxes, (M,) scores and overlaps with the first."""
        if len(members) == 1:
            return members, weights
        shares = weights if weights.any() else torch.ones_like(weights)
        mean = (members * shares[:, None]).sum(dim=0) / shares.sum()
        return mean[None], weights[:1]


@dataclass(frozen=True)
class SoftVote(Vote):
    """Votes, whose voters stay with their scores lowered by their overlap with the best (soft
    suppression, arXiv 1704.04503).

    Args:
        threshold: as of votes.
        min_score: what a lowered score must be at least for its box to stay.
    """

    min_score: float = arg(0.05, low=0, high=1)

    def _merge(self, members: Tensor, weights: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
        found, found_scores = super()._merge(members, weights, overlap)
        if len(members) == 1:
            return found, found_scores
        lowered = weights * (1 - overlap)
        stay = lowered >= self.min_score
        return torch.cat([found, members[stay]]), torch.cat([found_scores, lowered[stay]])
