"""Probabilistic anchor assignment."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import arg
from ..losses import Focal, giou_loss
from ..structures import cached_property
from .lists import ListPairs, Lists
from .matching import Matching
from .max_iou import MaxIoU
from .mixture import good_ones
from .pairs import CandidatePairs, class_cost
from .similarities import IOU, Similarity
from .tables import Tables

FOCAL = Focal()


@dataclass(frozen=True)
class PAA(Matching):
    """Probabilistic anchor assignment (arXiv 2007.08103, section 3.1 and figure 3c): a mixture of
    two Gaussians over the losses of an object's anchors separates good from bad ones. Positive are
    those up to the loss at which the cheaper component is densest.

    Each anchor is a candidate of the object that it overlaps most, if by ``iou_threshold`` or more,
    or of an object whose best anchor it is. A pair costs its current focal and GIoU loss. The
    mixture is fitted on the host: a GPU waits for one copy there and one back.

    Args:
        top_k: cheapest of each level, over which the mixture is fitted.
        iou_threshold: least overlap of a candidate.
        box_weight: of the GIoU loss, 1.3 in mmdet and 1 in the authors' code.
        take: which anchors are positive: "component", those of the cheaper component, and none of
            an object with a single candidate (mmdet); "all", and all candidates if there is a
            single one, or none in the component (the authors).
        claims_go_to: see :class:`~atss.assigners.MaxIoU`; "best" in the authors' code.
        similarity: of anchors and objects, in place of the IoU.
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
        """The rule that gives each anchor to the object whose candidate it is."""
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
        values, pair = self.pool(pairs, cost)
        taken = good_ones(values.cpu(), self.take).to(cost.device, non_blocking=True)
        chosen = torch.zeros_like(cost, dtype=torch.bool).flatten()
        chosen = torch.cat([chosen, chosen.new_zeros(1)])
        return chosen.scatter(0, pair.flatten(), taken.flatten())[:-1].view_as(cost)

    def pool(self, pairs: CandidatePairs, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Collect each object's ``top_k`` cheapest pairs of each level.

        Returns:
            (G, L * top_k) costs in rising order, then infinity; and (G, L * top_k) int64 the pairs,
            into the flattened ones, or their number for none.
        """
        k, anchors, num_objects = self.top_k, pairs.batch.anchors, len(pairs.batch.gt)
        levels = len(anchors.strides)
        last = num_objects * levels  # of pairs that are none
        group = pairs.owner * levels + anchors.level_of(pairs.index)
        cost, group = cost.flatten(), group.flatten()
        group = torch.where(cost < torch.inf, group, last)
        # By group, then cost, then as they were.
        order = cost.sort(stable=True).indices
        group, by_group = group[order].sort(stable=True)
        order = order[by_group]
        count = group.new_zeros(last + 1).scatter_add(0, group, torch.ones_like(group))
        rank = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
        place = torch.where((rank < k) & (group < last), group * k + rank, last * k)
        values = cost.new_full((last * k + 1,), torch.inf).scatter(0, place, cost[order])
        pair = order.new_full((last * k + 1,), len(order)).scatter(0, place, order)
        # Of equal costs the finer level first.
        values, column = values[:-1].view(num_objects, -1).sort(dim=1, stable=True)
        return values, pair[:-1].view(num_objects, -1).gather(1, column)

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return torch.zeros_like(pairs.boxes[..., 0])  # an anchor is a candidate of one object
