"""Adaptive training sample selection: Algorithm 1 of the paper."""

import torch
from torch import Tensor

from ..anchors import Anchors
from ..geometry import centres, nearest_side
from ..parts import one_of, within
from ..structures import Assignment, GroundTruth, Predictions
from .pairs import INSIDE_MARGIN, all_anchors, assign_pairs, nearest_locations
from .scene import Pairs, Scene, alignment
from .similarities import IOU, Similarity


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
        similarity: of anchors and objects; a function of (..., 4) boxes will do.
        alpha: None: a pair is worth what its anchor overlaps the object; a number: p^(1 - alpha) *
            IoU^alpha of what is predicted there (DDOD, arXiv 2107.02963).
    """

    # If all candidates overlap an object equally, their standard deviation is zero but for
    # rounding, which must not decide that it has no positive at all. Relative: corners of anchors
    # are float32, so that the IoU of an anchor of 32 pixels 1,333 pixels from the origin is wrong
    # by up to 8e-6 of itself; an NWD may be 1e-12.
    TOLERANCE = 1e-5
    # Objects handled at a time: bounds memory, and keeps it in the processor's cache.
    CHUNK = 2048

    def __init__(
        self,
        top_k: int = 9,
        count: str = "anchors",
        similarity: Similarity = IOU,
        alpha: float | None = None,
    ):
        within("top_k", top_k, 1)
        one_of("count", count, ("anchors", "locations"))
        self.top_k = top_k
        self.count = count
        if alpha is not None:
            within("alpha", alpha, 0, 1)
        self.similarity = similarity
        # Candidates are known here, so similarities too small for a search still rank them.
        self._measure = getattr(similarity, "exact", similarity)
        self.alpha = alpha
        self.looks_at_predictions = alpha is not None

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assigns the anchors of every image of the batch.

        Args:
            anchors: R anchors, the same for all images.
            gt: G objects of N images.
            predictions: looked at where there is an alpha.
        Returns:
            the assignment, (N, R).

        Raises:
            ValueError: without predictions, where there is an alpha.
        """
        if self.alpha is None:
            return assign_pairs(anchors, gt, self.candidates, self.CHUNK)
        scene = Scene.of(self, anchors, gt, predictions, self._measure)

        def candidates(anchors: Anchors, gt_boxes: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
            return self.candidates(anchors, gt_boxes, scene, owner)

        every = torch.arange(len(gt), device=gt.boxes.device)
        return assign_pairs(anchors, gt, candidates, self.CHUNK, every)

    def candidates(
        self,
        anchors: Anchors,
        gt_boxes: Tensor,
        scene: Scene | None = None,
        owner: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The candidates of each object, and what each positive one is worth.

        Args:
            gt_boxes: (g, 4).
            scene, owner: of what is predicted, and the (g,) indices of these objects in it; where
                there is an alpha.
        Returns:
            (C, g) int64 into R, and (C, g) float64 worth, -inf where not positive. C is k * A * L,
            or k * L where k counts anchors.
        """
        objects = gt_boxes.double()
        index, valid, boxes = self._nearest(anchors, objects)
        if self.alpha is None:
            overlap = self._measure(boxes, objects)  # line 7
        else:
            assert scene is not None
            assert owner is not None
            pairs = Pairs(scene, owner.expand_as(index).flatten(), index.flatten())
            overlap = alignment(pairs, 1 - self.alpha, self.alpha).view_as(index)
        overlap = overlap * valid
        mean, std = _mean_and_std(overlap, valid)  # lines 8, 9
        threshold = mean + std  # line 10
        inside = nearest_side(centres(boxes), objects) > INSIDE_MARGIN
        least = threshold - self.TOLERANCE * threshold.abs()
        positive = (overlap >= least) & inside & valid  # line 12
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
        return _mean_and_std(self._measure(boxes, objects) * valid, valid)

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
