"""Tower of the dynamic head (arXiv 2106.08322): blocks of spatial, scale-aware and task-aware
attention."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, check_range
from .deform_conv import DeformConv
from .level_copies import for_levels

# Channels that share a mean and a variance in a block, as in the authors' code: 16 groups.
NORM_GROUPS = 16


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, H, W) bilinearly, with aligned corners."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class TaskAttention(nn.Module):
    """Dynamic ReLU: maximum of two linear functions of a channel, whose coefficients depend on the
    means of all channels (section 3.2, equation 5; arXiv 2003.10027). It starts as nearly a
    ReLU."""

    # Channels over width of the hidden layer.
    REDUCTION = 4

    def __init__(self, channels: int):
        super().__init__()
        self.hidden = nn.Linear(channels, channels // self.REDUCTION)
        self.lines = nn.Linear(channels // self.REDUCTION, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        lines = self.lines(self.hidden(x.mean(dim=(2, 3))).relu())
        # Hard sigmoids minus 1/2, because bfloat16 rounds a small value plus 1/2 to 1/2.
        lines = (lines / 6).clamp(-0.5, 0.5)
        slope, height, other_slope, other_height = lines[..., None, None].chunk(4, dim=1)
        return torch.maximum(x * (2 * slope + 1) + height, x * (2 * other_slope) + other_height)


class DynamicBlock(nn.Module):
    """Block of the dynamic head. For each level: deformable convolutions of the level and of its
    neighbours, with offsets of the level (spatial attention, equation 4), their gated mean
    (scale-aware, equation 3), and a task-aware activation.

    The finer level is convolved with stride 2. The coarser level is convolved on its own grid, with
    resized offsets and masks, and enlarged. Offsets are pixels of the convolved map. (The authors'
    code does not resize them for the coarser level, so their weights give other features here.)
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.same = self._conv(channels, 1)
        self.finer, self.coarser = (
            self._conv(channels, stride) if num_levels > 1 else None for stride in (2, 1)
        )
        self.scale_attention = nn.Conv2d(channels, 1, 1)
        self.task_attention = TaskAttention(channels)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def _conv(channels: int, stride: int) -> DeformConv:
        weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        norm = nn.GroupNorm(NORM_GROUPS, channels)
        return DeformConv(weight, stride=stride, padding=1, norm=norm)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """L feature maps (N, C, H_l, W_l), fine to coarse -> L of the same sizes."""
        copies = for_levels(len(levels), self)
        # Not the copies' gate: a level uses it up to three times, and copies allow one use.
        return [copies[i][0]._fuse(levels, i, self._gate) for i in range(len(levels))]

    def _fuse(
        self, levels: Sequence[Tensor], level: int, gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        x = levels[level]
        offset = self.offset(x)
        offset, mask = offset[:, :18], offset[:, 18:].sigmoid()
        features = [self.same(x, offset, mask)]
        for conv, other in ((self.finer, level - 1), (self.coarser, level + 1)):
            if conv is not None and 0 <= other < len(levels):
                features.append(self._convolve(conv, levels[other], offset, mask))
        return self.task_attention(torch.stack([y * gate(y) for y in features]).mean(dim=0))

    @staticmethod
    def _convolve(conv: DeformConv, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        size = (-(-x.shape[2] // conv.stride[0]), -(-x.shape[3] // conv.stride[1]))
        level_size = (offset.shape[2], offset.shape[3])
        return resized(conv(x, resized(offset, size), resized(mask, size)), level_size)

    def _gate(self, y: Tensor) -> Tensor:
        """Return the scale-aware attention, (N, 1, 1, 1) from 0.5 to 1."""
        return F.hardsigmoid(self.scale_attention(y.mean(dim=(2, 3), keepdim=True)).relu())


class DynamicTower(nn.Module):
    """Sequence of dynamic blocks, which get all levels at once."""

    def __init__(self, in_channels: int, num_levels: int, num_blocks: int = 6):
        super().__init__()
        check_range("num_blocks", num_blocks, 1)
        if in_channels % NORM_GROUPS:
            raise UserError(
                f"MODEL.FPN.OUT_CHANNELS must be a multiple of {NORM_GROUPS}, got {in_channels}"
            )
        self.blocks = nn.Sequential(
            *(DynamicBlock(in_channels, num_levels) for _ in range(num_blocks))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return self.blocks(features)
