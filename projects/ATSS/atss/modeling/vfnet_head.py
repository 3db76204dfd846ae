"""VarifocalNet's head (arXiv 2008.13367, section 3.2): a coarse box, features at nine points of it,
and from these the classes and a fine box."""

import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import UserError, check_choice, check_range
from ..structures import HeadOutput
from .box_coding import BoxCode, LogDistances
from .deform_conv import DeformConv
from .head import NORMS, Scale, flatten_levels, initialise, make_tower, run_tower
from .level_copies import PerLevel, for_levels


def star_offsets(distances: Tensor) -> Tensor:
    """Return offsets that move the taps of a 3 x 3 convolution to the location, the four corners of
    its box, and the points of its sides straight above, below and beside.

    Args:
        distances: (N, 4, H, W) to left, top, right and bottom, in pixels of the map.

    Returns:
        (N, 18, H, W): (y, x) of each tap.
    """
    left, top, right, bottom = distances.unbind(1)
    zero = torch.zeros_like(left)
    columns, rows = (-left, zero, right), (-top, zero, bottom)
    points = [
        value
        for i, y in enumerate(rows)
        for j, x in enumerate(columns)
        for value in (y - (i - 1), x - (j - 1))
    ]
    return torch.stack(points, dim=1)


class VFNetHead(nn.Module):
    """Head with the outputs "coarse", without classes, and "fine". The box regression is
    logarithms of distances (:class:`~.box_coding.LogDistances`).

    Other arguments and attributes are as for :class:`~atss.modeling.ATSSHead`.

    Args:
        input_shape: of each level, for its stride.
        num_convs: convolutions per tower, without the additional one of the coarse box.
        deform: version of the last convolution of each tower, "v1" or "v2"; "": not deformable.
        initial_distance: from the location to each side of the coarse box at initialisation, in
            strides.
        through_points: share of the gradient of the nine points that reaches the coarse box.

    Raises:
        UserError: for another code than logarithms of distances.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        code: BoxCode | None = None,
        num_convs: int = 3,
        norm: str = "GN",
        tower_bias: bool = True,
        prior_prob: float = 0.01,
        deform: str = "",
        initial_distance: float = 8.0,
        through_points: float = 0.1,
    ):
        super().__init__()
        check_range("num_convs", num_convs, 0)
        check_range("prior_prob", prior_prob, 1e-9, 1 - 1e-9)
        check_range("initial_distance", initial_distance, 1e-3, 1e3)
        check_range("through_points", through_points, 0, 1)
        check_choice("norm", norm, NORMS)
        check_choice("deform", deform, ("v1", "v2", ""))
        if code is not None and code.form != LogDistances.form:
            raise UserError("it predicts log distances: set MODEL.ATSS.REGRESSION log_point")
        if deform and not num_convs:
            raise UserError("MODEL.ATSS.DEFORM_TOWER needs a tower of at least one convolution")
        self.strides: list[int] = [x.stride for x in input_shape]  # type: ignore[misc]
        self.num_classes, self.through_points = num_classes, through_points
        self.initial_distance = initial_distance
        self.class_layers = {"cls_score": 1}
        levels = len(self.strides)
        tower = (in_channels, levels, num_convs, norm, tower_bias)
        deformable = {num_convs - 1: deform} if deform else None
        self.cls_subnet = make_tower(*tower, deformable)
        self.bbox_subnet = make_tower(*tower, deformable)
        self.bbox_conv = make_tower(in_channels, levels, 1, norm, tower_bias)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.scales = PerLevel(Scale() for _ in range(levels))
        self.refine_conv, self.cls_conv = (
            DeformConv(nn.Parameter(torch.empty(in_channels, in_channels, 3, 3)), padding=1)
            for _ in range(2)
        )
        self.refine_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.refine_scales = PerLevel(Scale() for _ in range(levels))
        self.cls_score = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        initialise(self, prior_prob, self.cls_score)

    def forward(self, features: Sequence[Tensor]) -> Mapping[str, HeadOutput]:
        copies = for_levels(len(features), self, precise=(self.bbox_pred, self.refine_pred))
        predicted = [copies[level][0]._predict(x, level) for level, x in enumerate(features)]
        coarse, fine, classes = zip(*predicted, strict=True)
        logits = flatten_levels(classes, self.num_classes)
        return {
            "coarse": HeadOutput(None, flatten_levels(coarse, 4), None),
            "fine": HeadOutput(logits, flatten_levels(fine, 4), None),
        }

    def _predict(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return coarse and fine box regression (N, 4, H, W) and class logits (N, K, H, W)."""
        cls_feature = run_tower(self.cls_subnet, x, level)
        box_feature = run_tower(self.bbox_subnet, x, level)
        stride = self.strides[level]
        first = self._in_float32(self.bbox_pred, run_tower(self.bbox_conv, box_feature, level))
        coarse = self.scales[level](first) + math.log(self.initial_distance * stride)
        distances = coarse.clamp(max=LogDistances.MAX_LOG).exp() / stride
        share = self.through_points
        offsets = star_offsets((1 - share) * distances.detach() + share * distances)
        change = self._in_float32(self.refine_pred, self.refine_conv(box_feature, offsets).relu())
        fine = self.refine_scales[level](change) + coarse.detach()
        classes = self.cls_score(self.cls_conv(cls_feature, offsets).relu())
        return coarse, fine, classes

    @staticmethod
    def _in_float32(predictor: nn.Conv2d, x: Tensor) -> Tensor:
        """Predict without autocast: a logarithm in bfloat16 moves a side by whole pixels."""
        with torch.autocast(x.device.type, enabled=False):
            return predictor(x.to(predictor.weight.dtype))
