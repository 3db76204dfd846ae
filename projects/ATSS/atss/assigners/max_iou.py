"""RetinaNet's rule: thresholds on the overlap with the best object."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import area, centres, nearest_side
from ..parts import one_of
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions
from .pairs import INSIDE_MARGIN, NOBODY, all_anchors, anchors_between, keep_best, nearest_locations
from .similarities import IOU, Similarity


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
        claims_go_to: whom an object's best anchors learn: "best", their own best object, or
            "claimant", that object, and of several the last (mmdet).
        similarity: of anchors and objects.
    """

    def __init__(
        self,
        background_below: float = 0.4,
        positive_from: float = 0.5,
        low_quality_matches: bool = True,
        in_box: bool = False,
        claims_go_to: str = "best",
        similarity: Similarity = IOU,
    ):
        one_of("claims_go_to", claims_go_to, ("best", "claimant"))
        if not 0 < background_below <= positive_from:
            raise ValueError(
                f"MaxIoU needs 0 < background_below <= positive_from, got {background_below} and "
                f"{positive_from}"
            )
        self.background_below = background_below
        self.positive_from = positive_from
        self.low_quality_matches = low_quality_matches
        self.in_box = in_box
        self.claims_go_to = claims_go_to
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
        slots = gt.num_images * len(anchors.boxes)
        # How well each anchor of each image suits the object that suits it best.
        best = gt.boxes.new_full((slots,), -torch.inf, dtype=torch.float64)
        owner = gt.image_index.new_full((slots,), NOBODY)
        best_of_object = gt.boxes.new_zeros(len(gt), dtype=torch.float64)

        def compare(reach: Tensor) -> None:
            for slot, claimant, overlap in self._overlapping(anchors, gt, reach):
                keep_best(best, owner, slot, claimant, overlap)
                best_of_object.scatter_reduce_(0, claimant, overlap, "amax")

        # Of large objects most anchors of the fine levels can be nothing but background, and these
        # are most of all pairs: which they are the sizes tell.
        limit = self._limits(anchors, gt)  # (G, L)
        least = limit.new_full((len(gt), 1), self.background_below)
        if self.low_quality_matches:
            least = least.minimum(self._nearest(anchors, gt)[:, None])
        reach = self._reach(anchors, gt, least).masked_fill_((limit < least)[..., None], -torch.inf)
        compare(reach)
        claims = [owner[:0], owner[:0]]
        if self.low_quality_matches:
            for slot, claimant, overlap in self._overlapping(anchors, gt, reach):
                best_ones = (overlap == best_of_object[claimant]) & (overlap > 0)
                claims += slot[best_ones], claimant[best_ones]
        claimed, claimant = torch.cat(claims[::2]), torch.cat(claims[1::2])
        if self.low_quality_matches and self.claims_go_to == "best":
            # A claimed anchor may suit another object better than its claimant, but not by enough
            # that this was seen.
            level = anchors.level_of(claimed % len(anchors.boxes))
            least = best.new_full((len(anchors.strides),), torch.inf)
            least.scatter_reduce_(0, level, best[claimed], "amin")
            more = self._reach(anchors, gt, least.expand_as(limit))
            seen = (more <= reach).all(dim=-1)
            compare(more.masked_fill_((seen | (limit < least))[..., None], -torch.inf))

        gt_index = torch.where(best >= self.positive_from, owner, IGNORE)
        gt_index.masked_fill_(best < self.background_below, BACKGROUND)
        if self.claims_go_to == "best":
            gt_index[claimed] = owner[claimed]
        else:
            last = torch.full_like(owner, -1).scatter_reduce_(0, claimed, claimant, "amax")
            gt_index = torch.where(last >= 0, last, gt_index)
        gt_index = gt_index.view(gt.num_images, -1)
        if self.in_box and len(gt):
            objects = gt.boxes.double()[gt_index.clamp(min=0)]
            distance = nearest_side(centres(anchors.boxes).double(), objects)
            gt_index[(gt_index >= 0) & (distance <= INSIDE_MARGIN)] = IGNORE
        return Assignment.hard(gt_index)

    def _nearest(self, anchors: Anchors, gt: GroundTruth) -> Tensor:
        """(G,) the similarity of each object with its best anchor, or hardly less: of a shape, none
        is better than the one at the location nearest to the object's centre."""
        objects = gt.boxes.double()
        index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(objects), 1))
        overlap = self.similarity(anchors.boxes[index].double(), objects)
        overlap = overlap * valid * (area(objects) > 0)
        return overlap.amax(dim=0) * (1 - 1e-9)

    def _limits(self, anchors: Anchors, gt: GroundTruth) -> Tensor:
        """(G, L) what the similarity of each object with an anchor of each level cannot exceed:
        that of boxes of their sizes laid upon each other."""
        objects = (gt.boxes[:, 2:] - gt.boxes[:, :2]).double().clamp(min=0)[:, None, None]
        objects, cells = torch.broadcast_tensors(objects, _sides(anchors))
        laid = (torch.cat([-sides, sides], dim=-1) for sides in (objects / 2, cells / 2))
        # Rounding of boxes far from the origin must not exceed it.
        return self.similarity(*laid).amax(dim=-1) + 1e-4

    def _reach(self, anchors: Anchors, gt: GroundTruth, least: Tensor) -> Tensor:
        """(G, L, 2) how far apart along x and y the centres of each object and of an anchor of each
        level can be, so that they are as similar as ``least``, (G, L or 1)."""
        objects = gt.boxes.double()[:, None]
        sides = (objects[..., 2:] - objects[..., :2]).clamp(min=0) + _sides(anchors).amax(dim=1)
        # Rounding must not leave out what is as similar as that.
        scale, distance = self.similarity.reach(least * (1 - 1e-9))
        return scale * sides / 2 + distance + 1e-6

    def _overlapping(
        self, anchors: Anchors, gt: GroundTruth, reach: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of all pairs whose centres are no farther apart than (G, L, 2), in the order of
        the objects: (M,) slot in N * R, (M,) ground truth, (M,) similarity in float64."""
        objects = gt.boxes.double()
        middle = centres(objects)[:, None]
        for claimant, index in anchors_between(anchors, middle - reach, middle + reach):
            overlap = self.similarity(anchors.boxes[index].double(), objects[claimant])
            # What has no area has no sides that a box code could describe.
            overlap = overlap * (area(objects[claimant]) > 0)
            yield gt.image_index[claimant] * len(anchors.boxes) + index, claimant, overlap


def _sides(anchors: Anchors) -> Tensor:
    """(L, A, 2) float64 width and height of the anchors of a location of each level."""
    levels = anchors.boxes.split(anchors.per_level)
    cells = torch.stack([x[: anchors.num_anchors] for x in levels]).double()
    return cells[..., 2:] - cells[..., :2]
