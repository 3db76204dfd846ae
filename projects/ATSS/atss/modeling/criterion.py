"""Criterion: from the head's output and an assignment to the losses. All normalisers are here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ..anchors import Anchors
from ..errors import UserError, WrongValue, check_range, check_shape
from ..losses import Focal
from ..structures import IGNORE, Assignment, GroundTruth, HeadOutput, Matched
from .terms import GIoULoss, central, one, positives

PerAnchor = Callable[[Matched], Tensor]  # -> (N, R), or a shape that broadcasts to it
FOCAL = Focal()


class Quotient(NamedTuple):
    """A loss before its division by max(``amount`` of all processes, ``least``).

    Attributes:
        total, amount: scalars of this process: weighted sum over the batch, and normaliser.
    """

    total: Tensor
    amount: Tensor
    least: float


class Criterion(nn.Module):
    """Losses of a dense detector, for any assigner.

    With W processes, and sums over the batch of one process:

        N = max(normaliser of all processes, least) / W       default: positives, least 1
        w = box weight of each positive                       default: quality target
        S = max(w of all processes, box_least) / W

        loss_cls       = sum of class losses / N
        loss_box_reg   = weight * sum of w * box loss / S     first box term; the others are
                                                              loss_<name>
        loss_<quality> = quality_weight * sum of binary cross entropies on positives / N

    DDP averages gradients over processes, so W processes equal one process on the union of their
    images. (The authors of ATSS clamp N after dividing by W; that differs only with fewer positives
    than processes.) Shapes do not depend on the assignment, so the host never waits for a GPU.

    Args:
        cls_loss: (probability, cross entropy, targets), (N, R, K) each -> (N, R, K). None, or an
            output without classes: no class loss. Its method ``target_of``, if defined, transforms
            the class targets of positives.
        cls_target: (N, R) target of the object's class at positives. It may be between 0 and 1,
            unless the function has ``hard_targets = True``.
        box_terms: {name: loss}, each Matched -> (N, R), with an optional attribute ``weight``.
        box_weight: of each positive in the box terms. None: the quality target, or 1 without
            quality.
        quality: (N, R) target of the quality branch. None, or a head without the branch: no
            quality loss.
        quality_name, quality_weight: suffix of the quality loss's name, and its factor.
        normaliser: (matched, class targets) -> scalar, for class and quality losses.
        least: lower bound of the normaliser.
        box_least: lower bound of the sum of box weights.
        least_per_image: whether both bounds are multiplied by the number of images.
        level_weight: Matched -> (R,) factor of all losses of an anchor; None: 1. It may be a module
            with buffers, and shared with another criterion.

    Raises:
        UserError: if soft class targets meet a class loss with ``hard_targets``.
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
                "may be between 0 and 1, but the class loss takes only targets 0 and 1: choose a "
                "MODEL.ATSS.CLS_LOSS such as quality_focal, or give a target of 0 and 1 the "
                "attribute hard_targets = True",
            )
        self.cls_loss, self.cls_target = cls_loss, cls_target
        self.box_terms = {"giou": GIoULoss()} if box_terms is None else dict(box_terms)
        for name in self.box_terms:
            if name in ("cls", "box_reg", quality_name):
                raise UserError(f"box loss {name!r} has the name of another loss: rename it")
        # Registers the buffers of terms that are modules.
        modules = {k: x for k, x in self.box_terms.items() if isinstance(x, nn.Module)}
        self.term_modules = nn.ModuleDict(modules)
        self.box_weight = box_weight
        self.quality, self.quality_name = quality, quality_name
        self.quality_weight = quality_weight
        self.normaliser = normaliser
        self.least, self.least_per_image, self.box_least = least, least_per_image, box_least
        self.level_weight = level_weight

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """Return the scalar losses by name; arguments as for :meth:`quotients`."""
        return divide(self.quotients(*args))

    def quotients(
        self,
        output: HeadOutput,
        boxes: Tensor,
        anchors: Anchors,
        gt: GroundTruth,
        assignment: Assignment,
    ) -> dict[str, Quotient]:
        """Return the losses by name, before their division.

        Args:
            output: in float32.
            boxes: (N, R, 4) decoded boxes.
        """
        matched = _match(output, boxes, anchors, gt, assignment)
        level_weight = 1 if self.level_weight is None else self.level_weight(matched)
        cls_target = self.cls_target(matched)
        amount = self.normaliser(matched, cls_target)
        images = gt.num_images * _num_processes() if self.least_per_image else 1
        least, box_least = self.least * images, self.box_least * images
        losses: dict[str, Quotient] = {}

        total = self._class_loss(matched, cls_target, level_weight)
        if total is not None:
            losses["loss_cls"] = Quotient(total, amount, least)

        quality_target = None
        if self.quality is not None and output.quality is not None:
            quality_target = self.quality(matched)
        weight = matched.positive.float()
        if self.box_weight is not None:
            weight = weight * self.box_weight(matched)
        elif quality_target is not None:
            weight = weight * quality_target
        for name, total in self._box_losses(matched, weight, level_weight).items():
            losses[name] = Quotient(total, weight.sum(), box_least)

        if output.quality is not None and quality_target is not None:
            total = self._quality_loss(matched, output.quality, quality_target, level_weight)
            losses[f"loss_{self.quality_name}"] = Quotient(total, amount, least)

        if not losses:
            raise UserError("a branch has no loss: of classes, of boxes or of quality")
        # DDP on GPUs waits for every gradient: outputs without a loss get a gradient of zero.
        predicted = (output.classes, output.box_regression, output.quality)
        used = (self.cls_loss is not None, bool(self.box_terms), quality_target is not None)
        for x, is_used in zip(predicted, used, strict=True):
            if x is not None and not is_used:
                name, first = next(iter(losses.items()))
                losses[name] = first._replace(total=first.total + x[:0].sum())
        return losses

    def _class_loss(
        self, matched: Matched, cls_target: Tensor, level_weight: Tensor | int
    ) -> Tensor | None:
        """Sum the class losses of all anchors that are not ignored."""
        cls_loss, classes = self.cls_loss, matched.whole_output.classes
        if cls_loss is None or classes is None:
            return None
        target_of = getattr(cls_loss, "target_of", None)
        if target_of is not None:
            cls_target = torch.where(matched.positive, target_of(cls_target), 0)
        targets = torch.zeros_like(classes)
        targets.scatter_(2, matched.target_classes[..., None], cls_target[..., None])
        entropy = matched.output.cross_entropy(targets)
        loss = cls_loss(matched.output.probability(), entropy, targets)
        name = getattr(cls_loss, "__name__", type(cls_loss).__name__)
        check_shape(f"the class loss {name}", loss, classes.shape, broadcasts=False)
        return (loss.sum(dim=2) * matched.not_ignored * level_weight).sum()

    def _box_losses(
        self, matched: Matched, weight: Tensor, level_weight: Tensor | int
    ) -> dict[str, Tensor]:
        """Sum each box term over the positives, with (N, R) weights."""
        totals = {}
        for i, (name, term) in enumerate(self.box_terms.items()):
            loss = term(matched)
            check_shape(f"the box loss {name!r}", loss, weight.shape)
            total = (loss * weight * level_weight).sum()
            logged = "loss_box_reg" if i == 0 else f"loss_{name}"
            totals[logged] = getattr(term, "weight", 1.0) * total
        return totals

    def _quality_loss(
        self, matched: Matched, logits: Tensor, target: Tensor, level_weight: Tensor | int
    ) -> Tensor:
        """Sum the binary cross entropies of the quality branch over the positives."""
        # Not matched.output.quality, which would copy the classes, too.
        logits = torch.where(matched.positive, logits, 0)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return self.quality_weight * (loss * matched.positive * level_weight).sum()


def divide(quotients: Mapping[str, Quotient]) -> dict[str, Tensor]:
    """Return the losses, with one all-reduce for all normalisers. Without gradients, as in
    validation, the normalisers of this process are used: other processes need not take part."""
    world_size = _num_processes()
    amounts = torch.stack([x.amount.to(x.total.dtype) for x in quotients.values()])
    if world_size > 1:
        torch.distributed.all_reduce(amounts)
    return {
        name: x.total / (amount.clamp(min=x.least) / world_size)
        for (name, x), amount in zip(quotients.items(), amounts.unbind(), strict=True)
    }


def _num_processes() -> int:
    return comm.get_world_size() if torch.is_grad_enabled() else 1


def _match(
    output: HeadOutput, boxes: Tensor, anchors: Anchors, gt: GroundTruth, assignment: Assignment
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
        not_ignored=assignment.gt_index != IGNORE,
        boxes=torch.where(positive[..., None], boxes, anchors.boxes),
        anchors=anchors,
        target_classes=target_classes,
        target_boxes=target_boxes,
        positive=positive,
        score=None if score is None else torch.where(positive, score, 0),
    )
