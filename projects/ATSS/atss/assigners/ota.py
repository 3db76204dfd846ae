"""Optimal transport assignment."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import arg
from ..losses import Focal
from .lists import ListPairs, Lists
from .locations import INSIDE_MARGIN
from .matching import Matching
from .pairs import CandidatePairs, class_cost
from .sim_ota import dynamic_k
from .similarities import IOU, Similarity
from .sinkhorn import transport
from .tables import Tables
from .trace import active_trace

FOCAL = Focal()


@dataclass(frozen=True)
class OTA(Matching):
    """Optimal transport assignment (arXiv 2103.14259): the cheapest plan that supplies the anchors
    of an image with labels from its objects and the background.

    A pair costs the focal loss of its classes plus ``iou_weight`` times -ln IoU, if its anchor lies
    inside the object and near its centre. Objects without such an anchor have no positives; the
    authors' code gives them every anchor at a cost of 1e6, where float32 cannot rank them. Score:
    the IoU.

    Args:
        top_k: number of highest IoUs whose sum is the supply of an object.
        radius: largest distance from the centre, in strides along both axes.
        regularisation, iterations: see :func:`.sinkhorn.transport`.
    """

    # Least IoU in the logarithm, as in the authors' code.
    LEAST_IOU: ClassVar[float] = torch.finfo(torch.float32).eps
    together: ClassVar[bool] = True

    top_k: int = arg(20, low=1)
    radius: float = arg(2.5, low=1e-6)
    iou_weight: float = arg(1.5, low=0)
    regularisation: float = arg(0.1, low=1e-3)
    iterations: int = arg(50, low=1)
    similarity: Similarity = IOU

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        pairs = batch.central(ids, self.radius)
        return pairs.at(pairs.is_central(self.radius, INSIDE_MARGIN))

    def tables(self, batch: Tables) -> Iterable[Any]:
        return [batch.window(self.radius)]

    def cost(self, pairs: CandidatePairs) -> Tensor:
        central = pairs.is_central(self.radius, INSIDE_MARGIN)
        classes = class_cost(pairs, FOCAL, torch.ones_like(pairs.similarity))
        boxes = -pairs.similarity.clamp(min=self.LEAST_IOU).log()
        return torch.where(central, classes + self.iou_weight * boxes, torch.inf)

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        possible = cost < torch.inf
        ious = pairs.rows(torch.where(possible, pairs.similarity, 0), 0)
        supply = dynamic_k(ious.topk(min(self.top_k, ious.shape[1])).values)
        if trace := active_trace(self):
            trace.objects.append({"ids": pairs.row_ids, "k": supply})
        selected = transport(
            pairs.rows(cost, torch.inf),
            supply,
            pairs.batch.gt.image_index[pairs.row_ids],
            pairs.columns(FOCAL, possible),
            pairs.batch.shape[1],
            self.regularisation,
            self.iterations,
        )
        return pairs.from_rows(selected)

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity  # does not matter: no two objects select one anchor

    def score(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity
