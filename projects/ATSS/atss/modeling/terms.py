"""Parts of a criterion: functions of the matched anchors, each chosen by name."""

from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..deprecated import renamed_names
from ..errors import Checked, UserError, arg
from ..geometry import centerness, centres, iou, side_distances
from ..losses import distribution_focal_loss, giou_loss, iou_loss, nwd_loss, smooth_l1_loss
from ..structures import Matched
from .box_coding import BoxCode

__getattr__ = renamed_names(__name__)

# ------------------------------------------------------------------------------------------------
# Class targets, box weights and quality targets: (N, R) each
# ------------------------------------------------------------------------------------------------


def one(matched: Matched) -> Tensor:
    """Return 1 for each positive."""
    return matched.positive.float()


def score(matched: Matched) -> Tensor:
    """Return the assigner's score of each positive.

    Raises:
        UserError: if the assigner has no scores.
    """
    if matched.score is None:
        raise UserError("MODEL.ATSS.CLS_TARGET or BOX_WEIGHT score needs an assigner with scores")
    return matched.score


def central(matched: Matched) -> Tensor:
    """Return the centerness of each anchor in its object (FCOS, arXiv 1904.01355, equation 3)."""
    distances = side_distances(centres(matched.anchors.boxes), matched.target_boxes)
    return centerness(distances)


def overlap(matched: Matched) -> Tensor:
    """Return the IoU of each positive's predicted box and its object, detached. It is above 0,
    because class losses treat a target of 0 as negative."""
    ious = iou(matched.boxes.detach(), matched.target_boxes).clamp(min=1e-6)
    return torch.where(matched.positive, ious, 0)


def confidence(matched: Matched) -> Tensor:
    """Return the highest class probability of each anchor, detached (GFL's box weight)."""
    return matched.output.confidence().detach()


# ------------------------------------------------------------------------------------------------
# Box terms: (N, R) losses with a weight
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BoxTerm(Checked):
    """A box loss. Args: weight: factor of the loss."""

    weight: float = arg(2.0, low=0, high=1e6)


class GIoULoss(BoxTerm):
    """Generalised IoU loss of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return giou_loss(matched.boxes, matched.target_boxes)


class IoULoss(BoxTerm):
    """-ln of the IoU of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return iou_loss(matched.boxes, matched.target_boxes)


@dataclass(frozen=True, kw_only=True)
class SmoothL1Loss(BoxTerm):
    """Smooth L1 loss between the box regression and encoded targets, the mean of four.

    Args:
        beta: difference at which the loss turns from quadratic to linear.
    """

    code: BoxCode
    beta: float = arg(0.11, low=0, high=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code.comparable:
            raise UserError(
                f"the box regression of {type(self.code).__name__} cannot be compared with encoded "
                "boxes: use a loss of boxes such as giou"
            )

    def __call__(self, matched: Matched) -> Tensor:
        anchors = matched.anchors
        targets = self.code.encode(matched.target_boxes, anchors.boxes, anchors.stride)
        return smooth_l1_loss(matched.output.box_regression, targets, self.beta).mean(-1)


@dataclass(frozen=True, kw_only=True)
class NWDLoss(BoxTerm):
    """1 - normalised Wasserstein distance of boxes (for tiny objects).

    Args:
        constant: pixels of the network's input; see :class:`atss.assigners.NWD`.
    """

    constant: float = arg(12.8, low=1e-3, high=1e6)

    def __call__(self, matched: Matched) -> Tensor:
        return nwd_loss(matched.boxes, matched.target_boxes, self.constant)


@dataclass(frozen=True, kw_only=True)
class DistributionFocalLoss(BoxTerm):
    """Distribution focal loss, the mean of four sides (GFL, arXiv 2006.04388)."""

    code: BoxCode
    weight: float = arg(0.25, low=0, high=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code.bins:
            raise UserError(
                f"the box regression of {type(self.code).__name__} is no distribution: set "
                "MODEL.ATSS.REGRESSION distribution"
            )

    def __call__(self, matched: Matched) -> Tensor:
        anchors = matched.anchors
        targets = self.code.encode(matched.target_boxes, anchors.boxes, anchors.stride)
        logits = matched.output.box_regression.unflatten(-1, (4, self.code.bins))
        return distribution_focal_loss(logits, targets).mean(-1)


# ------------------------------------------------------------------------------------------------
# Weights of levels: (R,)
# ------------------------------------------------------------------------------------------------


class Balance(nn.Module):
    """Level weights from 2, for the level with the fewest positives since the training began, to 1,
    for the level with the most (DDOD, arXiv 2107.02963, section 3.4).

    Args:
        num_levels: L.

    Attributes:
        counts: (L,) int64 positives so far, of all processes; part of a checkpoint.
    """

    counts: Tensor
    # Buffers that a new training resets, whatever weights it starts from.
    of_a_training = ("counts",)

    def __init__(self, num_levels: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_levels, dtype=torch.long))

    def forward(self, matched: Matched) -> Tensor:
        per_level = matched.anchors.per_level
        if torch.is_grad_enabled():  # not in validation
            new = torch.stack([x.sum() for x in matched.positive.split(per_level, dim=1)])
            if comm.get_world_size() > 1:
                torch.distributed.all_reduce(new)
            self.counts += new
        low, high = self.counts.aminmax()
        weights = 2 - (self.counts - low) / (high - low + 1e-10)
        return torch.cat([x.expand(n) for x, n in zip(weights, per_level, strict=True)])


# ------------------------------------------------------------------------------------------------
# Normalisers of the class and quality losses: scalars
# ------------------------------------------------------------------------------------------------


def positives(matched: Matched, cls_target: Tensor) -> Tensor:
    """Return the number of positives."""
    return matched.positive.sum()


def targets(matched: Matched, cls_target: Tensor) -> Tensor:
    """Return the sum of all class targets."""
    return cls_target.sum()
