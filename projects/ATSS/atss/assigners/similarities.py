"""Similarities of two boxes: from 0 to 1, and falling as the boxes move apart along an axis."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..deprecated import renamed_attribute, warn
from ..errors import Checked, arg
from ..geometry import iou, normalised_wasserstein, similarity_distance

# Smaller similarities count as 0, so that a search can bound the distance of its candidates.
SMALLEST = 1e-12


class Similarity(Protocol):
    """A similarity of boxes. ATSS and DDOD, which do not search, also accept a function."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the (...) similarities of (..., 4) boxes."""
        ...

    def max_distance(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the distance of boxes of at least a (...) similarity: along an axis, the centres of
        boxes with sides a and b are at most scale * (a + b) / 2 + distance apart.

        Returns:
            (..., 2) scale, along x and y; (..., 1) distance.
        """
        ...


def max_distance(similarity: Any, least: Tensor) -> tuple[Tensor, Tensor]:
    """Call a similarity's ``max_distance``, or ``reach``, its name in version 0.2."""
    if hasattr(similarity, "max_distance"):
        return similarity.max_distance(least)
    warn(f"{type(similarity).__name__}.reach", "the name max_distance")
    return similarity.reach(least)


@dataclass(frozen=True)
class IoU:
    """Intersection over union."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return iou(a, b)

    def max_distance(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Use that boxes share at least ``similarity`` of their mean side along both axes."""
        scale = 1 - similarity.clamp(min=0, max=1)[..., None]
        return scale.expand(*similarity.shape, 2), torch.zeros_like(scale)

    reach = renamed_attribute("IoU.reach", "IoU.max_distance")


IOU = IoU()


class _Exponential:
    """A similarity that is never 0. ``exact`` is for rules that do not search, and rank even the
    smallest."""

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        similarity = self.exact(a, b)
        return torch.where(similarity < SMALLEST, 0, similarity)

    def exponent(self, similarity: Tensor) -> Tensor:
        """Return -ln of a similarity, at most that of SMALLEST."""
        return -similarity.clamp(min=SMALLEST, max=1).log()

    reach = renamed_attribute("Similarity.reach", "Similarity.max_distance")


@dataclass(frozen=True)
class NWD(_Exponential, Checked):
    """Normalised Wasserstein distance (arXiv 2110.13389): also ranks tiny boxes that do not
    overlap. Not scale-invariant.

    Args:
        constant: distance of boxes of one size at a similarity of 1 / e, in pixels of the input.
            The authors use the mean side of an object: 12.8 for AI-TOD.
    """

    constant: float = arg(12.8, low=1e-3, high=1e6)

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        return normalised_wasserstein(a, b, self.constant)

    def max_distance(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Use that boxes of one size are the farthest apart."""
        distance = self.constant * self.exponent(similarity)[..., None]
        return torch.zeros_like(distance).expand(*similarity.shape, 2), distance


@dataclass(frozen=True)
class SimD(_Exponential, Checked):
    """Similarity distance (arXiv 2407.02394): a scale-invariant NWD.

    Args:
        m, n: weights of x and y, by default of the authors' code: the means over all objects and
            anchors of a data set of |dx| / (w + w_anchor) and of |dy| / (h + h_anchor).
    """

    m: float = arg(6.13, low=1e-3, high=1e6)
    n: float = arg(4.59, low=1e-3, high=1e6)

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        return similarity_distance(a, b, self.m, self.n)

    def max_distance(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        exponent = 2 * self.exponent(similarity)
        scale = torch.stack([exponent / self.m, exponent / self.n], dim=-1)
        return scale, torch.zeros_like(scale[..., :1])
