"""Elementwise losses; modeling/criterion.py sums, weights and normalises them."""

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

    Args:
        alpha: weight of positives; negatives have 1 - alpha.
        gamma: exponent of the error, which down-weights well-classified elements.
    """

    alpha: float = arg(0.25, low=0, high=1)
    gamma: float = arg(2.0, low=0, high=1e3)
    # The loss is not defined for targets between 0 and 1.
    hard_targets: ClassVar[bool] = True

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        """Return the (...) losses, from (...) probabilities, their binary cross entropy, and
        targets."""
        error = probability + targets - 2 * probability * targets  # 1 - p for positives, else p
        balance = (1 - self.alpha) + (2 * self.alpha - 1) * targets
        return balance * _power(error, self.gamma) * entropy


def cross_entropy(probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy itself, for targets in [0, 1]."""
    return entropy


@dataclass(frozen=True)
class QualityFocal(Checked):
    """Quality focal loss (GFL, arXiv 2006.04388, equation 2) for targets in [0, 1]: cross entropy
    times |t - p|^gamma."""

    gamma: float = arg(2.0, low=0, high=1e3)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        return _power((targets - probability).abs(), self.gamma) * entropy


@dataclass(frozen=True)
class Varifocal(Checked):
    """Varifocal loss (VarifocalNet, arXiv 2008.13367, equation 2) for targets in [0, 1]: positives
    weigh their target, negatives alpha times their probability to the gamma."""

    alpha: float = arg(0.75, low=0, high=1e3)
    gamma: float = arg(2.0, low=0, high=1e3)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        negative = self.alpha * _power(probability, self.gamma)
        return torch.where(targets > 0, targets, negative) * entropy


@dataclass(frozen=True)
class Matchability(Checked):
    """Matchability-aware loss (DEIM, arXiv 2412.04234, equation 4) for targets in [0, 1]: the
    target of positives is raised to the gamma and their weight is 1, so that positives with a low
    IoU count in full; negatives weigh their detached probability to the gamma."""

    gamma: float = arg(1.5, low=0, high=1e3)

    def target_of(self, cls_target: Tensor) -> Tensor:
        """Transform the class targets of positives, to values above 0."""
        return (cls_target**self.gamma).clamp(min=torch.finfo(cls_target.dtype).tiny)

    def __call__(self, probability: Tensor, entropy: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets > 0, 1, probability.detach() ** self.gamma) * entropy


def _power(base: Tensor, exponent: float) -> Tensor:
    if 0 < exponent < 1:  # its gradient is infinite at 0, the probability of a saturated logit
        base = base.clamp(min=torch.finfo(base.dtype).tiny)
    return base**exponent


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the (...) losses 1 - generalised IoU (arXiv 1902.09630, algorithm 1) of (..., 4)
    boxes; ``eps`` keeps the gradient finite if both are empty."""
    intersection, union = intersection_union(boxes, targets)
    low = torch.minimum(boxes[..., :2], targets[..., :2])
    high = torch.maximum(boxes[..., 2:], targets[..., 2:])
    width, height = (high - low).unbind(-1)
    hull = width * height + eps
    union = union + eps
    return 1 - intersection / union + (hull - union) / hull


def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the (...) losses -ln IoU (UnitBox, arXiv 1608.01471) of (..., 4) boxes in pixels. As
    in FCOS, both areas get a square pixel, so that separate boxes have a gradient."""
    intersection, union = intersection_union(boxes, targets)
    return ((union + 1) / (intersection + 1)).log()


def smooth_l1_loss(values: Tensor, targets: Tensor, beta: float = 0.11) -> Tensor:
    """Return elementwise losses, quadratic below ``beta``, then linear (Fast R-CNN, arXiv
    1504.08083, equation 3)."""
    return F.smooth_l1_loss(values, targets, reduction="none", beta=beta)


def nwd_loss(boxes: Tensor, targets: Tensor, constant: float) -> Tensor:
    """Return the (...) losses 1 - normalised Wasserstein distance (arXiv 2110.13389, equation 10)
    of (..., 4) boxes; ``constant`` is in their unit."""
    return 1 - normalised_wasserstein(boxes, targets, constant)


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the (...) cross entropies with the two bins next to the target, weighted by its
    distance from the other (GFL, arXiv 2006.04388, equation 6).

    Args:
        logits: (..., B) of bins 0 to B - 1.
        targets: (...) in [0, B - 1].
    """
    low = targets.floor().clamp(max=logits.shape[-1] - 2)
    neighbours = torch.stack([low, low + 1], dim=-1).long()
    log_low, log_high = logits.log_softmax(-1).gather(-1, neighbours).unbind(-1)
    fraction = targets - low
    return -(1 - fraction) * log_low - fraction * log_high
