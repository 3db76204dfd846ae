"""What a criterion is made of: functions of what is matched, each chosen by name."""

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
    """1 for each positive."""
    return matched.positive.float()


def score(matched: Matched) -> Tensor:
    """What the rule says of each positive.

    Raises:
        ValueError: where the rule says nothing.
    """
    if matched.score is None:
        raise UserError("a class target or box weight is the score of a rule that gives none")
    return matched.score


def central(matched: Matched) -> Tensor:
    """How central the anchor's centre is in its object (FCOS, arXiv 1904.01355, equation 3)."""
    distances = side_distances(centres(matched.anchors.boxes), matched.target_boxes)
    return centerness(distances)


def overlap(matched: Matched) -> Tensor:
    """IoU of each positive's box now and its object; more than 0, which class losses take for a
    negative. Nothing is learnt through it."""
    found = iou(matched.boxes.detach(), matched.target_boxes).clamp(min=1e-6)
    return torch.where(matched.positive, found, 0)


def confidence(matched: Matched) -> Tensor:
    """The highest class probability now (GFL's box weight). Nothing is learnt through it."""
    return matched.output.confidence().detach()


# ------------------------------------------------------------------------------------------------
# Box terms: (N, R) losses, each with its weight against the other losses
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BoxTerm(Checked):
    """Args: weight: against the other losses."""

    weight: float = arg(2.0, low=0, high=1e6)


class GIoULoss(BoxTerm):
    """Generalised IoU of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return giou_loss(matched.boxes, matched.target_boxes)


class IoULoss(BoxTerm):
    """-ln of the IoU of boxes."""

    def __call__(self, matched: Matched) -> Tensor:
        return iou_loss(matched.boxes, matched.target_boxes)


@dataclass(frozen=True, kw_only=True)
class SmoothL1Loss(BoxTerm):
    """Smooth L1 between numbers and encoded targets, the mean of four.

    Args:
        code: by which targets are encoded.
        beta: where it turns from quadratic to linear.
    """

    code: BoxCode
    beta: float = arg(0.11, low=0, high=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code.comparable:
            raise UserError(
                f"it compares numbers with encoded boxes, for which {type(self.code).__name__} is "
                "not made: use a loss of boxes"
            )

    def __call__(self, matched: Matched) -> Tensor:
        anchors = matched.anchors
        targets = self.code.encode(matched.target_boxes, anchors.boxes, anchors.stride)
        return smooth_l1_loss(matched.output.box_regression, targets, self.beta).mean(-1)


@dataclass(frozen=True, kw_only=True)
class NWDLoss(BoxTerm):
    """Normalised Wasserstein distance of boxes, for objects of a few pixels.

    Args:
        constant: pixels of the network's input; see :class:`atss.assigners.NWD`.
    """

    constant: float = arg(12.8, low=1e-3, high=1e6)

    def __call__(self, matched: Matched) -> Tensor:
        return nwd_loss(matched.boxes, matched.target_boxes, self.constant)


@dataclass(frozen=True, kw_only=True)
class DistributionFocalLoss(BoxTerm):
    """Distribution focal loss of the four sides, the mean of them (GFL, arXiv 2006.04388).

    Args:
        code: whose distributions they are.
    """

    code: BoxCode
    weight: float = arg(0.25, low=0, high=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code.bins:
            raise UserError(
                f"it is of distributions, which {type(self.code).__name__} does not make: use "
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
    """Levels that have had few positives since the training began weigh up to twice as much as the
    one that has had most (DDOD, arXiv 2107.02963, section 3.4).

    Args:
        num_levels: L.

    Attributes:
        counts: (L,) int64 positives so far, of all processes; part of a checkpoint.
    """

    counts: Tensor
    # Buffers that a new training begins anew, whatever weights it begins from.
    of_a_training = ("counts",)

    def __init__(self, num_levels: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_levels, dtype=torch.long))

    def forward(self, matched: Matched) -> Tensor:
        per_level = matched.anchors.per_level
        if torch.is_grad_enabled():  # not when somebody measures losses on other images
            found = torch.stack([x.sum() for x in matched.positive.split(per_level, dim=1)])
            if comm.get_world_size() > 1:
                torch.distributed.all_reduce(found)
            self.counts += found
        least, most = self.counts.aminmax()
        weights = 2 - (self.counts - least) / (most - least + 1e-10)
        return torch.cat([x.expand(n) for x, n in zip(weights, per_level, strict=True)])


# ------------------------------------------------------------------------------------------------
# Normalisers of the class and quality losses: scalars
# ------------------------------------------------------------------------------------------------


def positives(matched: Matched, cls_target: Tensor) -> Tensor:
    """How many anchors have an object."""
    return matched.positive.sum()


def targets(matched: Matched, cls_target: Tensor) -> Tensor:
    """The sum of all class targets."""
    return cls_target.sum()
