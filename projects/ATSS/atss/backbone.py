"""Backbones: any of Detectron2's bottom-ups under an FPN whose P6 and P7 grow out of P5."""

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
    """

    in_feature = "p5"
    num_levels = 2

    def __init__(self, channels: int, relu_before_p7: bool = True):
        super().__init__()
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
    """FPN on ``in_features`` of the bottom-up, strides 8, 16 and 32, with P6 and P7 on top."""
    shapes = bottom_up.output_shape()
    strides = [shapes[name].stride for name in in_features]
    if strides[-1] != 32:
        raise ValueError(
            "MODEL.FPN.IN_FEATURES must end with a feature of stride 32, so that P6 grows out of "
            f"P5; {in_features} have strides {strides}"
        )
    top_block = P6P7FromP5(out_channels, relu_before_p7)
    return FPN(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
