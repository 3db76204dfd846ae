"""Suppression of overlapping boxes.

A suppression maps (boxes (M, 4), scores (M,), classes (M,), limit) to at most ``limit`` boxes,
scores and classes, best first, without indices, because votes move boxes.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from ..errors import Checked, arg
from ..geometry import iou


class ScoredBoxes(NamedTuple):
    """Boxes (M, 4), scores (M,) and classes (M,)."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def take(self, index: Tensor | slice) -> "ScoredBoxes":
        return ScoredBoxes(*(x[index] for x in self))


def keep_all(boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
    """Return the boxes with the highest scores, without suppression."""
    best = scores.argsort(descending=True, stable=True)[:limit]
    return ScoredBoxes(boxes, scores, classes).take(best)


@dataclass(frozen=True)
class _Suppression(Checked):
    """Base of suppressions.

    Args:
        class_agnostic: whether boxes suppress those of other classes, too.
    """

    class_agnostic: bool = field(default=False, kw_only=True)

    def _groups(self, classes: Tensor) -> Tensor:
        """Return (M,) int64 group of each box, which is suppressed by its group only."""
        return torch.zeros_like(classes) if self.class_agnostic else classes


@dataclass(frozen=True)
class NMS(_Suppression):
    """Non-maximum suppression of all classes at once.

    Boxes of different classes are shifted apart, in float64: in float32 the shift would change the
    IoUs of high classes.

    Args:
        threshold: a box is removed if its IoU with a better one of its class exceeds this.
    """

    threshold: float = arg(0.6, low=0, high=1)
    # With more boxes, classes are processed one by one: a GPU needs memory for each pair of boxes.
    MAX_BOXES: ClassVar[int] = 20_000

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
        groups = self._groups(classes)
        if len(boxes) > self.MAX_BOXES:
            indices = ((groups == k).nonzero().squeeze(1) for k in groups.unique())
            keep = [x[nms(boxes[x].double(), scores[x].double(), self.threshold)] for x in indices]
            kept = ScoredBoxes(boxes, scores, classes).take(torch.cat(keep).sort().values)
            return keep_all(*kept, limit)
        precise = boxes.double()
        span = precise.max() - precise.min() + 1 if len(precise) else 1
        keep = nms(precise + (groups * span)[:, None], scores.double(), self.threshold)
        return ScoredBoxes(boxes, scores, classes).take(keep[:limit])


@dataclass(frozen=True)
class ScoreVote(NMS):
    """Score voting: NMS, then each kept box becomes the mean of all boxes of its class, weighted by
    exp(-(1 - IoU)^2 / spread) and score (PAA, arXiv 2007.08103, section 3.4). Boxes of other
    classes do not vote, even if they are suppressed.

    Args:
        min_overlap: only boxes with a larger IoU vote.
    """

    spread: float = arg(0.025, low=1e-6, high=1e6)
    min_overlap: float = arg(0.01, low=0, high=1)
    # Pairs of boxes that are processed at a time, to limit memory.
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
        overlap = iou(kept.boxes[:, None], voters.boxes)
        votes = (-((1 - overlap) ** 2) / self.spread).exp() * voters.scores
        counts = (overlap > self.min_overlap) & (kept.classes[:, None] == voters.classes)
        votes = torch.where(counts, votes, 0).double()
        total = votes.sum(dim=1, keepdim=True)
        mean = (votes @ voters.boxes.double() / total).to(kept.boxes.dtype)
        return torch.where(total > 0, mean, kept.boxes)


@dataclass(frozen=True)
class Vote(_Suppression):
    """Box voting: overlapping boxes of a class become their mean, weighted by score, with the
    highest score and its class (arXiv 1505.01749, section 5).

    Args:
        threshold: smallest IoU of a group's boxes with its best box.
    """

    threshold: float = arg(0.66, low=0, high=1)

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor, limit: int) -> ScoredBoxes:
        kept: list[ScoredBoxes] = []
        groups = self._groups(classes)
        for k in groups.unique():
            index = (groups == k).nonzero().squeeze(1)
            order = index[scores[index].argsort(descending=True, stable=True)]
            left = ScoredBoxes(boxes, scores, classes).take(order)
            while len(left.boxes):
                overlap = iou(left.boxes[0], left.boxes)
                # The best box belongs to its group even if it is empty: its IoU with itself is 0.
                group = overlap >= self.threshold
                group = group.index_fill(0, order.new_zeros(1), True)
                kept.append(self._merge(left.take(group), overlap[group]))
                left = left.take(~group)
        if not kept:
            return ScoredBoxes(boxes, scores, classes)
        boxes, scores, classes = (torch.cat(x) for x in zip(*kept, strict=True))
        return keep_all(boxes, scores, classes, limit)

    def _merge(self, group: ScoredBoxes, overlap: Tensor) -> ScoredBoxes:
        """Merge a group, best first; ``overlap`` is the (M,) IoUs with the best."""
        if len(group.boxes) == 1:
            return group
        weights = group.scores if group.scores.any() else torch.ones_like(group.scores)
        mean = (group.boxes * weights[:, None]).sum(dim=0) / weights.sum()
        return ScoredBoxes(mean[None], group.scores[:1], group.classes[:1])


@dataclass(frozen=True)
class SoftVote(Vote):
    """Box voting that keeps the group's boxes too, with scores lowered by their IoU with the best
    (Soft-NMS, arXiv 1704.04503).

    Args:
        min_score: lower new scores are removed.
    """

    min_score: float = arg(0.05, low=0, high=1)

    def _merge(self, group: ScoredBoxes, overlap: Tensor) -> ScoredBoxes:
        merged = super()._merge(group, overlap)
        if len(group.boxes) == 1:
            return merged
        lowered = group.scores * (1 - overlap)
        others = group._replace(scores=lowered).take(lowered >= self.min_score)
        return ScoredBoxes(*(torch.cat(x) for x in zip(merged, others, strict=True)))
