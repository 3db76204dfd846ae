"""Backbones: any of Detectron2's bottom-ups under an FPN whose P6 and P7 grow out of P5."""

import math

import fvcore.nn.weight_init as weight_init
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor, nn
from torch.nn import functional as F


class P6P7FromP5(nn.Module):
    """P6 and P7 by strided convolutions, beginning at P5 rather than at the last stage of the
    bottom-up as in Detectron2's RetinaNet (FCOS, section 4; all of the authors' configs).

    Args:
        channels: of P5, and of what comes out.
        relu_before_p7: whether P6 is rectified on its way to P7.
        in_feature: the level to begin at. From P4 the new ones are P5 and P6, whatever the names of
            the convolutions, which are those of checkpoints.
    """

    num_levels = 2

    def __init__(self, channels: int, relu_before_p7: bool = True, in_feature: str = "p5"):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.relu_before_p7 = relu_before_p7
        for module in (self.p6, self.p7):
            weight_init.c2_xavier_fill(module)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


def build_fpn(
    bottom_up: Backbone,
    in_features: list[str],
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
    relu_before_p7: bool = True,
) -> FPN:
    """FPN on ``in_features`` of the bottom-up, with two more levels on top: P3 to P7 on features of
    strides 8, 16 and 32."""
    last = bottom_up.output_shape()[in_features[-1]].stride
    top_block = P6P7FromP5(out_channels, relu_before_p7, f"p{int(math.log2(last))}")
    return FPN(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
