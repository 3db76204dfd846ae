"""FCOS's rule: points inside an object, on the level made for objects of its size."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import area, centres, side_distances
from ..parts import WrongValue, within
from ..structures import Assignment, GroundTruth, Predictions
from .lists import Lists
from .locations import nearest_locations
from .matching import Matching
from .pairs import CandidatePairs
from .tables import Tables


@dataclass(frozen=True)
class SpatialScale(Matching):
    """Positive are the locations inside an object whose distance to its farthest side lies in the
    range of their level (FCOS, arXiv 1904.01355, section 3.2; the "spatial and scale constraint" of
    the paper's section 3.3). Of several objects a location goes to the smallest.

    All A anchors of a location share its object.

    Args:
        ranges: upper end of each level's range in pixels, but for the last level, which has none.
            Both ends belong to a range, as in the references.
        radius: centre sampling: only locations within this many strides of the object's centre,
            along both axes; 0 for all.
        top_k: only this many locations per level, the nearest to the object's centre (the paper's
            FCOS "with center sampling" in Table 3 has 9); 0 for all.
        margin: a location is inside from more than this many pixels on. The authors of ATSS have
            0.01; mmdet, and they for FCOS itself, 0.
        num_levels: of the detector, if it is known.
    """

    looks_at_predictions: ClassVar[bool] = False

    ranges: Sequence[float] = (64, 128, 256, 512)
    radius: float = 0.0
    top_k: int = 0
    margin: float = 0.01
    num_levels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", tuple(self.ranges))
        if list(self.ranges) != sorted(self.ranges) or min(self.ranges, default=1) <= 0:
            raise WrongValue("ranges", f"must rise from above 0, not {list(self.ranges)}")
        if self.num_levels not in (None, len(self.ranges) + 1):
            raise WrongValue(
                "ranges",
                f"is for {len(self.ranges) + 1} levels, but MODEL.ATSS.IN_FEATURES has "
                f"{self.num_levels}",
            )
        within("radius", self.radius, 0)
        within("top_k", self.top_k, 0)

    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`; only the anchors' locations matter.

        Raises:
            ValueError: if there are not as many levels as ranges.
        """
        if len(self.ranges) + 1 != len(anchors.strides):
            raise ValueError(
                f"SpatialScale has ranges for {len(self.ranges) + 1} levels, but there are "
                f"{len(anchors.strides)}"
            )
        return super().__call__(anchors, gt, None)

    def candidates(self, batch: Lists, ids: Tensor) -> Any:
        """Locations near enough to the centres of objects of a size that suits their level."""
        if self.top_k:
            return batch.at_locations(*self._nearest(batch, ids), ids)
        low, high = batch.objects.new_tensor([(-1.0, *self.ranges), (*self.ranges, math.inf)])
        boxes = batch.objects[ids]
        longest = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
        # The farthest side is at least half as far as the sides are long, and at most as far.
        suits = (longest >= low) & (longest <= 2 * high + 1)
        radius = high / batch.anchors.lattice[:, 0]
        if self.radius:
            radius = radius.clamp(max=self.radius)
        return batch.central(ids, torch.where(suits, radius, -torch.inf)[..., None])

    def tables(self, batch: Tables) -> Iterable[Any]:
        if self.top_k:
            ids = torch.arange(len(batch.gt), device=batch.gt.boxes.device)
            return [batch.at_locations(*self._nearest(batch, ids))]
        return batch.tables()

    def _nearest(self, batch: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(g, C) the locations nearest to the centres of objects, and (g, C) whether they exist."""
        nearest = nearest_locations(batch.anchors, centres(batch.objects[ids]), self.top_k)
        location, exists = (x.movedim(1, 0).flatten(1) for x in nearest)
        return location, exists

    def cost(self, pairs: CandidatePairs) -> Tensor:
        """The object's area, if the location is positive for it."""
        anchors = pairs.batch.anchors
        low = anchors.of_levels((-1.0, *self.ranges))[pairs.index]
        high = anchors.of_levels((*self.ranges, math.inf))[pairs.index]
        distances = side_distances(pairs.points, pairs.objects)
        farthest = distances.amax(dim=-1)
        positive = (distances.amin(dim=-1) > self.margin) & (farthest >= low) & (farthest <= high)
        if self.radius:
            positive = positive & pairs.around(self.radius)
        return torch.where(positive, area(pairs.objects), torch.inf)

    def select(self, pairs: CandidatePairs, cost: Tensor) -> Tensor:
        return cost < torch.inf

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return -area(pairs.objects)
