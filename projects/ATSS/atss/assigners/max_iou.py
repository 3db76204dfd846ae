"""RetinaNet's rule: thresholds on the IoU with the best object."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..anchors import Anchors
from ..errors import Checked, UserError, arg
from ..geometry import centres, nearest_side
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions
from .box_index import BoxIndex, index_anchors
from .conflicts import Conflicts
from .engine import uses_tables
from .lists import ListPairs, Lists
from .locations import INSIDE_MARGIN, all_anchors, nearest_locations
from .similarities import IOU, Similarity
from .tables import Tables
from .trace import active_trace, record_pairs


def check_thresholds(rule: str, background_below: float, positive_from: float) -> None:
    """Raise UserError, naming the rule, unless 0 < background_below <= positive_from."""
    if not 0 < background_below <= positive_from:
        raise UserError(
            f"{rule} needs 0 < background_below <= positive_from, got {background_below} and "
            f"{positive_from}"
        )


@dataclass(frozen=True)
class MaxIoU(Checked):
    """Thresholds on the IoU of an anchor with its best object: positive from one on, background
    below another, ignored in between (RetinaNet, arXiv 1708.02002, section 4).

    Args:
        background_below, positive_from: IoU thresholds.
        low_quality_matches: whether the anchors of highest IoU with an object are always positive
            (as in Detectron2's Matcher, except for an object that overlaps no anchor).
        in_box: whether positives whose centre lies outside their object are ignored (paper, Table
            1, "In GT Box").
        claims_go_to: object of a low-quality match: "best", the anchor's own best object, or
            "claimant", the last object whose best anchor it is (mmdet).
        similarity: of anchors and objects.
    """

    background_below: float = 0.4
    positive_from: float = 0.5
    low_quality_matches: bool = True
    in_box: bool = False
    claims_go_to: str = arg("best", choices=("best", "claimant"))
    similarity: Similarity = IOU

    def __post_init__(self) -> None:
        super().__post_init__()
        check_thresholds(type(self).__name__, self.background_below, self.positive_from)

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        best, owner, claimant = self.search(anchors, gt)
        gt_index = torch.where(best >= self.positive_from, owner, IGNORE)
        gt_index = gt_index.masked_fill_(best < self.background_below, BACKGROUND)
        claimed_by = owner if self.claims_go_to == "best" else claimant
        gt_index = torch.where(claimant >= 0, claimed_by, gt_index)
        gt_index = gt_index.view(gt.num_images, -1)
        if self.in_box and len(gt):
            objects = gt.boxes.double()[gt_index.clamp(min=0)]
            outside = nearest_side(centres(anchors.boxes).double(), objects) <= INSIDE_MARGIN
            gt_index = gt_index.masked_fill((gt_index >= 0) & outside, IGNORE)
        return Assignment(gt_index)

    def search(self, anchors: Anchors, gt: GroundTruth) -> tuple[Tensor, Tensor, Tensor]:
        """Find the best object of each anchor, and the best anchors of each object.

        Returns:
            (N * R,) float64 IoU with the best object and (N * R,) int64 object, exact if the IoU is
                at least ``background_below`` or the anchor is claimed; (N * R,) int64 last object
                that claims the anchor, or -1.
        """
        conflicts = Conflicts(gt, len(anchors.boxes))
        claimant = torch.full_like(conflicts.owner, -1)
        kind = Tables if uses_tables(gt.boxes.device) else Lists
        batch = kind(anchors, gt, None, self.similarity)
        if isinstance(batch, Tables):
            pieces: Iterator[Any] = batch.tables()
        else:
            first_image = torch.zeros_like(gt.image_index)
            pieces = self._near(batch, index_anchors(anchors), first_image, self._least(batch))
        for pairs in pieces:
            iou = pairs.anchor_similarity * batch.nonempty[pairs.owner]
            conflicts.compete(pairs, iou)
            if self.low_quality_matches:
                claimed = (iou == pairs.highest_of_object(iou)) & (iou > 0)
                claims = pairs.owner.expand(pairs.shape).masked_fill(~claimed, -1)
                pairs.view(claimant).scatter_reduce_(0, pairs.address, claims, "amax")
            if trace := active_trace(self):
                chosen = iou >= self.positive_from
                chosen = chosen | claimed if self.low_quality_matches else chosen
                possible = chosen | (iou >= self.background_below)
                record_pairs(trace, pairs.owner, pairs.index, chosen, possible, similarity=iou)
        if isinstance(batch, Lists) and self.claims_go_to == "best":
            # The best object of a claimed anchor may have left it out of its list.
            uncertain = (claimant >= 0) & (conflicts.best < self.background_below)
            if uncertain.any():
                least = conflicts.best[uncertain].amin().expand(len(gt))
                usable = uncertain.view(batch.shape)
                index = BoxIndex(anchors, anchors.boxes.expand(*usable.shape, 4), usable)
                for pairs in self._near(batch, index, gt.image_index, least):
                    conflicts.compete(pairs, pairs.anchor_similarity)
        return conflicts.best, conflicts.owner, claimant

    def _least(self, batch: Lists) -> Tensor:
        """Return (G,) the least relevant IoU: ``background_below``, or that of the object's best
        anchor, the nearest to its centre of one shape."""
        objects, anchors = batch.objects, batch.anchors
        least = torch.full_like(objects[:, 0], self.background_below)
        if not self.low_quality_matches:
            return least
        index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(objects), 1))
        iou = self.similarity(anchors.boxes[index].double(), objects) * valid
        return least.minimum(iou.amax(dim=0))

    def _near(
        self, batch: Lists, index: BoxIndex, image: Tensor, least: Tensor
    ) -> Iterator[ListPairs]:
        """Yield pieces of the pairs with at least (G,) ``least`` IoU."""
        for ids in batch.pieces(batch.all_objects, batch.shape[1]):
            owner, anchor = index.near(self.similarity, batch.gt.boxes[ids], image[ids], least[ids])
            yield ListPairs(batch, ids[owner], anchor)
