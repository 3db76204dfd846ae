"""From outputs and an assignment to the losses. All normalisers live here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from ..anchors import Anchors
from ..geometry import centerness, centres, side_distances
from ..losses import giou_loss, sigmoid_focal_loss
from ..structures import IGNORE, Assignment, GroundTruth, HeadOutput

# (deltas, boxes that they decode to, target boxes, anchors), (N, R, 4) each -> (N, R) losses.
BoxLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class OnBoxes:
    """A loss of decoded boxes against target boxes."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, deltas: Tensor, boxes: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
        return self.loss(boxes, targets)


@dataclass(frozen=True)
class OnDeltas:
    """A loss of deltas against encoded targets, the mean of four."""

    loss: Callable[[Tensor, Tensor], Tensor]
    encode: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, deltas: Tensor, boxes: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
        return self.loss(deltas, self.encode(targets, anchors)).mean(-1)


class Criterion:
    """Losses of a dense detector, for any rule that chooses the samples.

    With W processes, and sums over the batch of one process:

        N_pos = max(positives of all processes, 1) / W
        w     = box weight * centerness target (1 where the head predicts none)
        S_w   = max(w of all processes, 1e-6) / W

        loss_cls        = sum of focal losses / N_pos
        loss_box_reg    = box_loss_weight * sum of w * box loss / S_w
        loss_centerness = sum of binary cross entropies on positives / N_pos

    DDP averages gradients over processes, so that W of them equal one on the union of their images.
    (The authors clamp N_pos after dividing by W; that differs only with fewer positives than
    processes.) A batch without objects is an ordinary batch. No host synchronisation: shapes do
    not depend on the assignment.

    Args:
        box_loss: what a predicted box costs; GIoU by default.
        box_loss_weight: of the box loss against the other two.
        focal_alpha, focal_gamma: of the focal loss.
    """

    def __init__(
        self,
        *,
        box_loss: BoxLoss | None = None,
        box_loss_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        self.box_loss = box_loss or OnBoxes(giou_loss)
        self.box_loss_weight = box_loss_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    def __call__(
        self,
        output: HeadOutput,
        boxes: Tensor,
        anchors: Anchors,
        gt: GroundTruth,
        assignment: Assignment,
    ) -> dict[str, Tensor]:
        """
        Args:
            output: the head's, in float32.
            boxes: (N, R, 4), its deltas decoded, in pixels.
        Returns:
            scalar losses by name.

        Raises:
            ValueError: for class targets between 0 and 1, which the focal loss is wrong for. Only
                on a CPU: to look would make the host wait for a GPU.
        """
        _refuse_soft(assignment.cls_target)
        positive = assignment.positive
        classes, target_boxes = self._targets(anchors, gt, assignment)
        # What does not count is replaced, not multiplied by zero: it may be infinite. Away from
        # positives both boxes are the anchor.
        counts = assignment.gt_index != IGNORE
        logits = torch.where(counts[..., None], output.logits, 0)
        boxes = torch.where(positive[..., None], boxes, anchors.boxes)
        deltas = torch.where(positive[..., None], output.deltas, 0)

        box_weight = assignment.box_weight * positive
        if output.quality is not None:
            distances = side_distances(centres(anchors.boxes), target_boxes)
            centerness_target = centerness(distances)
            box_weight = box_weight * centerness_target
        num_positives, weight_sum = _average_over_processes(positive.sum(), box_weight.sum())

        cls_target = torch.zeros_like(output.logits)
        cls_target.scatter_(2, classes[..., None], (assignment.cls_target * positive)[..., None])
        cls_loss = sigmoid_focal_loss(logits, cls_target, self.focal_alpha, self.focal_gamma)
        cls_loss = cls_loss.sum(dim=2) * counts
        box_loss = self.box_loss(deltas, boxes, target_boxes, anchors.boxes) * box_weight
        losses = {
            "loss_cls": cls_loss.sum() / num_positives,
            "loss_box_reg": self.box_loss_weight * box_loss.sum() / weight_sum,
        }
        if output.quality is not None:
            quality = torch.where(positive, output.quality, 0)
            quality_loss = F.binary_cross_entropy_with_logits(
                quality, centerness_target, reduction="none"
            )
            losses["loss_centerness"] = (quality_loss * positive).sum() / num_positives
        return losses

    @staticmethod
    def _targets(
        anchors: Anchors, gt: GroundTruth, assignment: Assignment
    ) -> tuple[Tensor, Tensor]:
        """(N, R) class and (N, R, 4) box of each anchor's object; where it has none, class 0 and
        the anchor itself."""
        shape = (*assignment.gt_index.shape, 4)
        if len(gt) == 0:
            return torch.zeros_like(assignment.gt_index), anchors.boxes.expand(shape)
        index = assignment.gt_index.clamp(min=0)
        boxes = torch.where(assignment.positive[..., None], gt.boxes[index], anchors.boxes)
        return gt.classes[index], boxes


def _refuse_soft(cls_target: Tensor) -> None:
    if cls_target.device.type == "cpu":
        soft = (cls_target != 0) & (cls_target != 1)
        if soft.any():
            raise ValueError(
                f"Assignment.cls_target holds {cls_target[soft][0].item():g}, but the focal loss "
                "is for class targets 0 and 1"
            )


def _average_over_processes(num_positives: Tensor, weight_sum: Tensor) -> tuple[Tensor, Tensor]:
    """N_pos and S_w of the formula above, by one all-reduce."""
    world_size = comm.get_world_size()
    sums = torch.stack([num_positives.to(weight_sum.dtype), weight_sum])
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    num_positives, weight_sum = sums.unbind()
    return num_positives.clamp(min=1) / world_size, weight_sum.clamp(min=1e-6) / world_size
