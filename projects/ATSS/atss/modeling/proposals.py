"""A rule, or a whole detector, as the first stage of Detectron2's detectors of two stages."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..anchors import Anchors, GridAnchorGenerator
from ..errors import UserError, WrongValue, check_range
from ..structures import GroundTruth, HeadOutput
from .box_coding import BoxCode
from .branch import Branch, Branches, decode
from .head import flatten_levels
from .postprocess import root

# Keeps the logits of scores 0 and 1 finite.
EPS = 1e-12


class RPNHead(StandardRPNHead):
    """Detectron2's head of the region proposal network, with its names and initial weights: one
    convolution, and predictors of 1 x 1. It predicts one class.

    Args:
        in_channels, num_classes, num_anchors, box_channels, box_bias: as for ATSSHead.
        conv_dims: channels of each convolution; -1 for ``in_channels``.
        prior_prob: class probability at initialisation; 0.01 for a focal loss of all background.

    Raises:
        UserError: for several classes.
    """

    # Rows by class: none.
    class_layers: ClassVar[Mapping[str, int]] = {}

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_anchors: int,
        box_channels: int = 4,
        box_bias: float = 0.0,
        conv_dims: Sequence[int] = (-1,),
        prior_prob: float = 0.5,
    ):
        check_range("prior_prob", prior_prob, 1e-9, 1 - 1e-9)
        check_range("conv_dims", conv_dims, -1)
        if num_classes != 1:
            raise WrongValue("num_classes", f"of RPNHead must be 1, got {num_classes}")
        super().__init__(
            in_channels=in_channels,
            num_anchors=num_anchors,
            box_dim=box_channels,
            conv_dims=list(conv_dims),
        )
        self.box_channels = box_channels
        nn.init.constant_(self.objectness_logits.bias, math.log(prior_prob / (1 - prior_prob)))
        nn.init.constant_(self.anchor_deltas.bias, box_bias)

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Return the predictions for all R anchors, from L maps (N, C, H_l, W_l)."""
        logits, box_regression = super().forward(features)
        return HeadOutput(
            flatten_levels(logits, 1), flatten_levels(box_regression, self.box_channels), None
        )


class ATSSProposals(nn.Module):
    """Proposal generator for Detectron2's GeneralizedRCNN and ProposalNetwork: a head with rule and
    criterion. Proposals are selected as in Detectron2's RPN.

    Args:
        head: L feature maps -> HeadOutput, as in ATSSDetector.
        branches, inference, anchor_generator, box_coder: as in ATSSDetector.
        num_classes: of the head; 1 for proposals of any class.
        in_features: names of the levels, fine to coarse.
        score: (class probability, quality) -> score.
        pre_nms_topk, post_nms_topk: proposals per level before and per image after NMS, in training
            and in testing.
        nms_thresh: IoU of NMS, which never compares two levels; 1 for no NMS.
        min_size: proposals have greater sides, in pixels of the network's input.
    """

    def __init__(
        self,
        *,
        head: nn.Module,
        branches: Mapping[str, Branch],
        inference: str = "main",
        anchor_generator: GridAnchorGenerator,
        box_coder: BoxCode,
        num_classes: int,
        in_features: Sequence[str],
        score: Callable[[Tensor, Tensor], Tensor] = root,
        pre_nms_topk: tuple[int, int] = (2000, 1000),
        post_nms_topk: tuple[int, int] = (1000, 1000),
        nms_thresh: float = 0.7,
        min_size: float = 0.0,
    ):
        super().__init__()
        check_range("pre_nms_topk", pre_nms_topk, 1)
        check_range("post_nms_topk", post_nms_topk, 1)
        check_range("nms_thresh", nms_thresh, 0, 1)
        check_range("min_size", min_size, 0)
        # Detectron2's name: weights of its RPN load.
        self.rpn_head = head
        self.branches = Branches(branches, inference)
        if num_classes == 1:
            # Loading weights of other classes drops class layers without a row for each class.
            for module in self.modules():
                if hasattr(module, "class_layers"):
                    module.class_layers = {}  # type: ignore[assignment]
        self.anchor_generator, self.box_coder = anchor_generator, box_coder
        self.num_classes, self.in_features = num_classes, list(in_features)
        self.score = score
        self.pre_nms_topk, self.post_nms_topk = pre_nms_topk, post_nms_topk
        self.nms_thresh, self.min_size = nms_thresh, min_size

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        gt_instances: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the proposals of each image, best first, and in training the losses.

        Args:
            images: of which the sizes are read.
            gt_instances: objects of each image, in training.

        Returns:
            Instances with proposal_boxes and objectness_logits, without gradient; losses with
                "rpn" in their names, because Detectron2 joins them with those of the ROI heads.

        Raises:
            UserError: if objects are missing in training.
            FloatingPointError: if a proposal is not finite in training.
        """
        maps = [features[name] for name in self.in_features]
        outputs = self.branches.outputs(self.rpn_head, maps, self.training)
        anchors = self.anchor_generator.grid(maps)
        losses = {}
        if self.training:
            if gt_instances is None:
                raise UserError("training needs images with instances")
            gt = GroundTruth.from_instances(gt_instances)
            if self.num_classes == 1:
                gt = replace(gt, classes=torch.zeros_like(gt.classes))
            losses = self.branches.losses(self.box_coder, outputs, anchors, gt)
        proposals = self._select(outputs[self.branches.inference], anchors, images.image_sizes)
        return proposals, {_rename(name): loss for name, loss in losses.items()}

    @torch.no_grad()
    def _select(
        self, output: HeadOutput, anchors: Anchors, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        with torch.autocast(anchors.boxes.device.type, enabled=False):
            output, boxes = decode(self.box_coder, output, anchors)
            logits = self._objectness(output)
        is_test = int(not self.training)
        return find_top_rpn_proposals(
            list(boxes.split(anchors.per_level, dim=1)),
            list(logits.split(anchors.per_level, dim=1)),
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[is_test],
            self.post_nms_topk[is_test],
            self.min_size,
            self.training,
        )

    def _objectness(self, output: HeadOutput) -> Tensor:
        """Return the (N, R) logits of the scores of the best classes."""
        if output.quality is None and not output.probabilities and output.classes is not None:
            return output.classes.amax(dim=-1)
        score = output.confidence().double()
        if output.quality is not None:
            score = self.score(score, output.quality.double().sigmoid())
        return score.logit(EPS).float()


def _rename(loss: str) -> str:
    """Return the name of a loss of the first stage: Detectron2's names for class and box loss."""
    branch, slash, name = loss.rpartition("/")
    name = {"loss_box_reg": "loss_loc"}.get(name, name)
    return f"{branch}{slash}loss_rpn_{name.removeprefix('loss_')}"
