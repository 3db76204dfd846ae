"""The anchors that a rule assigns to each object of an image, and those it nearly assigns."""

from dataclasses import dataclass

import numpy as np
import torch

from ..anchors import Anchors
from ..structures import Assigner, GroundTruth, HeadOutput, Predictions

# Objects that are assigned at a time, each on an image of its own.
CHUNK = 64


@dataclass(frozen=True)
class Explanation:
    """The R anchors of one image with G objects under one rule.

    Attributes:
        gt_index: (R,) object of each positive anchor, negative for the others.
        lost: (M, 2) pairs (object, anchor): the anchor is a positive of the object only without the
            other objects, one of which has it.
        candidates: (M, 2) pairs (object, anchor) among which the rule chooses; empty if it compares
            all anchors.
    """

    gt_index: np.ndarray
    lost: np.ndarray
    candidates: np.ndarray


def explain(
    rule: Assigner, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
) -> Explanation:
    """Assign the objects of one image together, and each of them alone."""
    gt_index = rule(anchors, gt, predictions).gt_index[0]
    lost = []
    for ids in torch.arange(len(gt)).split(CHUNK) if len(gt) else ():
        alone = GroundTruth(gt.boxes[ids], gt.classes[ids], torch.arange(len(ids)), len(ids))
        repeated = None if predictions is None else _repeat(predictions, len(ids))
        owned = rule(anchors, alone, repeated).positive
        taken = (gt_index >= 0) & (gt_index != ids[:, None])
        rows, anchor = (owned & taken).nonzero(as_tuple=True)
        lost.append(torch.stack([ids[rows], anchor], dim=1))
    candidates = torch.zeros(0, 2, dtype=torch.long)
    if len(gt) and hasattr(rule, "nearest"):
        index, valid, _ = rule.nearest(anchors, gt.boxes.double())
        owner = torch.arange(len(gt)).expand_as(index)
        candidates = torch.stack([owner[valid], index[valid]], dim=1)
    empty = torch.zeros(0, 2, dtype=torch.long)
    return Explanation(
        gt_index.numpy(), (torch.cat(lost) if lost else empty).numpy(), candidates.numpy()
    )


def _repeat(predictions: Predictions, times: int) -> Predictions:
    output, boxes = predictions
    expanded = output.map(lambda x: x.expand(times, *x.shape[1:]))
    return Predictions(HeadOutput(*expanded), boxes.expand(times, *boxes.shape[1:]))
