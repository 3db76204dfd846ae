"""Deformable convolution on torchvision's operator, which needs no compiled part of Detectron2; on
CPUs, where that uses one core, as a sum of samples."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

Steps = tuple[int, int]
# Zeros before the first and after the last pixel: what lies farther away is as good as there.
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
    """What torchvision's ``deform_conv2d`` computes of the same arguments. Each tap is a weighted
    sum of four rows of a table, the pixels around it; one matrix product follows."""
    n, channels, *sides = x.shape
    channels_out, per_group, *kernel = weight.shape
    size, taps = offset.shape[2:], kernel[0] * kernel[1]
    groups, offset_groups = channels // per_group, offset.shape[1] // (2 * taps)
    maps = n * offset_groups  # each with offsets of its own
    each = channels // offset_groups
    moved = offset.reshape(maps, taps, 2, *size).permute(0, 3, 4, 1, 2)  # (maps, H', W', taps, 2)

    # The pixel above and left of each tap, and how much of it and of the next the tap is.
    corners, shares = [], []
    for axis, (along_tap, along_map) in enumerate((((-1, 1), (-1, 1, 1)), ((1, -1), (-1, 1)))):
        tap, place = (torch.arange(k[axis], dtype=x.dtype, device=x.device) for k in (kernel, size))
        tap = (tap * dilation[axis] - padding[axis]).view(along_tap).expand(*kernel).flatten()
        at = moved[..., axis] + tap + (place * stride[axis]).view(along_map)
        # Beyond the map lie zeros, of which MARGIN are there. NaN goes on in the shares.
        at = at.clamp(-MARGIN[0], sides[axis] + MARGIN[1] - 2)
        low = at.detach().nan_to_num().floor()
        corners.append(low.long() + MARGIN[0])
        shares.append((1 - (at - low), at - low))

    height, width = (side + sum(MARGIN) for side in sides)
    first = torch.arange(maps, device=x.device).view(-1, 1, 1, 1) * height
    first = (first + corners[0]) * width + corners[1]
    index = torch.stack([first, first + 1, first + width, first + width + 1], dim=-1)
    share = torch.stack([row * column for row in shares[0] for column in shares[1]], dim=-1)
    if mask is not None:
        share = share * mask.reshape(maps, taps, *size).permute(0, 2, 3, 1)[..., None]
    table = F.pad(x, (*MARGIN, *MARGIN)).reshape(maps, each, height * width)
    table = table.transpose(1, 2).flatten(0, 1)
    index, share = index.reshape(-1, 4), share.reshape(-1, 4)
    samples = F.embedding_bag(index, table, mode="sum", per_sample_weights=share)

    # (n, places, taps, C), and from there (n, groups, places, taps * C / groups).
    samples = samples.view(n, offset_groups, size.numel(), taps, each).permute(0, 2, 3, 1, 4)
    samples = samples.reshape(n, size.numel(), taps, groups, per_group).permute(0, 3, 1, 2, 4)
    kernels = weight.reshape(groups, -1, per_group, taps).permute(0, 3, 2, 1).flatten(1, 2)
    y = samples.reshape(n, groups, size.numel(), taps * per_group) @ kernels
    y = y.transpose(2, 3).reshape(n, channels_out, *size)
    return y if bias is None else y + bias.view(-1, 1, 1)


def deform_conv(x: Tensor, *arguments: Any) -> Tensor:
    """torchvision's operator, or what computes the same on CPUs, where an offset that is NaN would
    end the process. Exported, torchvision's becomes one node."""
    by_sampling = x.device.type == "cpu" and not torch.compiler.is_exporting()
    return (sampled_conv2d if by_sampling else deform_conv2d)(x, *arguments)


class DeformConv(nn.Module):
    """A convolution whose taps are moved by offsets from elsewhere (arXiv 1703.06211) and,
    in version 2, weighted by a mask (arXiv 1811.11168).

    Called like Detectron2's DeformConv and ModulatedDeformConv, with parameters of the same names.

    Args:
        weight: (C_out, C_in / groups, h, w).
        bias: (C_out,) or None.
        stride, padding, dilation: in pixels.
        norm: applied after the convolution, or None.
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
        """
        Args:
            x: (N, C_in, H, W).
            offset: (N, 2 * taps * g, H', W') in pixels, (y, x) of each tap; g offset groups.
            mask: (N, taps * g, H', W') or None for version 1.
        Returns:
            (N, C_out, H', W').
        """
        # The operator has no half precision on CPUs, and positions want more than eight bits.
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, offset, weight = x.to(dtype), offset.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        mask = None if mask is None else mask.to(dtype)
        geometry = self.stride, self.padding, self.dilation
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv(wide, offset, weight, bias, *geometry, mask).to(x.dtype)
        return y if self.norm is None else self.norm(y)


class DeformConvLayer(nn.Module):
    """A deformable 3 x 3 convolution that finds its own offsets. They are zero at first, so that it
    begins as a plain convolution (with taps of half weight in version 2).

    Args:
        channels: in and out.
        modulated: version 2.
        bias: whether the convolution has one.
        groups: of channels, each with offsets and masks of its own.
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
        """(N, C, H, W) -> (N, C, H, W)."""
        moved = self.offset(x)
        if not self.modulated:
            return self.conv(x, moved)
        offsets = 2 * moved.shape[1] // 3
        return self.conv(x, moved[:, :offsets], moved[:, offsets:].sigmoid())


def _pair(value: int | Steps) -> Steps:
    """Of both axes."""
    return value if isinstance(value, tuple) else (value, value)
