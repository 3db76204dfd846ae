"""Detectron2's rule for the region proposal network, with its rounding."""

from dataclasses import dataclass

import torch
from detectron2.modeling import matcher
from detectron2.structures import Boxes, pairwise_iou

from ..anchors import Anchors
from ..errors import Checked, UserError
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions


@dataclass(frozen=True)
class Matcher(Checked):
    """Detectron2's Matcher on the float32 IoUs of all anchors and objects. Many low-quality matches
    are ties that rounding decides: :class:`~atss.assigners.MaxIoU` computes in float64 and assigns
    others.

    As in Detectron2, an object that overlaps no anchor makes all anchors of its image positive.

    Args:
        background_below, positive_from: IoU thresholds.
        low_quality_matches: whether the anchors of highest IoU with an object are always positive,
            for their own best object.
    """

    background_below: float = 0.3
    positive_from: float = 0.7
    low_quality_matches: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.background_below <= self.positive_from:
            raise UserError(
                "Matcher needs 0 < background_below <= positive_from, got "
                f"{self.background_below} and {self.positive_from}"
            )

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        thresholds = [self.background_below, self.positive_from]
        match = matcher.Matcher(thresholds, [0, -1, 1], self.low_quality_matches)
        shape = gt.num_images, len(anchors.boxes)
        gt_index = gt.image_index.new_full(shape, BACKGROUND)
        for i, row in enumerate(gt_index):
            own = (gt.image_index == i).nonzero().squeeze(1)
            if len(own):
                best, label = match(pairwise_iou(Boxes(gt.boxes[own]), Boxes(anchors.boxes)))
                row[label == 1] = own[best[label == 1]]
                row[label == -1] = IGNORE
        return Assignment(gt_index)
