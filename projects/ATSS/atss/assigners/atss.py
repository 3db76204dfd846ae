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
from .trace import active_trace, record_columns


@dataclass(frozen=True)
class ATSS(Checked):
    """Adaptive training sample selection. Candidates of an object are the ``top_k`` anchors per
    level nearest to its centre; positive are those inside it whose IoU is at least the mean plus
    the standard deviation of all.

    Args:
        top_k: k, the only parameter of the rule (paper, Table 4).
        count: unit of k: "anchors" (Algorithm 1, line 4, and the code of the paper's figures; of
            equally distant ones the lower index is nearer), or "locations" with all their A anchors
            (the authors' code since 2020-04-22).
        similarity: of anchors and objects; also a function of (..., 4) boxes.
    """

    # The standard deviation of equal IoUs is 0 but for rounding, which must not leave the object
    # without positives. Relative, because the corners of anchors are float32: the IoU of an anchor
    # of 32 px at 1,333 px from the origin has a relative error of up to 8e-6; an NWD may be 1e-12.
    TOLERANCE: ClassVar[float] = 1e-5
    # Objects at a time: bounds memory, and fits the processor's cache.
    CHUNK: ClassVar[int] = 2048

    top_k: int = arg(9, low=1)
    count: str = arg("anchors", choices=("anchors", "locations"))
    similarity: Any = IOU

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        pieces = (self.candidates(anchors, boxes) for boxes in gt.boxes.split(self.CHUNK))
        return Assignment(assign_best(gt, *join(pieces), len(anchors.boxes)))

    def candidates(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Find the candidates of (G, 4) objects.

        Returns:
            (C, G) int64 into R, and (C, G) float64 IoU, -inf if not positive. C is k * A * L, or k
                * L if k counts anchors.
        """
        objects = gt_boxes.double()
        index, valid, boxes = self.nearest(anchors, objects)
        iou = exact(self.similarity)(boxes, objects) * valid  # line 7
        affinity = self.keep_positives(iou, valid, boxes, objects)
        self._record(index, iou, valid, affinity)
        return index, affinity

    def statistics(self, anchors: Anchors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return (G,) float64 mean and standard deviation of the candidates' IoUs with (G, 4)
        boxes."""
        objects = gt_boxes.double()
        _, valid, boxes = self.nearest(anchors, objects)
        return mean_and_std(exact(self.similarity)(boxes, objects) * valid, valid)

    def nearest(self, anchors: Anchors, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (C, G) index, (C, G) validity and (C, G, 4) boxes of candidates (lines 2 to 6)."""
        top_k = self.top_k
        if self.count == "anchors":
            top_k = -(-top_k // anchors.num_anchors)
        location, valid = nearest_locations(anchors, centres(objects), top_k)
        index, valid = all_anchors(anchors, location, valid)
        if self.count == "anchors":  # only some anchors of the farthest location
            num_candidates = self.top_k * len(anchors.strides)
            index, valid = index[:num_candidates], valid[:num_candidates]
        boxes = anchors.sides.gather(1, index.flatten().expand(4, -1))
        return index, valid, boxes.view(4, *index.shape).movedim(0, -1)

    def keep_positives(self, iou: Tensor, valid: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
        """Return the (C, G) IoUs of positives, -inf for other candidates (lines 8 to 12)."""
        mean, std = mean_and_std(iou, valid)
        threshold = mean + std
        positive = (iou >= threshold - self.TOLERANCE * threshold.abs()) & valid
        inside = nearest_side(centres(boxes), objects) > INSIDE_MARGIN
        return iou.masked_fill(~(positive & inside), -torch.inf)

    def _record(self, index: Tensor, iou: Tensor, valid: Tensor, affinity: Tensor) -> None:
        if trace := active_trace(self):
            ids = record_columns(trace, index, affinity > -torch.inf, valid, similarity=iou)
            mean, std = mean_and_std(iou, valid)
            values = {"mean": mean, "std": std, "threshold": mean + std}
            trace.objects.append({"ids": ids, **values})


def exact(similarity: Any) -> Any:
    """Return the similarity for rules that do not search by it, which rank even the smallest."""
    return getattr(similarity, "exact", similarity)


def join(pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate (C, g) indices and affinities of pieces of the objects: (C, G)."""
    index, affinity = (
        x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in zip(*pieces, strict=True)
    )
    return index, affinity


def mean_and_std(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (G,) mean and unbiased standard deviation of (C, G) values, 0 if not valid."""
    count = valid.sum(dim=0)
    mean = values.sum(dim=0) / count
    squares = ((values - mean) * valid).square_().sum(dim=0)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
