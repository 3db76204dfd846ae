"""Probabilistic anchor assignment."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..caching import cached_property
from ..errors import arg
from ..losses import Focal, giou_loss
from .lists import ListPairs, Lists
from .matching import Matching
from .max_iou import MaxIoU
from .mixture import select_cheap
from .pairs import CandidatePairs, class_cost
from .similarities import IOU, Similarity
from .tables import Tables

FOCAL = Focal()


@dataclass(frozen=True)
class PAA(Matching):
    """Probabilistic anchor assignment (arXiv 2007.08103, section 3.1 and figure 3c): positive are
    an object's candidates up to the cost at which the cheaper of two Gaussians, fitted to their
    costs, has its highest density.

    An anchor is a candidate of its best object if their IoU is at least ``iou_threshold``, and of
    objects whose best anchor it is. A pair costs its focal and GIoU loss. The mixture is fitted on
    the host: a GPU waits for one copy each way.

    Args:
        top_k: cheapest candidates per level, to which the mixture is fitted.
        iou_threshold: least IoU of a candidate.
        box_weight: of the GIoU loss: 1.3 in mmdet, 1 in the authors' code.
        take: positives: "component", candidates of the cheaper component, none if there is a single
            candidate (mmdet); "all", also others up to that cost, and all candidates if there is a
            single one or none in the component (the authors).
        claims_go_to: see :class:`~atss.assigners.MaxIoU`; "best" in the authors' code.
        similarity: of anchors and objects, instead of the IoU.
    """

    together: ClassVar[bool] = True

    top_k: int = arg(9, low=1)
    iou_threshold: float = arg(0.1, low=1e-6, high=1)
    box_weight: float = arg(1.3, low=0)
    take: str = arg("component", choices=("component", "all"))
    claims_go_to: str = "claimant"
    similarity: Similarity = IOU

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.first  # checks claims_go_to

    @cached_property
    def first(self) -> MaxIoU:
        """Rule that chooses candidates."""
        least = self.iou_threshold
        return MaxIoU(least, least, claims_go_to=self.claims_go_to, similarity=self.similarity)

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        gt_index = self.first(batch.anchors, batch.gt).gt_index
        image, index = (gt_index >= 0).nonzero(as_tuple=True)
        owner, order = gt_index[image, index].sort(stable=True)
        return batch.pairs(owner, index[order])

    def tables(self, batch: Tables) -> Iterable[Any]:
        return [batch.matches(self.first(batch.anchors, batch.gt).gt_index)]

    def cost(self, pairs: CandidatePairs) -> Tensor:
        boxes = pairs.boxes
        classes = class_cost(pairs, FOCAL, torch.ones_like(boxes[..., 0]))
        return classes + self.box_weight * giou_loss(boxes, pairs.objects)

    def select(self, pairs: CandidatePairs, cost: Tensor) -> Tensor:
        costs, pair = self.pool(pairs, cost)
        cheap = select_cheap(costs.cpu(), self.take).to(cost.device, non_blocking=True)
        selected = torch.zeros(cost.numel() + 1, dtype=torch.bool, device=cost.device)
        return selected.scatter(0, pair.flatten(), cheap.flatten())[:-1].view_as(cost)

    def pool(self, pairs: CandidatePairs, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Collect each object's ``top_k`` cheapest pairs of each level.

        Returns:
            (G, L * top_k) costs in rising order, then infinity; and (G, L * top_k) int64 into the
                flattened pairs, their number for none.
        """
        k, anchors, num_objects = self.top_k, pairs.batch.anchors, len(pairs.batch.gt)
        levels = len(anchors.strides)
        no_group = num_objects * levels  # of impossible pairs
        group = pairs.owner * levels + anchors.level_of(pairs.index)
        cost, group = cost.flatten(), group.flatten()
        group = torch.where(cost < torch.inf, group, no_group)
        # Sort by group, then by cost, then by index.
        order = cost.sort(stable=True).indices
        group, by_group = group[order].sort(stable=True)
        order = order[by_group]
        count = group.new_zeros(no_group + 1).scatter_add(0, group, torch.ones_like(group))
        rank = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
        size = no_group * k
        place = torch.where((rank < k) & (group < no_group), group * k + rank, size)
        costs = cost.new_full((size + 1,), torch.inf).scatter(0, place, cost[order])
        pair = order.new_full((size + 1,), len(order)).scatter(0, place, order)
        # Finer levels first among equal costs.
        costs, column = costs[:-1].view(num_objects, -1).sort(dim=1, stable=True)
        return costs, pair[:-1].view(num_objects, -1).gather(1, column)

    def rank(self, pairs: CandidatePairs) -> Tensor:
        # Does not matter: an anchor is a candidate of one object.
        return torch.zeros_like(pairs.boxes[..., 0])
