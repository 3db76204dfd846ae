"""TOOD's head (arXiv 2108.07755, section 3.1): one stack of convolutions for both tasks, a mixture
of its layers for each, and an alignment of both predictions."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anchors import GridAnchorGenerator
from ..errors import UserError, WrongValue, check_choice, check_range
from ..structures import HeadOutput
from .box_coding import BoxCode, BoxDeltas, Corners, LogDistances, PointDistances
from .deform_conv import deform_conv
from .head import NORMS, Scale, flatten_levels, initialise, make_tower, norm_and_relu, run_tower
from .level_copies import PerLevel, for_levels

POINT = PointDistances()


class TaskDecomposition(nn.Module):
    """Features of a task: layers of the stack, weighted by attention and mixed by a convolution.
    Arguments are as for :func:`~atss.modeling.head.make_tower`."""

    # Width of a layer of the stack over that of the attention's hidden layer.
    REDUCTION = 8

    def __init__(self, channels: int, num_layers: int, num_levels: int, norm: str, bias: bool):
        super().__init__()
        wide, narrow = channels * num_layers, max(1, channels // self.REDUCTION)
        self.attention = nn.Sequential(
            nn.Conv2d(wide, narrow, 1), nn.ReLU(inplace=True), nn.Conv2d(narrow, num_layers, 1)
        )
        self.mixture = nn.Conv2d(wide, channels, 1, bias=bias or not norm)
        self.after = nn.Sequential(*norm_and_relu(channels, num_levels, norm))

    def forward(self, stack: Tensor, mean: Tensor, level: int) -> Tensor:
        """Return (N, C, H, W) features.

        Args:
            stack: (N, layers * C, H, W).
            mean: (N, layers * C, 1, 1), of the stack over the map.
        """
        attention = self.attention(mean).sigmoid()
        n, layers = attention.shape[:2]
        # The weights are scaled instead of the features, which are more.
        weight = self.mixture.weight.view(1, -1, layers, stack.shape[1] // layers)
        weight = (weight * attention.view(n, 1, layers, 1)).flatten(2)
        mixed = torch.bmm(weight.to(stack.dtype), stack.flatten(2)).unflatten(2, stack.shape[2:])
        if self.mixture.bias is not None:
            mixed = mixed + self.mixture.bias.to(mixed.dtype).view(-1, 1, 1)
        return run_tower(self.after, mixed, level)


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return sqrt(sigmoid(a) * sigmoid(b)), with finite gradients near 0."""
    return ((F.logsigmoid(a) + F.logsigmoid(b)) / 2).exp()


def sample_sides(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Sample each side of (N, 4, H, W) boxes at an offset, bilinearly. Boxes with crossing sides
    are returned unchanged.

    Args:
        boxes: corners, not relative to the location.
        offsets: (N, 8, H, W) (y, x) for each side, in pixels of the map.
    """
    geometry = (1, 1), (0, 0), (1, 1)
    moved = deform_conv(boxes, offsets, boxes.new_ones(4, 1, 1, 1), None, *geometry, None)
    crossed = (moved[:, :2] > moved[:, 2:]).any(dim=1, keepdim=True)
    return torch.where(crossed, boxes, moved)


class TOODHead(nn.Module):
    """Head that predicts class probabilities and corners (:class:`~.box_coding.Corners`).

    Other arguments and attributes are as for :class:`~atss.modeling.ATSSHead`.

    Args:
        anchor_generator: one anchor per location, for the inner box code.
        inner: box code of the boxes before the alignment.
        exponential: whether the box predictor predicts logarithms of the distances of ``inner``.
        num_convs: convolutions of the stack.
        num_deform: number of deformable convolutions, the first of the stack (version 2, four
            groups of channels).

    Raises:
        UserError: for several anchors per location, or box codes that do not fit.
    """

    # Stops exp() from overflowing; logarithm of a distance in strides.
    MAX_LOG = math.log(1 << 13)

    def __init__(
        self,
        *,
        in_channels: int,
        num_levels: int,
        num_classes: int,
        anchor_generator: GridAnchorGenerator,
        code: BoxCode | None = None,
        inner: BoxCode = POINT,
        exponential: bool = True,
        num_convs: int = 6,
        num_deform: int = 0,
        norm: str = "GN",
        tower_bias: bool = True,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        check_range("num_convs", num_convs, 1)
        check_range("num_deform", num_deform, 0, num_convs)
        check_range("prior_prob", prior_prob, 1e-9, 1 - 1e-9)
        check_choice("norm", norm, NORMS)
        if anchor_generator.num_anchors[0] > 1:
            raise UserError("it takes one anchor per location (ANCHOR_SCALES, ANCHOR_RATIOS)")
        if code is not None and code.form != Corners.form:
            raise UserError("it predicts corners: set MODEL.ATSS.REGRESSION corners")
        if inner.channels != 4 or inner.form == Corners.form:
            raise WrongValue("inner", f"cannot be {type(inner).__name__}: choose 'point' or 'box'")
        if exponential and inner.form in (BoxDeltas.form, LogDistances.form):
            raise WrongValue("exponential", f"must be False with {type(inner).__name__}, got True")
        self.num_classes, self.inner, self.exponential = num_classes, inner, exponential
        self.anchor_generator = anchor_generator
        self.class_layers = {"cls_score": 1}
        layer = (in_channels, num_levels, 1, norm, tower_bias)
        self.stack = nn.ModuleList(
            make_tower(*layer, {0: "v2"} if i < num_deform else None, deform_groups=4)
            for i in range(num_convs)
        )
        self.cls_decomposition, self.bbox_decomposition = (
            TaskDecomposition(in_channels, num_convs, num_levels, norm, tower_bias)
            for _ in range(2)
        )
        self.cls_score = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.scales = PerLevel(Scale() for _ in range(num_levels))
        self.cls_alignment, self.bbox_alignment = (
            nn.Sequential(
                nn.Conv2d(in_channels * num_convs, in_channels // 4, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(in_channels // 4, out, 3, padding=1),
            )
            for out in (1, 8)
        )
        initialise(self, prior_prob, self.cls_score, self.cls_alignment[-1])
        # Attention starts nearly even, offsets nearly 0.
        for module in (
            *self.cls_decomposition.attention.modules(),
            *self.bbox_decomposition.attention.modules(),
            *self.bbox_alignment.modules(),
        ):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        mixtures = self.cls_decomposition.mixture, self.bbox_decomposition.mixture
        precise = (self.bbox_pred, self.bbox_alignment[-1], *mixtures)
        copies = for_levels(len(features), self, precise=precise)
        predicted = [copies[level][0]._predict(x, level) for level, x in enumerate(features)]
        classes, regressions, offsets = zip(*predicted, strict=True)
        with torch.autocast(features[0].device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            box_regression = flatten_levels(regressions, 4)
            boxes = self.inner.decode(box_regression, anchors.boxes, anchors.stride)
            per_level = (boxes / anchors.stride[:, None]).split(anchors.per_level, dim=1)
            corners = [
                sample_sides(x.transpose(1, 2).unflatten(2, offset.shape[2:]), offset)
                for x, offset in zip(per_level, offsets, strict=True)
            ]
        return HeadOutput(
            flatten_levels(classes, self.num_classes), flatten_levels(corners, 4), None, True
        )

    def _predict(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 class probabilities (N, K, H, W), box regression of the inner code (N, 4,
        H, W) and offsets of the sides (N, 8, H, W)."""
        layers = []
        for layer in self.stack:
            x = run_tower(cast(nn.Sequential, layer), x, level)
            layers.append(x)
        stack = torch.cat(layers, dim=1)
        mean = stack.mean(dim=(2, 3), keepdim=True)
        logits = self.cls_score(self.cls_decomposition(stack, mean, level))
        alignment = self.cls_alignment(stack)
        box_feature = self.bbox_decomposition(stack, mean, level)
        offset_feature = self.bbox_alignment[:-1](stack)
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.bbox_pred.weight.dtype
            probabilities = geometric_mean(logits.to(dtype), alignment.to(dtype))
            sides = self.bbox_pred(box_feature.to(dtype))
            sides = sides.clamp(max=self.MAX_LOG).exp() if self.exponential else sides
            box_regression = self.scales[level](sides)
            offsets = self.bbox_alignment[-1](offset_feature.to(dtype))
        return probabilities, box_regression, offsets
