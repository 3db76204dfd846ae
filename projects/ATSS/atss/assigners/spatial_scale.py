"""FCOS's rule: points inside an object, on the level for objects of its size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import UserError, WrongValue, arg
from ..geometry import centres, side_distances
from ..structures import Assignment, GroundTruth, Predictions
from .conflicts import assign_best
from .lists import ListPairs, Lists
from .locations import all_anchors, nearest_locations
from .matching import Matching
from .pairs import AssignmentBatch, CandidatePairs


@dataclass(frozen=True)
class SpatialScale(Matching):
    """The spatial and scale constraint of FCOS (arXiv 1904.01355, section 3.2; paper, section 3.3):
    locations inside an object are positive if the distance to its farthest side lies in the range
    of their level. Conflicts: the smallest object. The A anchors of a location share its object.

    Args:
        ranges: upper ends of the levels' ranges in pixels, none for the last. Both ends belong to a
            range, as in the references.
        radius: centre sampling: largest distance from the object's centre, in strides along both
            axes; 0 for any.
        top_k: locations per level nearest to the object's centre (9 for the paper's FCOS "with
            center sampling" in Table 3); 0 for all.
        margin: pixels from the nearest side, above which a location is inside: 0.01 in ATSS's code,
            0 in mmdet and FCOS.
        num_levels: of the detector, to check the number of ranges.
    """

    looks_at_predictions: ClassVar[bool] = False

    ranges: Sequence[float] = (64, 128, 256, 512)
    radius: float = arg(0.0, low=0)
    top_k: int = arg(0, low=0)
    margin: float = 0.01
    num_levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranges", tuple(self.ranges))
        if list(self.ranges) != sorted(self.ranges) or min(self.ranges, default=1) <= 0:
            raise WrongValue("ranges", f"must increase and be above 0, got {list(self.ranges)}")
        if self.num_levels not in (None, len(self.ranges) + 1):
            raise WrongValue(
                "ranges",
                f"is for {len(self.ranges) + 1} levels, but MODEL.ATSS.IN_FEATURES has "
                f"{self.num_levels}",
            )

    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`.

        Raises:
            UserError: if the number of levels is not that of the ranges.
        """
        if len(self.ranges) + 1 != len(anchors.strides):
            raise UserError(
                f"SpatialScale has ranges for {len(self.ranges) + 1} levels, but there are "
                f"{len(anchors.strides)}"
            )
        if not self.top_k:
            return super().__call__(anchors, gt, None)
        batch = AssignmentBatch(anchors, gt, None)
        nearest = nearest_locations(anchors, centres(batch.objects), self.top_k)
        index, exists = all_anchors(anchors, *nearest)
        pairs = CandidatePairs(batch, torch.arange(len(gt), device=index.device)[None], index)
        affinity = (-self.cost(pairs)).masked_fill(~exists, -torch.inf)
        return Assignment(assign_best(gt, index, affinity, len(anchors.boxes)))

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        low, high = batch.objects.new_tensor([(-1.0, *self.ranges), (*self.ranges, math.inf)])
        boxes = batch.objects[ids]
        longest = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
        # The farthest side is between half the longest side and the longest side away.
        fits = (longest >= low) & (longest <= 2 * high + 1)
        radius = high / batch.anchors.lattice[:, 0]
        if self.radius:
            radius = radius.clamp(max=self.radius)
        return batch.central(ids, torch.where(fits, radius, -torch.inf)[..., None])

    def cost(self, pairs: CandidatePairs) -> Tensor:
        anchors = pairs.batch.anchors
        low = anchors.of_levels((-1.0, *self.ranges))[pairs.index]
        high = anchors.of_levels((*self.ranges, math.inf))[pairs.index]
        distances = side_distances(pairs.points, pairs.objects)
        farthest = distances.amax(dim=-1)
        positive = (distances.amin(dim=-1) > self.margin) & (farthest >= low) & (farthest <= high)
        if self.radius:
            positive = positive & pairs.is_near_centre(self.radius)
        areas = pairs.batch.areas[pairs.owner].expand(pairs.shape)
        return areas.masked_fill(~positive, torch.inf)

    def select(self, pairs: CandidatePairs, cost: Tensor) -> Tensor:
        return cost < torch.inf

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return -pairs.batch.areas[pairs.owner]
