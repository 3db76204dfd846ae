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

FOCAL = Focal()


@dataclass(frozen=True)
class OTA(Matching):
    """Optimal transport assignment (arXiv 2103.14259): the plan that serves all objects of an image
    and the background at the least cost.

    A pair costs the focal loss of its classes and ``iou_weight`` times -ln IoU; its anchor lies
    inside the object and near its centre. An object supplies as many labels as its best overlaps
    add up to. An object without such an anchor gets none; the authors give it every anchor at a
    cost of 1e6, where float32 cannot rank them. Score: the IoU.

    Args:
        top_k: overlaps that are added for the number of labels of an object.
        radius: how near to the centre, in strides along both axes.
        iou_weight: of -ln IoU.
        regularisation, iterations: of Sinkhorn's algorithm.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # Least IoU of which the logarithm is taken, as in the authors' code.
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
        return pairs.at(pairs.inside(INSIDE_MARGIN) & pairs.around(self.radius))

    def tables(self, batch: Tables) -> Iterable[Any]:
        return [batch.window(self.radius)]

    def cost(self, pairs: CandidatePairs) -> Tensor:
        central = pairs.inside(INSIDE_MARGIN) & pairs.around(self.radius)
        classes = class_cost(pairs, FOCAL, torch.ones_like(pairs.overlap))
        boxes = -pairs.overlap.clamp(min=self.LEAST_IOU).log()
        return torch.where(central, classes + self.iou_weight * boxes, torch.inf)

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        possible = cost < torch.inf
        overlaps = pairs.rows(torch.where(possible, pairs.overlap, 0), 0)
        supply = dynamic_k(overlaps.topk(min(self.top_k, overlaps.shape[1])).values)
        chosen = transport(
            pairs.rows(cost, torch.inf),
            supply,
            pairs.batch.gt.image_index[pairs.row_ids],
            pairs.columns(FOCAL, possible),
            pairs.batch.shape[1],
            self.regularisation,
            self.iterations,
        )
        return pairs.from_rows(chosen)

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return pairs.overlap  # an anchor is selected by one object at most

    def score(self, pairs: CandidatePairs) -> Tensor:
        return pairs.overlap
