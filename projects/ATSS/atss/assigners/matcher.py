"""Detectron2's rule for the region proposal network, with its rounding."""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, pairwise_iou

from ..anchors import Anchors
from ..errors import Checked
from ..structures import BACKGROUND, IGNORE, Assignment, GroundTruth, Predictions
from .max_iou import check_thresholds


@dataclass(frozen=True)
class Matcher(Checked):
    """The rule of Detectron2's Matcher, on float32 IoUs of all anchors and objects.

    Many low-quality matches are ties that rounding decides: :class:`~atss.assigners.MaxIoU`, in
    float64, assigns other anchors.

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
        check_thresholds(type(self).__name__, self.background_below, self.positive_from)

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        gt_index = gt.image_index.new_full((gt.num_images, len(anchors.boxes)), BACKGROUND)
        if not len(gt):
            return Assignment(gt_index)
        iou = pairwise_iou(Boxes(gt.boxes), Boxes(anchors.boxes))
        image = gt.image_index[:, None].expand_as(iou)
        best = iou.new_full(gt_index.shape, -1).scatter_reduce_(0, image, iou, "amax")
        # The first of the best objects.
        objects = torch.arange(len(gt), device=iou.device)[:, None].expand_as(iou)
        objects = objects.where(iou == best.gather(0, image), len(gt))
        owner = torch.full_like(gt_index, len(gt)).scatter_reduce_(0, image, objects, "amin")
        positive = best >= self.positive_from
        if self.low_quality_matches:
            claims = (iou == iou.amax(dim=1, keepdim=True)).long()
            positive |= torch.zeros_like(gt_index).scatter_reduce_(0, image, claims, "amax") > 0
        gt_index.masked_fill_(best >= self.background_below, IGNORE)
        return Assignment(owner.where(positive, gt_index))
