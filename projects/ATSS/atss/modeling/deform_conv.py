"""Deformable convolution by torchvision's operator, without compiled parts of Detectron2; on CPUs,
where that operator uses one core, by table look-ups."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

Steps = tuple[int, int]
# Zeros before the first and after the last pixel. Taps beyond them are clamped to them.
MARGIN = (2, 3)


def sampled_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Steps,
    padding: Steps,
    dilation: Steps,
    mask: Tensor | None,
) -> Tensor:
    """Compute torchvision's ``deform_conv2d``: taps are weighted sums of four rows of a table, the
    pixels around them, then a matrix product."""
    n, channels, *sides = x.shape
    channels_out, per_group, *kernel = weight.shape
    size, taps = offset.shape[2:], kernel[0] * kernel[1]
    groups, offset_groups = channels // per_group, offset.shape[1] // (2 * taps)
    maps = n * offset_groups  # groups of channels with their own offsets
    depth = channels // offset_groups
    offset = offset.reshape(maps, taps, 2, *size).permute(0, 3, 4, 1, 2)  # (maps, H', W', taps, 2)

    # For each axis the last pixel before each tap, and the weights of it and of the next pixel.
    corners, weights = [], []
    for axis, (along_tap, along_map) in enumerate((((-1, 1), (-1, 1, 1)), ((1, -1), (-1, 1)))):
        tap, place = (torch.arange(k[axis], dtype=x.dtype, device=x.device) for k in (kernel, size))
        tap = (tap * dilation[axis] - padding[axis]).view(along_tap).expand(*kernel).flatten()
        at = offset[..., axis] + tap + (place * stride[axis]).view(along_map)
        # A NaN remains in the weights.
        at = at.clamp(-MARGIN[0], sides[axis] + MARGIN[1] - 2)
        low = at.detach().nan_to_num().floor()
        corners.append(low.long() + MARGIN[0])
        weights.append((1 - (at - low), at - low))

    height, width = (side + sum(MARGIN) for side in sides)
    first = torch.arange(maps, device=x.device).view(-1, 1, 1, 1) * height
    first = (first + corners[0]) * width + corners[1]
    index = torch.stack([first, first + 1, first + width, first + width + 1], dim=-1)
    factor = torch.stack([row * column for row in weights[0] for column in weights[1]], dim=-1)
    if mask is not None:
        factor = factor * mask.reshape(maps, taps, *size).permute(0, 2, 3, 1)[..., None]
    table = F.pad(x, (*MARGIN, *MARGIN)).reshape(maps, depth, height * width)
    table = table.transpose(1, 2).flatten(0, 1)
    index, factor = index.reshape(-1, 4), factor.reshape(-1, 4)
    samples = F.embedding_bag(index, table, mode="sum", per_sample_weights=factor)

    # (n, places, taps, C), then (n, groups, places, taps * C / groups).
    samples = samples.view(n, offset_groups, size.numel(), taps, depth).permute(0, 2, 3, 1, 4)
    samples = samples.reshape(n, size.numel(), taps, groups, per_group).permute(0, 3, 1, 2, 4)
    kernels = weight.reshape(groups, -1, per_group, taps).permute(0, 3, 2, 1).flatten(1, 2)
    y = samples.reshape(n, groups, size.numel(), taps * per_group) @ kernels
    y = y.transpose(2, 3).reshape(n, channels_out, *size)
    return y if bias is None else y + bias.view(-1, 1, 1)


def deform_conv(x: Tensor, *arguments: Any) -> Tensor:
    """Torchvision's operator, or what computes the same on CPUs, where an offset that is NaN would
    end the process. Exported, torchvision's becomes one node."""
    by_sampling = x.device.type == "cpu" and not torch.compiler.is_exporting()
    return (sampled_conv2d if by_sampling else deform_conv2d)(x, *arguments)


class DeformConv(nn.Module):
    """Deformable convolution (arXiv 1703.06211), in version 2 with a mask (arXiv 1811.11168), with
    Detectron2's parameter names.

    Args:
        weight: (C_out, C_in / groups, h, w).
        norm: applied after the convolution.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        stride: int | Steps = 1,
        padding: int | Steps = 0,
        dilation: int | Steps = 1,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.stride, self.padding, self.dilation = map(_pair, (stride, padding, dilation))
        self.norm = norm

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, C_out, H', W').

        Args:
            x: (N, C_in, H, W).
            offset: (N, 2 * taps * g, H', W') in pixels, (y, x) of each tap; g offset groups.
            mask: (N, taps * g, H', W'), None in version 1.
        """
        # The operator has no half precision on CPUs, and positions need more than eight bits.
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, offset, weight = x.to(dtype), offset.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        mask = None if mask is None else mask.to(dtype)
        geometry = self.stride, self.padding, self.dilation
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv(wide, offset, weight, bias, *geometry, mask).to(x.dtype)
        return y if self.norm is None else self.norm(y)


class DeformConvLayer(nn.Module):
    """Deformable 3 x 3 convolution that predicts its offsets. They start at 0: a plain convolution,
    in version 2 with taps of half weight.

    Args:
        channels: in and out.
        modulated: version 2.
        groups: of channels, with their own offsets and masks.
    """

    def __init__(self, channels: int, modulated: bool = True, bias: bool = True, groups: int = 1):
        super().__init__()
        self.offset = nn.Conv2d(channels, groups * (27 if modulated else 18), 3, padding=1)
        plain = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv = DeformConv(
            plain.get_parameter("weight"), cast(nn.Parameter | None, plain.bias), padding=1
        )
        self.modulated = modulated
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset(x)
        if not self.modulated:
            return self.conv(x, offset)
        split = 2 * offset.shape[1] // 3
        return self.conv(x, offset[:, :split], offset[:, split:].sigmoid())


def _pair(value: int | Steps) -> Steps:
    return value if isinstance(value, tuple) else (value, value)
