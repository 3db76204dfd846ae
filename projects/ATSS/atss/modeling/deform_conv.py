"""Deformable convolution on torchvision's operator, which needs no compiled part of Detectron2; on
CPUs, where that uses one core, on samples."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

Steps = tuple[int, int]


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
    """What torchvision's ``deform_conv2d`` computes, and its arguments: all taps are sampled at
    once, bilinearly, and one matrix product follows."""
    n, _, height, width = offset.shape
    channels_out, per_group, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    groups = offset.shape[1] // (2 * taps)
    moved = offset.view(n * groups, taps, 2, height, width)
    coordinates, sides = [], []
    for axis, count in enumerate((height, width)):
        tap, place = (
            torch.arange(k, dtype=x.dtype, device=x.device) for k in (kernel[axis], count)
        )
        tap = (tap * dilation[axis]).view([-1, 1] if axis == 0 else [1, -1]).expand(*kernel)
        place = (place * stride[axis] - padding[axis]).view([-1, 1] if axis == 0 else [1, -1])
        at = moved[:, :, axis] + tap.reshape(-1, 1, 1) + place
        # A side that is a power of two keeps whole pixels whole. Beyond the map lie zeros.
        side = 1 << (x.shape[2 + axis] - 1).bit_length()
        coordinates.append((2 * at.clamp(-2, side + 1) + 1) / side - 1)
        sides.append(side)
    grid = torch.stack(coordinates[::-1], dim=-1).flatten(1, 2)  # (n * groups, taps * H', W', 2)
    maps = F.pad(x, (0, sides[1] - x.shape[3], 0, sides[0] - x.shape[2]))
    maps = maps.view(n * groups, -1, *sides)
    samples = F.grid_sample(maps, grid, align_corners=False).view(
        n, groups, -1, taps, height, width
    )
    if mask is not None:
        samples = samples * mask.view(n, groups, 1, taps, height, width)
    samples = samples.view(n, x.shape[1] // per_group, per_group * taps, height * width)
    y = weight.view(x.shape[1] // per_group, -1, per_group * taps) @ samples
    y = y.view(n, channels_out, height, width)
    return y if bias is None else y + bias.view(-1, 1, 1)


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
        operator = sampled_conv2d if x.device.type == "cpu" else deform_conv2d
        with torch.autocast(x.device.type, enabled=False):
            y = operator(wide, offset, weight, bias, *geometry, mask).to(x.dtype)
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
