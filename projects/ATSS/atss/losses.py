"""Loss functions, elementwise: how to sum, weigh and normalise is criterion.py's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .deprecated import renamed_names
from .errors import Checked, arg
from .geometry import intersection_union, normalised_wasserstein

__getattr__ = renamed_names(__name__)


@dataclass(frozen=True)
class Focal(Checked):
    """Focal loss (arXiv 1708.02002, equation 5), for targets 0 and 1.

    A class loss takes what it may need, so that it need not know whether the head gives logits or
    probabilities.

    Args:
        alpha: weight of positives; negatives weigh 1 - alpha.
        gamma: how much well-classified elements count less.
    """

    alpha: float = arg(0.25, low=0, high=1)
    gamma: float = arg(2.0, low=0, high=1e3)
    # Targets between 0 and 1 would be trained wrongly.
    hard_targets: ClassVar[bool] = True

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            probability, entropy, targets: of any one shape; entropy is the cross entropy of the two
                others.
        Returns:
            the loss of each element, same shape.
        """
        miss = probability + targets - 2 * probability * targets  # 1 - p for positives, else p
        balance = (1 - self.alpha) + (2 * self.alpha - 1) * targets
        return balance * _power(miss, self.gamma) * entropy


def cross_entropy(probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy as it is; arguments as of :class:`Focal`, targets from 0 to 1."""
    return entropy


@dataclass(frozen=True)
class QualityFocal(Checked):
    """Quality focal loss (GFL, arXiv 2006.04388, equation 2): cross entropy times |t - p|^gamma.

    Args:
        gamma: how much elements near their targets count less.
    """

    gamma: float = arg(2.0, low=0, high=1e3)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        """The loss of each element; arguments as of :class:`Focal`, targets from 0 to 1."""
        return _power((targets - probability).abs(), self.gamma) * entropy


@dataclass(frozen=True)
class Varifocal(Checked):
    """Varifocal loss (VarifocalNet, arXiv 2008.13367, equation 2): positives weigh what they are to
    say, negatives what they say by mistake.

    Args:
        alpha: weight of negatives.
        gamma: how much negatives near 0 count less.
    """

    alpha: float = arg(0.75, low=0, high=1e3)
    gamma: float = arg(2.0, low=0, high=1e3)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        """The loss of each element; arguments as of :class:`Focal`, targets from 0 to 1."""
        negative = self.alpha * _power(probability, self.gamma)
        return torch.where(targets > 0, targets, negative) * entropy


@dataclass(frozen=True)
class Matchability(Checked):
    """Matchability-aware loss (DEIM, arXiv 2412.04234, equation 4): positives are to say a power of
    their target and weigh 1, so that those which overlap little are still taught; negatives weigh
    what they say by mistake, through which nothing is learnt.

    Args:
        gamma: both powers.
    """

    gamma: float = arg(1.5, low=0, high=1e3)

    def target_of(self, cls_target: Tensor) -> Tensor:
        """What positives of class targets from 0 to 1 are to say: more than 0."""
        return (cls_target**self.gamma).clamp(min=torch.finfo(cls_target.dtype).tiny)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        """The loss of each element; arguments as of :class:`Focal`, targets from 0 to 1."""
        return torch.where(targets > 0, 1, probability.detach() ** self.gamma) * entropy


def _power(base: Tensor, exponent: float) -> Tensor:
    if 0 < exponent < 1:  # the slope of such a power is infinite at 0, of a saturated logit
        base = base.clamp(min=torch.finfo(base.dtype).tiny)
    return base**exponent


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - generalised IoU (arXiv 1902.09630, algorithm 1), in [0, 2].

    Args:
        boxes, targets: (..., 4).
        eps: keeps the gradient finite where both boxes are empty.
    Returns:
        (...) losses.
    """
    intersection, union = intersection_union(boxes, targets)
    low = torch.minimum(boxes[..., :2], targets[..., :2])
    high = torch.maximum(boxes[..., 2:], targets[..., 2:])
    width, height = (high - low).unbind(-1)
    hull = width * height + eps
    union = union + eps
    return 1 - intersection / union + (hull - union) / hull


def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """-ln of the IoU (UnitBox, arXiv 1608.01471), with a square pixel added to both areas as in
    FCOS, so that boxes that do not overlap have a gradient.

    Args:
        boxes, targets: (..., 4) in pixels.
    Returns:
        (...) losses.
    """
    intersection, union = intersection_union(boxes, targets)
    return ((union + 1) / (intersection + 1)).log()


def smooth_l1_loss(values: Tensor, targets: Tensor, beta: float = 0.11) -> Tensor:
    """Quadratic below ``beta`` and linear above (Fast R-CNN, arXiv 1504.08083, equation 3).

    Returns:
        the loss of each element, same shape.
    """
    return F.smooth_l1_loss(values, targets, reduction="none", beta=beta)


def nwd_loss(boxes: Tensor, targets: Tensor, constant: float) -> Tensor:
    """1 - the normalised Wasserstein distance (arXiv 2110.13389, equation 10), in [0, 1].

    Args:
        boxes, targets: (..., 4).
        constant: in their unit.
    Returns:
        (...) losses.
    """
    return 1 - normalised_wasserstein(boxes, targets, constant)


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with the two bins next to the target, by how near it is to each (GFL, arXiv
    2006.04388, equation 6).

    Args:
        logits: (..., B), of bins 0 to B - 1.
        targets: (...), from 0 to B - 1.
    Returns:
        (...) losses.
    """
    low = targets.floor().clamp(max=logits.shape[-1] - 2)
    neighbours = torch.stack([low, low + 1], dim=-1).long()
    near_low, near_high = logits.log_softmax(-1).gather(-1, neighbours).unbind(-1)
    beyond = targets - low
    return -(1 - beyond) * near_low - beyond * near_high
