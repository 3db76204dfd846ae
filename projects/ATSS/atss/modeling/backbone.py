"""Backbones: a bottom-up of Detectron2 under an FPN with P6 and P7 computed from P5."""

import math
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .deform_conv import DeformConv
from .foreach import ScaleAll, autocast_dtype, cast_all, is_grouped


class P6P7FromP5(nn.Module):
    """P6 and P7 by strided convolutions of P5, not of the bottom-up's last stage as in Detectron2's
    RetinaNet (FCOS, section 4; all of the authors' configs).

    Args:
        relu_before_p7: whether P7 is computed from P6 after a ReLU.
        in_feature: input level; from P4 the new levels are P5 and P6, under the same names.
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
        p6 = _halve(self.p6, p5)
        return [p6, _halve(self.p7, F.relu(p6) if self.relu_before_p7 else p6)]


def _halve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 3 x 3 convolution with stride 2.

    If the output has one column, oneDNN's bfloat16 kernel for AMX (torch 2.14) reads beyond its
    input. So the input is padded with zeros to two output columns, of which the first is returned.
    """
    width = x.shape[-1]
    bfloat16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if bfloat16 and x.device.type == "cpu" and width < 3:
        return conv(F.pad(x, (0, 3 - width)))[..., :1]
    return conv(x)


def build_fpn(
    bottom_up: Backbone,
    in_features: list[str],
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
    relu_before_p7: bool = True,
) -> FPN:
    """Return an FPN with two levels on top, P3 to P7 for strides 8, 16 and 32. Frozen norms of the
    bottom-up are folded."""
    fold_frozen_norms(bottom_up)
    last = bottom_up.output_shape()[in_features[-1]].stride
    top_block = P6P7FromP5(out_channels, relu_before_p7, f"p{int(math.log2(last))}")
    return FoldedFPN(bottom_up, in_features, out_channels, norm, top_block, fuse_type)


def freeze_unused(backbone: Backbone, levels: Collection[str]) -> None:
    """Freeze, in place, the FPN's convolutions that these levels do not depend on: DDP on GPUs
    would wait for their gradients."""
    if not isinstance(backbone, FPN):
        return
    layers, top = dict(backbone.named_children()), backbone.top_block
    fpn_levels = {f"p{name[10:]}" for name in layers if name.startswith("fpn_output")}
    on_top = sorted(set(backbone.output_shape()) - fpn_levels)  # such as p6, p7
    used = fpn_levels & set(levels)
    if set(on_top) & set(levels):
        used |= fpn_levels & {top.in_feature}
    finest = min((int(name[1:]) for name in used), default=math.inf)
    unused = [layers[f"fpn_output{name[1:]}"] for name in fpn_levels - used]
    unused += [layers[f"fpn_lateral{name[1:]}"] for name in fpn_levels if int(name[1:]) < finest]
    if top is not None and not set(on_top) & set(levels):
        unused.append(top)
    elif hasattr(top, "p7") and on_top[-1] not in levels:
        unused.append(top.p7)
    for module in unused:
        module.requires_grad_(False)


class FrozenNormConv2d(Conv2d):
    """Convolution with a frozen norm folded into its weights: a norm reads and writes the output
    twice more, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._folded()
        stride = self.stride
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            # Strided 1 x 1 kernels are slow on CPUs.
            x, stride = x[..., :: stride[0], :: stride[1]], 1
        x = F.conv2d(x, weight, bias, stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _folded(self) -> tuple[Tensor, Tensor]:
        if not is_grouped(self.weight.device):
            norm = self.norm
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        folded = _folded_weights.get()
        # Without an FPN, or in activation checkpointing, which calls a convolution again.
        if folded is None or self not in folded:
            folded = FoldedWeights([[self]])
        return folded.take(self)


class FoldedWeights:
    """Folded weights and biases of a backbone's convolutions, for one forward pass on a GPU.

    Each of R-50's 53 convolutions would launch a multiplication, its gradient and, under autocast,
    three casts. Here one operator computes the weights of a stage when its first convolution is
    called. Each weight is returned once, so inference stores one stage. The gradients of a stage
    arrive together; DDP exchanges them during the backward pass of the next stage.
    """

    def __init__(self, groups: Sequence[Sequence[FrozenNormConv2d]]):
        self._groups = {conv: group for group in groups for conv in group}
        norms = [conv.norm for conv in self._groups]
        scales = torch._foreach_add([x.running_var for x in norms], [x.eps for x in norms])
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, [x.weight for x in norms])
        shifts = torch._foreach_mul([x.running_mean for x in norms], scales)
        shifts = torch._foreach_sub([x.bias for x in norms], shifts)
        biases = cast_all(shifts, autocast_dtype(shifts[0]))
        self._scales = {c: x.view(-1, 1, 1, 1) for c, x in zip(self._groups, scales, strict=True)}
        self._biases = dict(zip(self._groups, biases, strict=True))
        self._weights: dict[FrozenNormConv2d, Tensor] = {}

    def __contains__(self, conv: FrozenNormConv2d) -> bool:
        return conv in self._groups or conv in self._weights

    def take(self, conv: FrozenNormConv2d) -> tuple[Tensor, Tensor]:
        """Return weights and bias (C,) of a convolution, once."""
        if conv not in self._weights:
            group = self._groups[conv]
            scales = [self._scales[x] for x in group]
            weights = ScaleAll.apply(scales, *(x.weight for x in group))
            for x, weight in zip(group, weights, strict=True):
                del self._groups[x]
                self._weights[x] = weight
        return self._weights.pop(conv), self._biases[conv]


# Folded weights of the FPN whose forward pass is running.
_folded_weights: ContextVar[FoldedWeights | None] = ContextVar("folded_weights", default=None)


class FoldedFPN(FPN):
    """FPN that folds the frozen norms of each stage together on GPUs (:class:`FoldedWeights`), one
    by one on CPUs."""

    def __init__(self, bottom_up: Backbone, *args: Any, **kwargs: Any):
        super().__init__(bottom_up, *args, **kwargs)
        groups = [
            [x for x in child.modules() if isinstance(x, FrozenNormConv2d)]
            for child in bottom_up.children()
        ]
        self._groups = [group for group in groups if group]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not self._groups or not is_grouped(x.device):
            return super().forward(x)
        token = _folded_weights.set(FoldedWeights(self._groups))
        try:
            return super().forward(x)
        finally:
            _folded_weights.reset(token)


def fold_frozen_norms(module: nn.Module) -> None:
    """Fold the frozen norms of all convolutions, in place. Names stay."""
    for conv in module.modules():
        if type(conv) is Conv2d and conv.bias is None and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = FrozenNormConv2d


class DeformBottleneck(CNNBlockBase):
    """Detectron2's DeformBottleneckBlock without its compiled operator, made of a plain block.

    Args:
        modulated: version 2 (arXiv 1811.11168).
        offset_groups: groups of channels with their own offsets.
    """

    def __init__(self, plain: BottleneckBlock, modulated: bool, offset_groups: int = 1):
        super().__init__(plain.in_channels, plain.out_channels, plain.stride)
        self.conv1, self.conv3, self.shortcut = plain.conv1, plain.conv3, plain.shortcut
        conv2 = plain.conv2
        geometry = (conv2.stride, conv2.padding, conv2.dilation)
        self.conv2 = DeformConv(conv2.weight, None, *geometry, conv2.norm)
        channels = (27 if modulated else 18) * offset_groups
        self.conv2_offset = nn.Conv2d(conv2.in_channels, channels, 3, *geometry)
        for parameter in self.conv2_offset.parameters():
            nn.init.zeros_(parameter)
        self.conv2_offset.requires_grad_(conv2.weight.requires_grad)
        self.split = 18 * offset_groups
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.conv1(x))
        offset = self.conv2_offset(y)
        mask = offset[:, self.split :].sigmoid() if self.modulated else None
        y = F.relu_(self.conv2(y, offset[:, : self.split], mask))
        y = self.conv3(y)
        return F.relu_(y + (x if self.shortcut is None else self.shortcut(x)))


def make_deformable(
    bottom_up: ResNet, stages: Sequence[bool], modulated: bool, offset_groups: int = 1
) -> ResNet:
    """Make the bottlenecks of res2 to res5 deformable, in place, by the flags of the stages.

    Raises:
        UserError: if a stage has no bottlenecks (ResNet-18 and 34).
    """
    for name, deformable in zip(("res2", "res3", "res4", "res5"), stages, strict=True):
        stage = getattr(bottom_up, name, None)
        if not deformable or stage is None:
            continue
        for i, block in enumerate(stage):
            if not isinstance(block, BottleneckBlock):
                raise UserError(
                    "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs bottlenecks, not ResNet-18 or 34: "
                    f"{name} is made of {type(block).__name__}"
                )
            stage[i] = DeformBottleneck(block, modulated, offset_groups)
    return bottom_up
