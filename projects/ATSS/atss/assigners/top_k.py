"""A fixed number of samples for each object: ATSS without its threshold."""

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import centres, nearest_side
from ..parts import within
from ..structures import Assignment, GroundTruth, Predictions
from .pairs import INSIDE_MARGIN, all_anchors, assign_pairs, surrounding_locations
from .similarities import IOU, Similarity


class TopK:
    """Positive are the ``top_k`` anchors of all levels together that overlap an object most, where
    their centres lie inside it; of several objects an anchor goes to the one it overlaps most (the
    authors' code, "TOPK"; not in the paper).

    Overlaps that are nearly equal are ordered by the distance between the centres, which counts
    up to 0.001 of IoU, as there; what is equal then, by index.

    Args:
        top_k: samples of each object, before those outside it are left out.
        similarity: of anchors and objects; a function of (..., 4) boxes will do.
    """

    # IoU that the distance from the farthest pair of an image costs.
    DISTANCE_COST = 1e-3
    # Scores that agree to 2^-40 are equal, so that rounding does not order them.
    SCORE_STEPS = 2.0**40
    # Objects handled at a time: bounds memory.
    CHUNK = 1024

    def __init__(self, top_k: int = 9, similarity: Similarity = IOU):
        within("top_k", top_k, 1)
        self.top_k = top_k
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
        farthest = self._farthest(anchors, centres(gt.boxes.double()))
        longest = farthest.new_zeros(gt.num_images)
        longest.scatter_reduce_(0, gt.image_index, farthest, "amax")
        return assign_pairs(anchors, gt, self.candidates, self.CHUNK, longest[gt.image_index])

    def candidates(
        self, anchors: Anchors, gt_boxes: Tensor, longest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best anchors of each object, and how well each positive one overlaps it.

        Args:
            gt_boxes: (G, 4).
            longest: (G,) pixels between the centres of the farthest pair of the object's image.
        Returns:
            (k, G) int64 into R, and (k, G) float64 IoU, -inf where not positive.
        """
        objects = gt_boxes.double()
        location, valid = surrounding_locations(anchors, centres(objects), self.top_k)
        index, valid = all_anchors(anchors, location, valid)
        index, order = index.sort(dim=0)
        valid = valid.gather(0, order)

        boxes = anchors.boxes[index].double()
        overlap = self.similarity(boxes, objects)
        distance = (centres(boxes) - centres(objects)).norm(dim=-1)
        score = overlap - self.DISTANCE_COST * distance / longest
        score = (score * self.SCORE_STEPS).round().masked_fill_(~valid, -torch.inf)
        best = score.sort(dim=0, descending=True, stable=True).indices[: self.top_k]

        inside = nearest_side(centres(boxes), objects) > INSIDE_MARGIN
        affinity = overlap.masked_fill_(~(inside & valid), -torch.inf)
        return index.gather(0, best), affinity.gather(0, best)

    @staticmethod
    def _farthest(anchors: Anchors, points: Tensor) -> Tensor:
        """(G,) pixels from each of (G, 2) points to the farthest location of any level."""
        stride, width, height, _ = anchors.lattice.unbind(1)
        first = anchors.offset * stride
        last = torch.stack([width - 1, height - 1], dim=1) * stride[:, None] + first[:, None]
        points = points[:, None]
        reach = torch.maximum((points - first[:, None]).abs(), (points - last).abs())  # (G, L, 2)
        return reach.norm(dim=-1).amax(dim=1)
