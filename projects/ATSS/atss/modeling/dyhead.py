"""The dynamic head's tower (arXiv 2106.08322): blocks in which levels, places and channels are
attended to, one after the other."""

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
    """(N, C, H, W) to another size, bilinearly; corners stay corners."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class TaskAttention(nn.Module):
    """Each channel through the larger of two straight lines, which depend on the means of all
    channels (section 3.2, equation 5; dynamic ReLU, arXiv 2003.10027). At first, near enough a
    ReLU.

    Args:
        channels: in and out.
    """

    # By which the hidden layer is narrower.
    REDUCTION = 4

    def __init__(self, channels: int):
        super().__init__()
        self.hidden = nn.Linear(channels, channels // self.REDUCTION)
        self.lines = nn.Linear(channels // self.REDUCTION, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        said = self.lines(self.hidden(x.mean(dim=(2, 3))).relu())
        # Hard sigmoids less 1/2, which bfloat16 could not tell from 0: (N, C, 1, 1) each.
        said = (said / 6).clamp(-0.5, 0.5)
        slope, height, other_slope, other_height = said[..., None, None].chunk(4, dim=1)
        return torch.maximum(x * (2 * slope + 1) + height, x * (2 * other_slope) + other_height)


class DynamicBlock(nn.Module):
    """Of each level: deformable convolutions of it and of its neighbours at places that it says
    itself (spatial-aware attention, equation 4), their mean weighted by how much each matters
    (scale-aware, equation 3), and a task-aware activation.

    The finer level is convolved in steps of two. The coarser one is convolved on its own grid, for
    which those of offsets and masks are resampled, and what comes out is enlarged. Offsets are
    pixels of the map that is read, whichever that is, as in the authors' code. (That hands the
    operator those of the larger grid as they are: weights of theirs find something else here.)

    Args:
        channels: of each level, in and out.
        num_levels: L.
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        # At first nothing is moved.
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
        """L feature maps (N, C, H_l, W_l), fine to coarse -> as many of the same sizes."""
        copies = for_levels(len(levels), self)
        # A level uses the gate up to three times.
        return [copies[i][0]._of_level(levels, i, self._gate) for i in range(len(levels))]

    def _of_level(
        self, levels: Sequence[Tensor], level: int, gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        x = levels[level]
        moved = self.offset(x)
        offset, mask = moved[:, :18], moved[:, 18:].sigmoid()
        found = [self.same(x, offset, mask)]
        neighbours = ((self.finer, level - 1), (self.coarser, level + 1))
        for conv, other in neighbours:
            if conv is not None and 0 <= other < len(levels):
                found.append(self._of_other(conv, levels[other], offset, mask))
        attended = torch.stack([y * gate(y) for y in found]).mean(dim=0)
        return self.task_attention(attended)

    @staticmethod
    def _of_other(conv: DeformConv, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """A neighbouring level, convolved and in the size of the offsets."""
        size = (-(-x.shape[2] // conv.stride[0]), -(-x.shape[3] // conv.stride[1]))
        of_level = (offset.shape[2], offset.shape[3])
        return resized(conv(x, resized(offset, size), resized(mask, size)), of_level)

    def _gate(self, y: Tensor) -> Tensor:
        """(N, 1, 1, 1), from a half to 1."""
        return F.hardsigmoid(self.scale_attention(y.mean(dim=(2, 3), keepdim=True)).relu())


class DynamicTower(nn.Module):
    """Blocks through which all levels go together.

    Args:
        in_channels: of every level, in and out.
        num_levels: L.
        num_blocks: one after the other.
    """

    def __init__(self, in_channels: int, num_levels: int, num_blocks: int = 6):
        super().__init__()
        check_range("num_blocks", num_blocks, 1)
        if in_channels % NORM_GROUPS:
            raise UserError(
                f"its norms want channels in {NORM_GROUPS} groups, which {in_channels} do not fill"
                ": MODEL.FPN.OUT_CHANNELS"
            )
        self.blocks = nn.Sequential(
            *(DynamicBlock(in_channels, num_levels) for _ in range(num_blocks))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """L feature maps (N, C, H_l, W_l), fine to coarse -> as many of the same sizes."""
        return self.blocks(features)
