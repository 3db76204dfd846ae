"""RetinaNet's rule: thresholds on the overlap with the best object."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import centres, iou, nearest_side
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions
from .pairs import rectangles


class MaxIoU:
    """Each anchor looks at the object that it overlaps most: positive from one IoU on, background
    below another, ignored in between (RetinaNet, arXiv 1708.02002, section 4).

    With low-quality matches the anchors that overlap an object most, all of them where several do
    equally, become positive too, each for its own best object (as Detectron2's Matcher has it).
    Unlike there, an object that overlaps no anchor claims none.

    Args:
        background_below, positive_from: IoU thresholds.
        low_quality_matches: whether an object's best anchors are positive in any case.
        in_box: whether positives whose centre lies outside their object are ignored instead (paper,
            Table 1, "In GT Box").
    """

    # A centre counts as inside from this many pixels on, as in the authors' code.
    INSIDE_MARGIN = 0.01

    def __init__(
        self,
        background_below: float = 0.4,
        positive_from: float = 0.5,
        low_quality_matches: bool = True,
        in_box: bool = False,
    ):
        if not 0 < background_below <= positive_from:
            raise ValueError(
                f"MaxIoU needs 0 < background_below <= positive_from, got {background_below} and "
                f"{positive_from}"
            )
        self.background_below = background_below
        self.positive_from = positive_from
        self.low_quality_matches = low_quality_matches
        self.in_box = in_box

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
        slots = gt.num_images * len(anchors.boxes)
        best = gt.boxes.new_zeros(slots, dtype=torch.float64)  # IoU of each anchor of each image
        owner = gt.image_index.new_full((slots,), len(gt))
        best_of_object = gt.boxes.new_zeros(len(gt), dtype=torch.float64)

        def compare(wanted: Tensor) -> None:
            for slot, claimant, overlap in self._overlapping(anchors, gt, wanted):
                before = best.gather(0, slot)
                best.scatter_reduce_(0, slot, overlap, "amax")
                now = best.gather(0, slot)
                owner[slot[now > before]] = len(gt)
                # Of equal overlaps the lower object keeps the anchor.
                wins = (overlap == now) & (overlap > 0)
                owner.scatter_reduce_(0, slot[wins], claimant[wins], "amin")
                best_of_object.scatter_reduce_(0, claimant, overlap, "amax")

        # Of large objects most anchors of the fine levels can be nothing but background, and these
        # are most of all pairs: which they are the sizes tell.
        limit = self._limits(anchors, gt)  # (G, L)
        seen = limit >= self.background_below
        if self.low_quality_matches:
            seen = seen | (limit == limit.amax(dim=1, keepdim=True))
        compare(seen)
        claimed = owner[:0]
        if self.low_quality_matches:
            # Levels where an object may have its best anchor after all, or one as good.
            more = ~seen & (limit >= best_of_object[:, None])
            compare(more)
            seen = seen | more
            pieces = self._overlapping(anchors, gt, seen)
            best_ones = (
                slot[(overlap == best_of_object[claimant]) & (overlap > 0)]
                for slot, claimant, overlap in pieces
            )
            claimed = torch.cat([claimed, *best_ones])
            # And those where a claimed anchor may overlap another object more than its claimant.
            ends = torch.tensor(anchors.per_level, device=claimed.device).cumsum(0)
            level = torch.searchsorted(ends, claimed % len(anchors.boxes), right=True)
            least = best.new_full((len(ends),), torch.inf)
            least.scatter_reduce_(0, level, best[claimed], "amin")
            compare(~seen & (limit >= least))

        gt_index = torch.where(best >= self.positive_from, owner, IGNORE)
        gt_index.masked_fill_(best < self.background_below, BACKGROUND)
        gt_index[claimed] = owner[claimed]
        gt_index = gt_index.view(gt.num_images, -1)
        if self.in_box and len(gt):
            objects = gt.boxes.double()[gt_index.clamp(min=0)]
            distance = nearest_side(centres(anchors.boxes).double(), objects)
            gt_index[(gt_index >= 0) & (distance <= self.INSIDE_MARGIN)] = IGNORE
        return Assignment.hard(gt_index)

    @staticmethod
    def _limits(anchors: Anchors, gt: GroundTruth) -> Tensor:
        """(G, L) what the IoU of each object with an anchor of each level cannot exceed: that of
        boxes of their sizes laid upon each other."""
        objects = (gt.boxes[:, 2:] - gt.boxes[:, :2]).double().clamp(min=0)[:, None]  # (G, 1, 2)
        limits = []
        for boxes in anchors.boxes.split(anchors.per_level):
            cell = boxes[: anchors.num_anchors].double()
            sizes = cell[:, 2:] - cell[:, :2]  # (A, 2)
            shared = torch.minimum(objects, sizes).prod(dim=-1)
            together = objects.prod(dim=-1) + sizes.prod(dim=-1) - shared
            limits.append((shared / together).amax(dim=1))
        # Rounding of boxes far from the origin must not exceed it.
        return torch.stack(limits, dim=1) + 1e-4

    @staticmethod
    def _overlapping(
        anchors: Anchors, gt: GroundTruth, wanted: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of all pairs that can overlap, of the (G, L) objects and levels that are wanted,
        in the order of the objects: (M,) slot in N * R, (M,) ground truth, (M,) IoU in float64."""
        objects = gt.boxes.double()
        cells = [x[: anchors.num_anchors] for x in anchors.boxes.split(anchors.per_level)]
        reach = torch.stack([(x[:, 2:] - x[:, :2]).amax(dim=0) / 2 for x in cells])  # (L, 2)
        low, high = objects[:, None, :2] - reach, objects[:, None, 2:] + reach
        nowhere = ~wanted[..., None]
        low, high = low.masked_fill(nowhere, torch.inf), high.masked_fill(nowhere, -torch.inf)
        each = torch.arange(anchors.num_anchors, device=objects.device)
        for claimant, location in rectangles(anchors, low, high):
            index = (location[:, None] * anchors.num_anchors + each).flatten()
            claimant = claimant.repeat_interleave(anchors.num_anchors)
            overlap = iou(anchors.boxes[index].double(), objects[claimant])
            yield gt.image_index[claimant] * len(anchors.boxes) + index, claimant, overlap
