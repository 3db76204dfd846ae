"""RetinaNet's rule: thresholds on the overlap with the best object."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import centres, nearest_side
from ..parts import one_of
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions
from .anchor_index import AnchorIndex
from .conflicts import Conflicts
from .engine import uses_tables
from .lists import Lists
from .locations import INSIDE_MARGIN
from .similarities import IOU, Similarity
from .tables import Tables


@dataclass(frozen=True)
class MaxIoU:
    """Thresholds on the IoU of an anchor with the object that it overlaps most: positive from one on,
    background below another, ignored in between (RetinaNet, arXiv 1708.02002, section 4).

    With low-quality matches the anchors that overlap an object most, all of them if several do
    equally, become positive too, each for its own best object (as Detectron2's Matcher has it).
    Unlike there, an object that overlaps no anchor claims none.

    Args:
        background_below, positive_from: IoU thresholds.
        low_quality_matches: whether an object's best anchors are positive in any case.
        in_box: whether positives whose centre lies outside their object are ignored instead (paper,
            Table 1, "In GT Box").
        claims_go_to: whom an object's best anchors learn: "best", their own best object, or
            "claimant", that object, and of several the last (mmdet).
        similarity: of anchors and objects.
    """

    background_below: float = 0.4
    positive_from: float = 0.5
    low_quality_matches: bool = True
    in_box: bool = False
    claims_go_to: str = "best"
    similarity: Similarity = IOU

    def __post_init__(self) -> None:
        one_of("claims_go_to", self.claims_go_to, ("best", "claimant"))
        if not 0 < self.background_below <= self.positive_from:
            raise ValueError(
                "MaxIoU needs 0 < background_below <= positive_from, got "
                f"{self.background_below} and {self.positive_from}"
            )

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`."""
        if uses_tables(gt.boxes.device):
            best, owner, claimant = self.search(Tables(anchors, gt, None))
        else:
            index = AnchorIndex(Lists(anchors, gt, None, self.similarity))
            low, to_best = self.low_quality_matches, self.claims_go_to == "best"
            best, owner, claimant = index.search(self.background_below, low, to_best)
        gt_index = torch.where(best >= self.positive_from, owner, IGNORE)
        gt_index = gt_index.masked_fill_(best < self.background_below, BACKGROUND)
        if self.low_quality_matches:
            object_of_claim = owner if self.claims_go_to == "best" else claimant
            gt_index = torch.where(claimant >= 0, object_of_claim, gt_index)
        gt_index = gt_index.view(gt.num_images, -1)
        if self.in_box and len(gt):
            objects = gt.boxes.double()[gt_index.clamp(min=0)]
            outside = nearest_side(centres(anchors.boxes).double(), objects) <= INSIDE_MARGIN
            gt_index = gt_index.masked_fill((gt_index >= 0) & outside, IGNORE)
        return Assignment(gt_index)

    def search(self, batch: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Compare all anchors with all objects: see :meth:`AnchorIndex.search`."""
        conflicts = Conflicts(batch)
        claimant = torch.full_like(conflicts.owner, -1)
        boxes = batch.anchors.sides.movedim(0, -1)
        for table in batch.tables():
            overlap = self.similarity(boxes, table.objects)
            # No box code can describe an object without an area.
            overlap = overlap * table.of_objects(batch.nonempty)[:, None]
            conflicts.compete(table, overlap)
            if self.low_quality_matches:
                claimed = (overlap == overlap.amax(dim=1, keepdim=True)) & (overlap > 0)
                claims = torch.where(claimed, table.owner, -1)
                table.view(claimant).scatter_reduce_(0, table.address, claims, "amax")
        return conflicts.best, conflicts.owner, claimant
