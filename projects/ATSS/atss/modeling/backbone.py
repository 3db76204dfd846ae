"""Backbones: any of Detectron2's bottom-ups under an FPN whose P6 and P7 grow out of P5."""

import math
from collections.abc import Sequence
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
        p6 = _halve(self.p6, p5)
        return [p6, _halve(self.p7, F.relu(p6) if self.relu_before_p7 else p6)]


def _halve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, of 3 x 3 and stride 2. Where that is one column, oneDNN's kernel in bfloat16 for
    processors with AMX (of torch 2.14) computes with what lies in memory beyond its input: it is
    given the columns, of zeros as its padding is, for one more, which is left out."""
    width = x.shape[-1]
    low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if low and x.device.type == "cpu" and width < 3:
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
    """FPN on ``in_features`` of the bottom-up, with two more levels on top: P3 to P7 on features of
    strides 8, 16 and 32. Frozen norms of the bottom-up are folded."""
    fold_frozen_norms(bottom_up)
    last = bottom_up.output_shape()[in_features[-1]].stride
    top_block = P6P7FromP5(out_channels, relu_before_p7, f"p{int(math.log2(last))}")
    return FoldedFPN(bottom_up, in_features, out_channels, norm, top_block, fuse_type)


def freeze_unused(backbone: Backbone, levels: Sequence[str]) -> None:
    """Convolutions of an FPN that make none of these levels take no gradient, in place: they would
    get none, and DDP on GPUs waits for the gradient of everything that takes one."""
    if not isinstance(backbone, FPN):
        return
    layers, top = dict(backbone.named_children()), backbone.top_block
    own = {f"p{name[10:]}" for name in layers if name.startswith("fpn_output")}
    on_top = sorted(set(backbone.output_shape()) - own)  # such as p6, p7
    made = own & set(levels)
    if set(on_top) & set(levels):
        made |= own & {top.in_feature}
    finest = min((int(name[1:]) for name in made), default=math.inf)
    unused = [layers[f"fpn_output{name[1:]}"] for name in own - made]
    unused += [layers[f"fpn_lateral{name[1:]}"] for name in own if int(name[1:]) < finest]
    if top is not None and not set(on_top) & set(levels):
        unused.append(top)
    elif hasattr(top, "p7") and on_top[-1] not in levels:
        unused.append(top.p7)
    for module in unused:
        module.requires_grad_(False)


class FrozenNormConv2d(Conv2d):
    """A convolution with a frozen norm, which scales the weights, where scaling the output would
    read and write all of it twice more in each direction. Same numbers but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._folded()
        stride = self.stride
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            # Of the rest nothing is used. Strided kernels of this size are slow on CPUs.
            x, stride = x[..., :: stride[0], :: stride[1]], 1
        x = F.conv2d(x, weight, bias, stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weights, and the bias (C,)."""
        if not is_grouped(self.weight.device):
            norm = self.norm
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        folded = _folded.get()
        if folded is None or self not in folded:  # called alone, or again by a checkpoint
            folded = FoldedWeights([[self]])
        return folded.take(self)


class FoldedWeights:
    """Weights and biases of convolutions with frozen norms for one forward pass.

    A training step of two images on a GPU takes as long as the host needs to launch its operators,
    and R-50 has 53 such convolutions, each with a multiplication, its gradient, and under autocast
    three casts. Here one operator does this for a group of convolutions. The weights of a group are
    made when the first of its convolutions is called, and each is handed out once: inference holds
    those of one group. The gradients of a group reach its parameters together: DDP exchanges those
    of one stage during the backward pass of the next. Nothing is kept between passes.

    Args:
        groups: of convolutions.
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
        """Weights, and the bias (C,), of a convolution that is called for the first time."""
        if conv not in self._weights:
            group = self._groups[conv]
            scales = [self._scales[x] for x in group]
            weights = ScaleAll.apply(scales, *(x.weight for x in group))
            for x, weight in zip(group, weights, strict=True):
                del self._groups[x]
                self._weights[x] = weight
        return self._weights.pop(conv), self._biases[conv]


_folded: ContextVar[FoldedWeights | None] = ContextVar("folded", default=None)


class FoldedFPN(FPN):
    """Detectron2's FPN, with folded frozen norms of which each child of the bottom-up, such as a
    stage of a ResNet, is a group (:class:`FoldedWeights`). On CPUs each convolution folds its
    own."""

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
        token = _folded.set(FoldedWeights(self._groups))
        try:
            return super().forward(x)
        finally:
            _folded.reset(token)


def fold_frozen_norms(module: nn.Module) -> None:
    """Makes all convolutions with frozen norms scale their weights. In place; parameters, buffers
    and their names stay."""
    for conv in module.modules():
        if type(conv) is Conv2d and conv.bias is None and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = FrozenNormConv2d


class DeformBottleneck(CNNBlockBase):
    """Detectron2's bottleneck with a deformable 3 x 3 convolution, with the names that its own has,
    on an operator that need not be compiled.

    Args:
        plain: the block whose layers it takes over.
        modulated: version 2 (arXiv 1811.11168).
        offset_groups: groups of channels that move together.
    """

    def __init__(self, plain: BottleneckBlock, modulated: bool, offset_groups: int = 1):
        super().__init__(plain.in_channels, plain.out_channels, plain.stride)
        self.conv1, self.conv3, self.shortcut = plain.conv1, plain.conv3, plain.shortcut
        conv2 = plain.conv2
        geometry = (conv2.stride, conv2.padding, conv2.dilation)
        self.conv2 = DeformConv(conv2.weight, None, *geometry, conv2.norm)
        numbers = (27 if modulated else 18) * offset_groups
        self.conv2_offset = nn.Conv2d(conv2.in_channels, numbers, 3, *geometry)
        for parameter in self.conv2_offset.parameters():
            nn.init.zeros_(parameter)
        self.conv2_offset.requires_grad_(conv2.weight.requires_grad)
        self.split = 18 * offset_groups
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.conv1(x))
        moved = self.conv2_offset(y)
        mask = moved[:, self.split :].sigmoid() if self.modulated else None
        y = F.relu_(self.conv2(y, moved[:, : self.split], mask))
        y = self.conv3(y)
        return F.relu_(y + (x if self.shortcut is None else self.shortcut(x)))


def make_deformable(
    bottom_up: ResNet, stages: Sequence[bool], modulated: bool, offset_groups: int = 1
) -> ResNet:
    """Makes the bottlenecks of some stages deformable.

    Args:
        stages: for res2 to res5, whether.

    Raises:
        ValueError: where a stage has no bottlenecks (ResNet-18 and 34).
    """
    for name, wanted in zip(("res2", "res3", "res4", "res5"), stages, strict=True):
        stage = getattr(bottom_up, name, None)
        if not wanted or stage is None:
            continue
        for i, block in enumerate(stage):
            if not isinstance(block, BottleneckBlock):
                raise UserError(
                    "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs bottlenecks, which ResNet-18 and 34 "
                    f"have none of ({name} is made of {type(block).__name__})"
                )
            stage[i] = DeformBottleneck(block, modulated, offset_groups)
    return bottom_up
