"""From outputs and an assignment to the losses. All normalisers live here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ..anchors import Anchors
from ..errors import UserError, WrongValue, check_range
from ..losses import Focal
from ..structures import IGNORE, Assignment, GroundTruth, HeadOutput, Matched
from .terms import GIoULoss, central, one, positives

PerAnchor = Callable[[Matched], Tensor]  # -> (N, R), or what can be multiplied by it
FOCAL = Focal()


class Quotient(NamedTuple):
    """A loss before it is divided: ``total / max(amount, least)``.

    Attributes:
        total: scalar sum over the batch of this process, weighted.
        amount: scalar, what it is divided by; of all processes.
        least: of all processes.
    """

    total: Tensor
    amount: Tensor
    least: float


class Criterion(nn.Module):
    """Losses of a dense detector, for any rule that chooses the samples.

    With W processes, and sums over the batch of one process:

        N = max(normaliser of all processes, least) / W       by default of the positives, least 1
        w = box weight of each positive                       by default the quality target
        S = max(w of all processes, box_least) / W

        loss_cls       = sum of class losses / N
        loss_box_reg   = weight * sum of w * box loss / S     of the first box term; of others
                                                              loss_<name>
        loss_<quality> = quality_weight * sum of binary cross entropies on positives / N

    DDP averages gradients over processes, so that W of them equal one on the union of their images.
    (The authors of ATSS clamp N after dividing by W; that differs only with fewer positives than
    processes.) A batch without objects is an ordinary batch. No host synchronisation: shapes do
    not depend on the assignment.

    Args:
        cls_loss: (probability, cross entropy, targets), (N, R, K) each -> (N, R, K); None, or an
            output without classes, for no loss of them. If it has a method ``target_of``, positives
            are to say what that makes of class targets.
        cls_target: what the class of a positive's object is to say, (N, R); other classes, and
            negatives, are to say 0. It may be between 0 and 1, if it has no attribute
            ``hard_targets`` that is true.
        box_terms: {name: loss}, each Matched -> (N, R), with its ``weight`` if it has one.
        box_weight: of each positive in the box terms; None for what its quality is to be, or 1
            where the head predicts none.
        quality: what the quality branch is to say, (N, R); None, or a head without the branch, for
            no loss of it.
        quality_name: in the name of its loss.
        quality_weight: of its loss against the others.
        normaliser: (matched, class targets) -> scalar, of class and quality losses.
        least, least_per_image: its lower bound, for the batch or for each image of it.
        box_least: lower bound of the sum of box weights.
        level_weight: Matched -> (R,), by which all losses of an anchor are multiplied; None for 1.
            It may be a module with buffers, and that of another criterion, too.

    Raises:
        ValueError: if the class target may be between 0 and 1, but the class loss has
            ``hard_targets``.
    """

    def __init__(
        self,
        *,
        cls_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = FOCAL,
        cls_target: PerAnchor = one,
        box_terms: Mapping[str, PerAnchor] | None = None,
        box_weight: PerAnchor | None = None,
        quality: PerAnchor | None = central,
        quality_name: str = "centerness",
        quality_weight: float = 1.0,
        normaliser: Callable[[Matched, Tensor], Tensor] = positives,
        least: float = 1.0,
        least_per_image: bool = False,
        box_least: float = 1e-6,
        level_weight: PerAnchor | None = None,
    ):
        super().__init__()
        check_range("quality_weight", quality_weight, 0, 1e6)
        check_range("least", least, 1e-12)
        check_range("box_least", box_least, 1e-12)
        hard = cls_target is one or getattr(cls_target, "hard_targets", False)
        if getattr(cls_loss, "hard_targets", False) and not hard:
            raise WrongValue(
                "cls_target",
                "may be between 0 and 1, but the class loss is for targets 0 and 1: choose a "
                "MODEL.ATSS.CLS_LOSS such as quality_focal, or give a target of 0 and 1 the "
                "attribute hard_targets = True",
            )
        self.cls_loss, self.cls_target = cls_loss, cls_target
        self.box_terms = {"giou": GIoULoss()} if box_terms is None else dict(box_terms)
        for name in self.box_terms:
            if name in ("cls", "box_reg", quality_name):
                raise UserError(f"a box term cannot be called {name!r}: another loss is")
        # Known as modules, for what they may hold.
        held = {k: x for k, x in self.box_terms.items() if isinstance(x, nn.Module)}
        self.term_modules = nn.ModuleDict(held)
        self.box_weight = box_weight
        self.quality, self.quality_name = quality, quality_name
        self.quality_weight = quality_weight
        self.normaliser = normaliser
        self.least, self.least_per_image, self.box_least = least, least_per_image, box_least
        self.level_weight = level_weight

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """Scalar losses by name; arguments of :meth:`quotients`."""
        return divide(self.quotients(*args))

    def quotients(
        self,
        output: HeadOutput,
        boxes: Tensor,
        anchors: Anchors,
        gt: GroundTruth,
        assignment: Assignment,
    ) -> dict[str, Quotient]:
        """
        Args:
            output: the head's, in float32.
            boxes: (N, R, 4), its numbers decoded, in pixels.
        Returns:
            the losses by name, not yet divided.
        """
        counts = assignment.gt_index != IGNORE
        matched = _match(output, boxes, anchors, gt, assignment, counts)
        positive, found = matched.positive, {}
        level_weight = 1 if self.level_weight is None else self.level_weight(matched)
        cls_target = self.cls_target(matched)
        amount = self.normaliser(matched, cls_target)
        images = gt.num_images * _processes() if self.least_per_image else 1

        if self.cls_loss is not None and output.classes is not None:
            target_of = getattr(self.cls_loss, "target_of", None)
            said = cls_target
            if target_of is not None:
                said = torch.where(positive, target_of(cls_target), 0)
            targets = torch.zeros_like(output.classes)
            targets.scatter_(2, matched.target_classes[..., None], said[..., None])
            entropy = matched.output.cross_entropy(targets)
            cls_loss = self.cls_loss(matched.output.probability(), entropy, targets)
            cls_loss = cls_loss.sum(dim=2) * counts * level_weight
            found["loss_cls"] = Quotient(cls_loss.sum(), amount, self.least * images)

        quality_target = None
        if self.quality is not None and output.quality is not None:
            quality_target = self.quality(matched)
        weight = positive.float()
        if self.box_weight is not None:
            weight = weight * self.box_weight(matched)
        elif quality_target is not None:
            weight = weight * quality_target
        for i, (name, term) in enumerate(self.box_terms.items()):
            total = getattr(term, "weight", 1.0) * (term(matched) * weight * level_weight).sum()
            logged = "loss_box_reg" if i == 0 else f"loss_{name}"
            found[logged] = Quotient(total, weight.sum(), self.box_least)

        if output.quality is not None and quality_target is not None:
            quality = torch.where(positive, output.quality, 0)
            quality_loss = F.binary_cross_entropy_with_logits(
                quality, quality_target, reduction="none"
            )
            total = self.quality_weight * (quality_loss * positive * level_weight).sum()
            found[f"loss_{self.quality_name}"] = Quotient(total, amount, self.least * images)
        if not found:
            raise UserError("a branch has no loss: of classes, of boxes or of quality")
        # What no loss reads has a gradient of zero all the same, for DDP on GPUs waits for it.
        read = (self.cls_loss is not None, bool(self.box_terms), quality_target is not None)
        for x, is_read in zip(output[:3], read, strict=True):
            if x is not None and not is_read:
                name, first = next(iter(found.items()))
                found[name] = first._replace(total=first.total + x[:0].sum())
        return found


def divide(quotients: Mapping[str, Quotient]) -> dict[str, Tensor]:
    """The losses, divided by what all processes have; one all-reduce for all of them. Without
    gradient, as when somebody measures them on other images, by what this one has: others need not
    do the same now."""
    world_size = _processes()
    amounts = torch.stack([x.amount.to(x.total.dtype) for x in quotients.values()])
    if world_size > 1:
        torch.distributed.all_reduce(amounts)
    return {
        name: x.total / (amount.clamp(min=x.least) / world_size)
        for (name, x), amount in zip(quotients.items(), amounts.unbind(), strict=True)
    }


def _processes() -> int:
    """So many share the normalisers."""
    return comm.get_world_size() if torch.is_grad_enabled() else 1


def _match(
    output: HeadOutput,
    boxes: Tensor,
    anchors: Anchors,
    gt: GroundTruth,
    assignment: Assignment,
    counts: Tensor,
) -> Matched:
    positive, score = assignment.positive, assignment.score
    if len(gt):
        index = assignment.gt_index.clamp(min=0)
        target_boxes = torch.where(positive[..., None], gt.boxes[index], anchors.boxes)
        target_classes = gt.classes[index]
    else:
        target_boxes = anchors.boxes.expand(*positive.shape, 4)
        target_classes = torch.zeros_like(assignment.gt_index)
    return Matched(
        whole_output=output,
        counts=counts,
        boxes=torch.where(positive[..., None], boxes, anchors.boxes),
        anchors=anchors,
        target_classes=target_classes,
        target_boxes=target_boxes,
        positive=positive,
        score=None if score is None else torch.where(positive, score, 0),
    )
