"""What becomes of boxes that overlap: suppression, and votes."""

import torch
from torch import Tensor
from torchvision.ops import nms

from ..geometry import iou

# (boxes (M, 4), scores (M,), classes (M,)) -> the same of what is left, best first.
ScoredBoxes = tuple[Tensor, Tensor, Tensor]


def nms_per_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression of all classes at once.

    Boxes are shifted apart by class, in float64: in float32 the shift would cost the overlaps of
    high classes their last digits.

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,).
        threshold: a box goes when its IoU with a better one of its class exceeds this.
    Returns:
        indices of what stays, best first.
    """
    boxes = boxes.double()
    span = boxes.max() - boxes.min() + 1 if len(boxes) else 1
    return nms(boxes + (classes * span)[:, None], scores.double(), threshold)


def merge_nms(boxes: Tensor, scores: Tensor, classes: Tensor, nms_thresh: float) -> ScoredBoxes:
    """Plain suppression of each class."""
    keep = nms_per_class(boxes, scores, classes, nms_thresh)
    return boxes[keep], scores[keep], classes[keep]


def merge_vote(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    vote_thresh: float,
    soft_min_score: float | None = None,
) -> ScoredBoxes:
    """Groups of overlapping boxes of a class become their mean, weighted by score, with the group's
    highest score (box voting, arXiv 1505.01749, section 5).

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,).
        vote_thresh: a group is the best box that is left and all that overlap it so much.
        soft_min_score: the members of a group stay too, their scores lowered by their overlap with
            its best (soft suppression, arXiv 1704.04503), where this much is left; None for not.
    """
    kept: list[ScoredBoxes] = []
    for k in classes.unique():
        of_class = (classes == k).nonzero().squeeze(1)
        order = of_class[scores[of_class].argsort(descending=True, stable=True)]
        left, left_scores = boxes[order], scores[order]
        if len(left) == 1:
            kept.append((left, left_scores, classes[order]))
            continue
        while len(left):
            overlap = iou(left[0], left)
            # The best is of its group, even where it has no area.
            group = (overlap >= vote_thresh).index_fill(
                0, left.new_zeros(1, dtype=torch.long), True
            )
            members, weights = left[group], left_scores[group]
            shares = weights if weights.any() else torch.ones_like(weights)
            merged = (members * shares[:, None]).sum(dim=0) / shares.sum()
            found, found_scores = merged[None], weights[:1]
            if len(members) == 1:
                found = members
            elif soft_min_score is not None:
                lowered = weights * (1 - overlap[group])
                stay = lowered >= soft_min_score
                found = torch.cat([found, members[stay]])
                found_scores = torch.cat([found_scores, lowered[stay]])
            kept.append((found, found_scores, k.expand(len(found))))
            left, left_scores = left[~group], left_scores[~group]
    if not kept:
        return boxes, scores, classes
    merged, merged_scores, merged_classes = (torch.cat(x) for x in zip(*kept, strict=True))
    order = merged_scores.argsort(descending=True, stable=True)
    return merged[order], merged_scores[order], merged_classes[order]
