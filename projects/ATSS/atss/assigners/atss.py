"""Adaptive training sample selection: Algorithm 1 of the paper."""

import torch
from torch import Tensor

from ..geometry import centres, iou, side_distances
from ..structures import Anchors, Assignment, GroundTruth, Predictions
from .pairs import nearest_locations, resolve


class ATSS:
    """Positive are the anchors that overlap an object more than its candidates usually do.

    The candidates of an object are the ``top_k`` locations per level nearest to its centre, with
    all A anchors of each. Its threshold is mean + standard deviation of their IoUs with it. The
    cost depends on the number of objects, not on the size of the image.

    Args:
        top_k: k, the rule's one parameter (paper, Table 4).
    """

    # A centre counts as inside an object from this many pixels on, as in the authors' code.
    INSIDE_MARGIN = 0.01
    # Where all candidates overlap equally, their standard deviation is zero but for rounding, and
    # rounding must not decide that an object has no positive at all.
    IOU_TOLERANCE = 1e-6
    # Objects handled at a time: bounds memory, and keeps it in the processor's cache.
    CHUNK = 1024

    def __init__(self, top_k: int = 9):
        if top_k < 1:
            raise ValueError(f"ATSS needs top_k >= 1, got {top_k}")
        self.top_k = top_k

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assigns the anchors of every image of the batch.

        Args:
            anchors: R anchors, the same for all images.
            gt: G objects of N images.
            predictions: not looked at.
        Returns:
            the assignment, (N, R).
        """
        pairs = [self.candidates(anchors, boxes) for boxes in gt.boxes.split(self.CHUNK)]
        index, affinity = (torch.cat(x) for x in zip(*pairs, strict=True))
        return Assignment.hard(resolve(anchors, gt, index, affinity))

    def candidates(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of each object, and how well each positive one overlaps it.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (G, L * k * A) int64 into R, and (G, L * k * A) float64 IoU, -inf where not positive.
        """
        objects = gt_boxes.double()
        location, valid = nearest_locations(anchors, centres(objects), self.top_k)
        each = torch.arange(anchors.per_location, device=location.device)
        index = (location[..., None] * anchors.per_location + each).flatten(1)
        valid = valid[..., None].expand(*valid.shape, anchors.per_location).flatten(1)

        boxes, objects = anchors.boxes[index].double(), objects[:, None]
        overlap = iou(boxes, objects) * valid  # lines 6 and 7
        count = valid.sum(dim=1, keepdim=True)
        mean = overlap.sum(dim=1, keepdim=True) / count  # line 8
        squares = ((overlap - mean) * valid).square().sum(dim=1, keepdim=True)
        std = (squares / (count - 1).clamp(min=1)).sqrt()  # line 9, unbiased
        threshold = mean + std  # line 10
        inside = side_distances(centres(boxes), objects).amin(dim=-1) > self.INSIDE_MARGIN
        positive = (overlap >= threshold - self.IOU_TOLERANCE) & inside & valid  # line 12
        return index, overlap.masked_fill_(~positive, -torch.inf)
