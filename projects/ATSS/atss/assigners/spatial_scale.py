"""FCOS's rule: points inside an object, on the level made for objects of its size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import area, centres, nearest_side, side_distances
from ..parts import WrongValue, within
from ..structures import Assignment, GroundTruth, Predictions
from .pairs import assign_pairs, nearest_locations, window


class SpatialScale:
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
        num_levels: that there will be, where it is known.
    """

    # Objects handled at a time: bounds memory at some 1,500 candidates each.
    CHUNK = 256

    def __init__(
        self,
        ranges: Sequence[float] = (64, 128, 256, 512),
        radius: float = 0.0,
        top_k: int = 0,
        margin: float = 0.01,
        num_levels: int | None = None,
    ):
        if list(ranges) != sorted(ranges) or min(ranges, default=1) <= 0:
            raise WrongValue("ranges", f"must rise from above 0, not {list(ranges)}")
        if num_levels not in (None, len(ranges) + 1):
            raise WrongValue(
                "ranges",
                f"is for {len(ranges) + 1} levels, but MODEL.ATSS.IN_FEATURES has {num_levels}",
            )
        within("radius", radius, 0)
        within("top_k", top_k, 0)
        self.ranges = tuple(ranges)
        self.radius = radius
        self.top_k = top_k
        self.margin = margin

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assigns the anchors of every image of the batch.

        Args:
            anchors: R anchors, the same for all images; only their locations matter.
            gt: G objects of N images.
            predictions: not looked at.
        Returns:
            the assignment, (N, R).

        Raises:
            ValueError: where the ranges are not those of as many levels as there are.
        """
        if len(self.ranges) + 1 != len(anchors.strides):
            raise ValueError(
                f"SpatialScale has ranges for {len(self.ranges) + 1} levels, but there are "
                f"{len(anchors.strides)}"
            )
        return assign_pairs(anchors, gt, self.candidates, self.CHUNK)

    def candidates(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The anchors that can be positive for each object.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (C, G) int64 into R, and (C, G) float64: minus the object's area, -inf where the anchor
            is not positive.
        """
        objects = gt_boxes.double()
        middle = centres(objects)
        if self.top_k:
            nearest, exists = nearest_locations(anchors, middle, self.top_k)
        valid: Tensor | bool
        index, affinity = [], []
        bounds = zip((-1.0, *self.ranges), (*self.ranges, math.inf), strict=True)
        for level, (low, high) in enumerate(bounds):
            if self.top_k:
                location, valid = nearest[..., level], exists[..., level]
            else:
                # Nobody in the range is farther than that from the object's centre.
                location, valid = window(anchors, level, middle, high), True
            points = anchors.centres_of(location, level)
            farthest = side_distances(points, objects).amax(dim=-1)
            positive = (nearest_side(points, objects) > self.margin) & valid
            positive &= (farthest >= low) & (farthest <= high)
            if self.radius:
                reach = self.radius * anchors.strides[level]
                positive &= ((points - middle).abs() < reach).all(dim=-1)
            score = (-area(objects)).expand_as(positive).masked_fill(~positive, -torch.inf)
            each = torch.arange(anchors.num_anchors, device=location.device)[:, None, None]
            index.append((location * anchors.num_anchors + each).flatten(0, 1))
            affinity.append(score.expand(anchors.num_anchors, -1, -1).flatten(0, 1))
        return torch.cat(index), torch.cat(affinity)
