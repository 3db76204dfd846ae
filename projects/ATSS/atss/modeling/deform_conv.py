"""Deformable convolution on torchvision's operator, which runs on CPUs and GPUs alike and needs no
compiled part of Detectron2."""

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


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
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.stride, self.padding, self.dilation = stride, padding, dilation
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
        y = deform_conv2d(
            wide, offset, weight, bias, self.stride, self.padding, self.dilation, mask
        ).to(x.dtype)
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
