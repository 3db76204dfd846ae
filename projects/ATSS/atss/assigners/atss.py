"""Adaptive training sample selection: Algorithm 1 of the paper."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import Checked, arg
from ..geometry import centres, nearest_side
from ..structures import Assignment, GroundTruth, Predictions
from .conflicts import assign_best
from .locations import INSIDE_MARGIN, all_anchors, nearest_locations
from .similarities import IOU


@dataclass(frozen=True)
class ATSS(Checked):
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
        similarity: of anchors and objects; a function of (..., 4) boxes will do.
    """

    # If all candidates overlap an object equally, their standard deviation is zero but for
    # rounding, which must not decide that it has no positive at all. Relative: corners of anchors
    # are float32, so that the IoU of an anchor of 32 pixels 1,333 pixels from the origin is wrong
    # by up to 8e-6 of itself; an NWD may be 1e-12.
    TOLERANCE: ClassVar[float] = 1e-5
    # Objects handled at a time: bounds memory, and keeps it in the processor's cache.
    CHUNK: ClassVar[int] = 2048

    top_k: int = arg(9, low=1)
    count: str = arg("anchors", choices=("anchors", "locations"))
    similarity: Any = IOU

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`."""
        pairs = (self.candidates(anchors, boxes) for boxes in gt.boxes.split(self.CHUNK))
        return Assignment(assign_best(gt, *join(pairs), len(anchors.boxes)))

    def candidates(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Find the candidates of each object.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (C, G) int64 into R, and (C, G) float64 IoU, -inf if not positive. C is k * A * L, or
            k * L if k counts anchors.
        """
        objects = gt_boxes.double()
        index, valid, boxes = self.nearest(anchors, objects)
        overlap = exact(self.similarity)(boxes, objects) * valid  # line 7
        positive = above_mean_and_std(overlap, valid, self.TOLERANCE)  # lines 8 to 10
        inside = nearest_side(centres(boxes), objects) > INSIDE_MARGIN
        return index, overlap.masked_fill_(~(positive & inside), -torch.inf)  # line 12

    def statistics(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation whose sum is each object's threshold.

        Args:
            gt_boxes: (G, 4).
        Returns:
            (G,) float64 each, of its candidates' IoUs.
        """
        objects = gt_boxes.double()
        _, valid, boxes = self.nearest(anchors, objects)
        return mean_and_std(exact(self.similarity)(boxes, objects) * valid, valid)

    def nearest(self, anchors: Anchors, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def exact(similarity: Any) -> Any:
    """The similarity for rules that know their candidates: even the lowest rank them."""
    return getattr(similarity, "exact", similarity)


def join(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(C, g) indices and affinities of pieces of the objects -> (C, G)."""
    index, affinity = zip(*pairs, strict=True)
    if len(index) == 1:
        return index[0], affinity[0]
    return torch.cat(index, dim=1), torch.cat(affinity, dim=1)


def above_mean_and_std(overlap: Tensor, valid: Tensor, tolerance: float) -> Tensor:
    """(C, G) bool: valid candidates whose overlap is at least mean + standard deviation of their
    object's, but for a relative tolerance."""
    mean, std = mean_and_std(overlap, valid)
    threshold = mean + std
    return (overlap >= threshold - tolerance * threshold.abs()) & valid


def mean_and_std(overlap: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) mean and unbiased standard deviation of (C, G) overlaps, zero if not valid."""
    count = valid.sum(dim=0)
    mean = overlap.sum(dim=0) / count
    squares = ((overlap - mean) * valid).square_().sum(dim=0)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
