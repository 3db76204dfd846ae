"""YOLOX's rule, and RTMDet's, which softens its costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import arg
from ..geometry import centres
from ..losses import QualityFocal, cross_entropy
from .lists import ListPairs, Lists
from .matching import Candidates, Matching, select_cheapest
from .pairs import CandidatePairs, class_cost
from .similarities import IOU, Similarity

QUALITY_FOCAL = QualityFocal()
# Keeps the logarithm of an overlap finite, as in mmdet.
EPS = 1e-7


def dynamic_k(overlaps: Tensor) -> Tensor:
    """(g,) int64 number of anchors that each object selects: its (g, k) highest overlaps added up,
    rounded down, and at least one (OTA, arXiv 2103.14259, section 3.3)."""
    return overlaps.sum(dim=1).long().clamp(min=1)


@dataclass(frozen=True)
class DynamicMatching(Matching):
    """Each object selects its cheapest anchors, as many as :func:`dynamic_k` returns; conflicts go
    to the cheapest pair. Score: the IoU."""

    top_k: int = arg(10, low=1)

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        k = dynamic_k(pairs.highest_overlaps(self.top_k))
        return select_cheapest(pairs, cost, k, self.top_k)

    def num_wanted(self, batch: Lists) -> Tensor:
        return dynamic_k(batch.highest_overlaps(self.top_k))

    def score(self, pairs: CandidatePairs) -> Tensor:
        return pairs.overlap


@dataclass(frozen=True)
class SimOTA(DynamicMatching):
    """OTA without its transport (YOLOX, arXiv 2107.08430): each object selects its k cheapest
    anchors. k is the sum of the ``top_k`` highest IoUs of predicted boxes with it, at least 1.

    A pair costs the cross entropy of its classes (YOLOX multiplies them by an objectness, which
    heads here do not have) and ``iou_weight`` times -ln IoU. Eligible are the anchors inside any
    object or near its centre. A pair whose anchor is not both inside the object and near its centre
    costs 1e5 more.

    Args:
        top_k: number of IoUs that are added.
        radius: how near to a centre, in strides along both axes.
        cls_weight, iou_weight: of the two costs.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    PENALTY: ClassVar[float] = 1e5

    radius: float = arg(2.5, low=0)
    cls_weight: float = arg(1.0, low=0)
    iou_weight: float = arg(3.0, low=0)
    similarity: Similarity = IOU

    @property
    def eligible_radius(self) -> float:
        return self.radius

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """Pairs without a penalty."""
        return batch.central(ids, self.radius)

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """All other pairs have the penalty; those without overlap, the highest -ln IoU, too."""
        return (
            (self.PENALTY - self.iou_weight * math.log1p(EPS), Lists.near),
            (self.PENALTY - self.iou_weight * math.log(EPS), Lists.all_pairs),
        )

    def cost(self, pairs: CandidatePairs) -> Tensor:
        central = pairs.inside() & pairs.around(self.radius)
        classes = class_cost(pairs, cross_entropy, torch.ones_like(pairs.overlap))
        boxes = -(pairs.overlap + EPS).log()
        return self.cls_weight * classes + self.iou_weight * boxes + self.PENALTY * ~central


@dataclass(frozen=True)
class SoftLabel(DynamicMatching):
    """RTMDet's rule (arXiv 2212.07784, section 3.3): SimOTA with costs that are soft.

    A pair costs the quality focal loss of its classes with the IoU as target, ``iou_weight`` times
    -ln IoU, and 10^(d - radius), d strides from the object's centre. Eligible are the anchors
    inside any object.

    Args:
        top_k: number of IoUs that are added.
        radius: distance from the centre, in strides, at which its cost is 1.
        iou_weight: of -ln IoU.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # Strides beyond the radius in which candidates are sought first.
    WIDER: ClassVar[float] = 0.75
    # Highest exponent: a higher one makes no difference, and soon exceeds float64.
    MAX_EXPONENT: ClassVar[float] = 100.0
    eligible_radius: ClassVar[float] = 0.0

    top_k: int = arg(13, low=1)
    radius: float = arg(3.0, low=0)
    iou_weight: float = arg(3.0, low=0)
    similarity: Similarity = IOU

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """Pairs whose distance costs little."""
        return batch.around(ids, self.radius + self.WIDER)

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """All other pairs pay for their distance; those that do not overlap, the greatest -ln
        IoU."""
        return (
            (10**self.WIDER - self.iou_weight * math.log1p(EPS), Lists.near),
            (-self.iou_weight * math.log(EPS), Lists.all_pairs),
        )

    def cost(self, pairs: CandidatePairs) -> Tensor:
        distance = (pairs.points - centres(pairs.objects)).norm(dim=-1) / pairs.strides
        far = 10 ** (distance - self.radius).clamp(max=self.MAX_EXPONENT)
        classes = class_cost(pairs, QUALITY_FOCAL, pairs.overlap)
        return classes - self.iou_weight * (pairs.overlap + EPS).log() + far
