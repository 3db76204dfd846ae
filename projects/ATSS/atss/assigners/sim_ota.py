"""YOLOX's rule, and RTMDet's, which has soft costs."""

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
from .trace import active_trace

QUALITY_FOCAL = QualityFocal()
# Keeps -ln IoU finite, as in mmdet.
EPS = 1e-7


def dynamic_k(ious: Tensor) -> Tensor:
    """Return the (g,) int64 number of anchors that each object selects: the sum of its (g, k)
    highest IoUs, rounded down, at least 1 (OTA, arXiv 2103.14259, section 3.3)."""
    return ious.sum(dim=1).long().clamp(min=1)


@dataclass(frozen=True)
class DynamicMatching(Matching):
    """Selection of the :func:`dynamic_k` cheapest anchors of each object. Conflicts: the cheapest
    pair. Score: the IoU."""

    top_k: int = arg(10, low=1)

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        k = dynamic_k(pairs.highest_similarities(self.top_k))
        if trace := active_trace(self):
            trace.objects.append({"ids": pairs.row_ids, "k": k})
        return select_cheapest(pairs, cost, k, self.top_k)

    def num_wanted(self, batch: Lists) -> Tensor:
        return dynamic_k(batch.highest_similarities(self.top_k))

    def score(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity


@dataclass(frozen=True)
class SimOTA(DynamicMatching):
    """OTA without its transport (YOLOX, arXiv 2107.08430): each object selects its k cheapest
    anchors, among those inside any object or near its centre.

    A pair costs the cross entropy of its classes (YOLOX multiplies them by an objectness, which
    heads here do not have) plus ``iou_weight`` times -ln IoU, and 1e5 more unless its anchor lies
    inside the object and near its centre.

    Args:
        top_k: number of highest IoUs whose sum is k.
        radius: largest distance from a centre, in strides along both axes.
        cls_weight: of the cross entropy.
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
        """List the pairs without a penalty."""
        return batch.central(ids, self.radius)

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """Bound other pairs' costs by the penalty; without overlap, also by the highest -ln IoU."""
        return (
            (self.PENALTY - self.iou_weight * math.log1p(EPS), Lists.near),
            (self.PENALTY - self.iou_weight * math.log(EPS), Lists.all_pairs),
        )

    def cost(self, pairs: CandidatePairs) -> Tensor:
        central = pairs.is_central(self.radius)
        classes = class_cost(pairs, cross_entropy, torch.ones_like(pairs.similarity))
        boxes = -(pairs.similarity + EPS).log()
        return self.cls_weight * classes + self.iou_weight * boxes + self.PENALTY * ~central


@dataclass(frozen=True)
class SoftLabel(DynamicMatching):
    """RTMDet's rule (arXiv 2212.07784, section 3.3): SimOTA among the anchors inside any object,
    with soft costs.

    A pair costs the quality focal loss of its classes with the IoU as target, plus ``iou_weight``
    times -ln IoU, plus 10^(d - radius) at d strides from the object's centre.

    Args:
        top_k: number of highest IoUs whose sum is k.
        radius: distance from the centre, in strides, that costs 1.
    """

    # The first candidates lie at most this many strides beyond the radius.
    MARGIN: ClassVar[float] = 0.75
    # Higher exponents make no difference, and exceed float64.
    MAX_EXPONENT: ClassVar[float] = 100.0
    eligible_radius: ClassVar[float] = 0.0

    top_k: int = arg(13, low=1)
    radius: float = arg(3.0, low=0)
    iou_weight: float = arg(3.0, low=0)
    similarity: Similarity = IOU

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """List the pairs with a low cost of distance."""
        return batch.near_centre(ids, self.radius + self.MARGIN)

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """Bound other pairs' costs by their distance; without overlap, by the highest -ln IoU."""
        return (
            (10**self.MARGIN - self.iou_weight * math.log1p(EPS), Lists.near),
            (-self.iou_weight * math.log(EPS), Lists.all_pairs),
        )

    def cost(self, pairs: CandidatePairs) -> Tensor:
        distance = (pairs.points - centres(pairs.objects)).norm(dim=-1) / pairs.strides
        far = 10 ** (distance - self.radius).clamp(max=self.MAX_EXPONENT)
        classes = class_cost(pairs, QUALITY_FOCAL, pairs.similarity)
        return classes - self.iou_weight * (pairs.similarity + EPS).log() + far
