"""Adaptive training sample selection: Algorithm 1 of the paper."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import centres, iou, nearest_side
from ..parts import one_of, within
from ..structures import Assignment, GroundTruth, Predictions
from .pairs import all_anchors, assign_pairs, nearest_locations


class ATSS:
    """Positive are the anchors that overlap an object more than its candidates usually do.

    The candidates of an object are the ``top_k`` anchors per level nearest to its centre, however
    many a location has. Its threshold is mean + standard deviation of their IoUs with it. The cost
    depends on the number of objects, not on the size of the image.

    Args:
        top_k: k, the rule's one parameter (paper, Table 4).
        count: what k counts: "anchors" (Algorithm 1, line 4, and the authors' code when the paper's
            figures were made; of equally distant ones the lower index is nearer), or "locations",
            each with all its A anchors (their code since its last commit, of 2020-04-22). With one
            anchor per location they agree.
        similarity: of anchors and objects, (..., 4) each -> (...) from 0 to 1.
    """

    # A centre counts as inside an object from this many pixels on, as in the authors' code.
    INSIDE_MARGIN = 0.01
    # Where all candidates overlap equally, their standard deviation is zero but for rounding, and
    # rounding must not decide that an object has no positive at all.
    IOU_TOLERANCE = 1e-6
    # Objects handled at a time: bounds memory, and keeps it in the processor's cache.
    CHUNK = 2048

    def __init__(
        self,
        top_k: int = 9,
        count: str = "anchors",
        similarity: Callable[[Tensor, Tensor], Tensor] = iou,
    ):
        within("top_k", top_k, 1)
        one_of("count", count, ("anchors", "locations"))
        self.top_k = top_k
        self.count = count
        self.similarity = similarity

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
        return assign_pairs(anchors, gt, self.candidates, self.CHUNK)

    def candidates(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of each object, and how well each positive one overlaps it.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (C, G) int64 into R, and (C, G) float64 IoU, -inf where not positive. C is k * A * L, or
            k * L where k counts anchors.
        """
        objects = gt_boxes.double()
        index, valid, boxes = self._nearest(anchors, objects)
        overlap = self.similarity(boxes, objects) * valid  # line 7
        mean, std = _mean_and_std(overlap, valid)  # lines 8, 9
        threshold = mean + std  # line 10
        inside = nearest_side(centres(boxes), objects) > self.INSIDE_MARGIN
        positive = (overlap >= threshold - self.IOU_TOLERANCE) & inside & valid  # line 12
        return index, overlap.masked_fill_(~positive, -torch.inf)

    def statistics(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """What makes each object's threshold.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (G,) float64 mean and (G,) float64 standard deviation of its candidates' IoUs.
        """
        objects = gt_boxes.double()
        _, valid, boxes = self._nearest(anchors, objects)
        return _mean_and_std(self.similarity(boxes, objects) * valid, valid)

    def _nearest(self, anchors: Anchors, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lines 2 to 6: (C, G) index and validity of the candidates, (C, G, 4) their boxes."""
        top_k = self.top_k
        if self.count == "anchors":
            top_k = -(-top_k // anchors.num_anchors)
        location, valid = nearest_locations(anchors, centres(objects), top_k)
        index, valid = all_anchors(anchors, location, valid)
        if self.count == "anchors":  # of the farthest location perhaps not all
            cut = self.top_k * len(anchors.strides)
            index, valid = index[:cut], valid[:cut]
        boxes = anchors.sides.gather(1, index.flatten().expand(4, -1))
        return index, valid, boxes.view(4, *index.shape).movedim(0, -1)


def _mean_and_std(overlap: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) mean and unbiased standard deviation of (C, G) overlaps, zero where not valid."""
    count = valid.sum(dim=0)
    mean = overlap.sum(dim=0) / count
    squares = ((overlap - mean) * valid).square_().sum(dim=0)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
