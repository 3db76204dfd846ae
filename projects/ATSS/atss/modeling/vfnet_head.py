"""VarifocalNet's head (arXiv 2008.13367, section 3.2): a first box, features at nine points of it,
and from these the classes and a finer box."""

import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import UserError, check_choice, check_range
from ..structures import HeadOutput
from .box_coding import BoxCode, LogDistances
from .deform_conv import DeformConv
from .head import NORMS, Scale, flatten_levels, initialise, make_tower, through
from .level_copies import PerLevel, for_levels


def star_offsets(distances: Tensor) -> Tensor:
    """Where the taps of a 3 x 3 convolution go so that they lie on the location, the four corners
    of its box, and its sides straight above, below and beside the location.

    Args:
        distances: (N, 4, H, W) to the left, top, right and bottom side, in pixels of the map.
    Returns:
        (N, 18, H, W) (y, x) of each tap, from where it lies in a plain convolution.
    """
    left, top, right, bottom = distances.unbind(1)
    here = torch.zeros_like(left)
    columns, rows = (-left, here, right), (-top, here, bottom)
    points = [
        value
        for i, y in enumerate(rows)
        for j, x in enumerate(columns)
        for value in (y - (i - 1), x - (j - 1))
    ]
    return torch.stack(points, dim=1)


class VFNetHead(nn.Module):
    """Two outputs, for branches to read: "coarse", without classes, and "fine". Numbers are
    logarithms of the distances in pixels from the anchor's centre to the sides (``log_point``).

    Args:
        in_channels: channels of every level.
        input_shape: of each level, for its stride.
        num_classes: K.
        code: that reads its numbers.
        num_convs: convolutions per tower; the one that the first box is predicted from is another.
        norm, tower_bias, prior_prob: as of :class:`~atss.modeling.ATSSHead`.
        deform: version of the deformable convolution that is the last of each tower; "" for none.
        reach: strides to a side of the first box at initialisation.
        through_points: how much of the gradient of the nine points goes to the first box.

    Attributes:
        class_layers: as of :class:`~atss.modeling.ATSSHead`.

    Raises:
        ValueError: for a code that does not read such logarithms, or towers of nothing that are to
            be deformable.
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
        reach: float = 8.0,
        through_points: float = 0.1,
    ):
        super().__init__()
        check_range("num_convs", num_convs, 0)
        check_range("prior_prob", prior_prob, 1e-9, 1 - 1e-9)
        check_range("reach", reach, 1e-3, 1e3)
        check_range("through_points", through_points, 0, 1)
        check_choice("norm", norm, NORMS)
        check_choice("deform", deform, ("v1", "v2", ""))
        if not isinstance(code, LogDistances | None):
            raise UserError(
                "its boxes are logarithms of distances: set MODEL.ATSS.REGRESSION log_point"
            )
        if deform and not num_convs:
            raise UserError("a tower without convolutions has none to be deformable")
        self.strides: list[int] = [x.stride for x in input_shape]  # type: ignore[misc]
        self.num_classes, self.reach, self.through_points = num_classes, reach, through_points
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
        """L feature maps (N, C, H_l, W_l) -> predictions for all R anchors, by name."""
        copies = for_levels(len(features), self, precise=(self.bbox_pred, self.refine_pred))
        found = [copies[level][0]._of_level(x, level) for level, x in enumerate(features)]
        coarse, fine, classes = zip(*found, strict=True)
        first = HeadOutput(None, flatten_levels(coarse, 4), None)
        second = HeadOutput(
            flatten_levels(classes, self.num_classes), flatten_levels(fine, 4), None
        )
        return {"coarse": first, "fine": second}

    def _of_level(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """First and finer logarithms (N, 4, H, W), and class logits (N, K, H, W)."""
        cls_feature = through(self.cls_subnet, x, level)
        box_feature = through(self.bbox_subnet, x, level)
        stride = self.strides[level]
        first = self._precise(self.bbox_pred, through(self.bbox_conv, box_feature, level))
        coarse = self.scales[level](first) + math.log(self.reach * stride)
        distances = coarse.clamp(max=LogDistances.MAX_LOG).exp() / stride
        share = self.through_points
        offsets = star_offsets((1 - share) * distances.detach() + share * distances)
        change = self._precise(self.refine_pred, self.refine_conv(box_feature, offsets).relu())
        fine = self.refine_scales[level](change) + coarse.detach()
        classes = self.cls_score(self.cls_conv(cls_feature, offsets).relu())
        return coarse, fine, classes

    @staticmethod
    def _precise(predictor: nn.Conv2d, x: Tensor) -> Tensor:
        """In float32: what bfloat16 leaves of a logarithm moves a side by whole pixels."""
        with torch.autocast(x.device.type, enabled=False):
            return predictor(x.to(predictor.weight.dtype))
