"""What a criterion is made of: functions of what is matched, each chosen by name."""

from dataclasses import dataclass

from torch import Tensor

from ..geometry import centerness, centres, side_distances
from ..losses import giou_loss, iou_loss, smooth_l1_loss
from ..parts import within
from ..structures import Matched
from .box_coding import BoxCode

# ------------------------------------------------------------------------------------------------
# Class targets, box weights and quality targets: (N, R) each
# ------------------------------------------------------------------------------------------------


def one(matched: Matched) -> Tensor:
    """1 for each positive."""
    return matched.positive.float()


def score(matched: Matched) -> Tensor:
    """What the rule says of each positive.

    Raises:
        ValueError: where the rule says nothing.
    """
    if matched.score is None:
        raise ValueError("a class target or box weight is the score of a rule that gives none")
    return matched.score


def central(matched: Matched) -> Tensor:
    """How central the anchor's centre is in its object (FCOS, arXiv 1904.01355, equation 3)."""
    distances = side_distances(centres(matched.anchors.boxes), matched.target_boxes)
    return centerness(distances)


# ------------------------------------------------------------------------------------------------
# Box terms: (N, R) losses, each with its weight against the other losses
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BoxTerm:
    """Args: weight: against the other losses."""

    weight: float = 2.0

    def __post_init__(self) -> None:
        within("weight", self.weight, 0, 1e6)


class GIoU(BoxTerm):
    """Generalised IoU of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return giou_loss(matched.boxes, matched.target_boxes)


class IoU(BoxTerm):
    """-ln of the IoU of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return iou_loss(matched.boxes, matched.target_boxes)


@dataclass(frozen=True, kw_only=True)
class SmoothL1(BoxTerm):
    """Smooth L1 between numbers and encoded targets, the mean of four.

    Args:
        code: by which targets are encoded.
        beta: where it turns from quadratic to linear.
    """

    code: BoxCode
    beta: float = 0.11

    def __post_init__(self) -> None:
        super().__post_init__()
        within("beta", self.beta, 0, 1e6)
        if not self.code.comparable:
            raise ValueError(
                f"it compares numbers with encoded boxes, for which {type(self.code).__name__} is "
                "not made: use a loss of boxes"
            )

    def __call__(self, matched: Matched) -> Tensor:
        anchors = matched.anchors
        targets = self.code.encode(matched.target_boxes, anchors.boxes, anchors.stride)
        return smooth_l1_loss(matched.output.numbers, targets, self.beta).mean(-1)


# ------------------------------------------------------------------------------------------------
# Normalisers of the class and quality losses: scalars
# ------------------------------------------------------------------------------------------------


def positives(matched: Matched, cls_target: Tensor) -> Tensor:
    """How many anchors have an object."""
    return matched.positive.sum()


def targets(matched: Matched, cls_target: Tensor) -> Tensor:
    """The sum of all class targets."""
    return cls_target.sum()
