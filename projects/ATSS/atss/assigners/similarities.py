"""How like each other two boxes are: from 0 to 1, and falling as they move apart along an axis."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import Checked, arg
from ..geometry import iou, normalised_wasserstein, similarity_distance

# A search takes smaller similarities for 0, so that it can bound the distance of its candidates.
FAINT = 1e-12


class Similarity(Protocol):
    """What rules ask of a similarity. A plain function of boxes does for those that know their
    candidates by themselves: ATSS and DDOD."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two boxes (..., 4) each -> (...)."""
        ...

    def reach(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """How far apart two boxes can be that are as similar as (...) or more: along an axis, their
        centres are no farther apart than scale * (a + b) / 2 + distance, of sides a and b.

        Returns:
            (..., 2) scale, along x and y; (..., 1) distance.
        """
        ...


@dataclass(frozen=True)
class IoU:
    """Intersection over union."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two boxes (..., 4) each -> (...)."""
        return iou(a, b)

    def reach(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """They share ``least`` of the longer side, and so of the mean of both."""
        scale = 1 - least.clamp(min=0, max=1)[..., None]
        return scale.expand(*least.shape, 2), torch.zeros_like(scale)


IOU = IoU()


@dataclass(frozen=True)
class NWD(Checked):
    """Normalised Wasserstein distance (arXiv 2110.13389): of boxes of a few pixels, which overlap
    wholly or not at all, it still tells how far they are from each other. Not scale-invariant.

    Args:
        constant: pixels of the network's input, in which the similarity of boxes of one size falls
            to 1 / e. The authors take the mean side of an object: of AI-TOD, 12.8.
    """

    constant: float = arg(12.8, low=1e-3, high=1e6)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two boxes (..., 4) each -> (...)."""
        return _without_faint(self.exact(a, b))

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        """The same, however little it is: for rules that know their candidates by themselves."""
        return normalised_wasserstein(a, b, self.constant)

    def reach(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """As far as boxes of one size."""
        distance = self.constant * _steps(least)[..., None]
        return torch.zeros_like(distance).expand(*least.shape, 2), distance


@dataclass(frozen=True)
class SimD(Checked):
    """Similarity distance (arXiv 2407.02394): like NWD for tiny objects, but relative to the sizes
    of both boxes, and so scale-invariant.

    Args:
        m, n: how steeply it falls along x and along y. The authors take the mean over all objects
            and anchors of the data of |dx| / (w + w_anchor), and of the same for y and h; the
            defaults are those of their code.
    """

    m: float = arg(6.13, low=1e-3, high=1e6)
    n: float = arg(4.59, low=1e-3, high=1e6)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two boxes (..., 4) each -> (...)."""
        return _without_faint(self.exact(a, b))

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        """The same, however little it is: for rules that know their candidates by themselves."""
        return similarity_distance(a, b, self.m, self.n)

    def reach(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """As far as boxes of their sizes."""
        steps = 2 * _steps(least)
        scale = torch.stack([steps / self.m, steps / self.n], dim=-1)
        return scale, torch.zeros_like(scale[..., :1])


def _without_faint(similarity: Tensor) -> Tensor:
    return torch.where(similarity < FAINT, 0, similarity)


def _steps(least: Tensor) -> Tensor:
    """-ln of it, which is no more than -ln of what counts as 0."""
    return -least.clamp(min=FAINT, max=1).log()
