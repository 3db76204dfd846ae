"""What the rules share: candidate pairs (ground truth, anchor), and who wins an anchor.

Anchors lie on regular grids. The locations nearest to a point are therefore known in closed form,
and a rule never looks at all anchors.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..structures import BACKGROUND, Anchors, GroundTruth


@lru_cache
def _rank_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (column, row), counted from 0, that a location among the k nearest can have.

    A location in the i-th nearest column and the j-th nearest row (from 1) has i * j - 1 others
    that are nowhere farther: those in columns and rows at least as near. So i * j <= k.
    """
    ranks = [(i, j) for j in range(k) for i in range(k) if (i + 1) * (j + 1) <= k]
    columns, rows = torch.tensor(ranks).T.contiguous().to(device, non_blocking=True)
    return columns, rows


def nearest_locations(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k locations of each level whose centres are nearest to each point (Alg. 1, line 4).

    Exact everywhere: at borders, on levels with fewer than k locations, for points outside the
    canvas. Of equally distant locations the one with the lower index is nearer; distances that
    agree in all but their last ten or so of 53 bits count as equal.

    Args:
        points: (G, 2) float64 (x, y) in pixels.
    Returns:
        (G, L, k) int64 index among the locations of all levels, in no particular order, and
        (G, L, k) bool that is False where the level has fewer than k locations.
    """
    stride, width, height, first = anchors.lattice[:, :, None].unbind(1)  # (L, 1) each
    count = torch.cat([width, height], dim=1)
    at = points[:, None] / stride - anchors.offset  # (G, L, 2), in cells from the first location

    # Columns and rows from the nearest outwards. They alternate between both sides, beginning
    # with the side on which the point lies, until the shorter side is used up.
    nearest = (at - 0.5).ceil().clamp(min=0).minimum(count - 1)
    upwards = at > nearest
    below, above = nearest, count - 1 - nearest
    shorter = torch.minimum(below, above)[..., None]
    rank = torch.arange(k, dtype=at.dtype, device=at.device)
    step = torch.maximum((rank / 2).ceil(), rank - shorter)
    up = torch.where(
        rank > 2 * shorter, (above > below)[..., None], upwards[..., None] == (rank % 2 > 0)
    )
    step = torch.where(up, step, -step)  # (G, L, 2, k)
    position = nearest[..., None] + step
    squared = ((position - at[..., None]) * stride[..., None]).square()
    squared.masked_fill_(rank >= count[..., None], torch.inf)

    columns, rows = _rank_pairs(k, at.device)
    distance = squared[:, :, 0, columns] + squared[:, :, 1, rows]  # (G, L, C)
    # One integer that orders by distance, then by index: a positive float's bits order like its
    # value, and the lowest of them make room for the place of the location around the nearest.
    place = (step[:, :, 1, rows] + (k - 1)) * (2 * k - 1) + (step[:, :, 0, columns] + (k - 1))
    low_bits = (1 << ((2 * k - 1) ** 2 - 1).bit_length()) - 1
    key = (distance.view(torch.int64) & ~low_bits) | place.long()
    chosen = key.topk(k, dim=-1, largest=False, sorted=False).indices

    location = first + position[:, :, 1, rows] * width + position[:, :, 0, columns]
    valid = distance.gather(-1, chosen) < torch.inf
    location = location.gather(-1, chosen).masked_fill_(~valid, 0)
    return location.long(), valid


def resolve(anchors: Anchors, gt: GroundTruth, index: Tensor, affinity: Tensor) -> Tensor:
    """Gives each anchor of each image to the pair of highest affinity (Alg. 1, line 15: "if an
    anchor box is assigned to multiple ground-truths, the one with the highest IoU is selected");
    of equal ones, to the lower ground truth.

    Args:
        index: (G, C) int64 into R, the candidates of each ground truth, each at most once.
        affinity: (G, C); -inf where the pair is none.
    Returns:
        (N, R) int64 into G, or BACKGROUND.
    """
    slots = gt.num_images * len(anchors.boxes)
    slot = (gt.image_index[:, None] * len(anchors.boxes) + index).flatten()
    affinity = affinity.flatten()
    best = affinity.new_full((slots,), -torch.inf).scatter_reduce_(0, slot, affinity, "amax")
    claimant = torch.arange(len(gt), device=slot.device).repeat_interleave(index.shape[1])
    wins = (affinity == best[slot]) & (affinity > -torch.inf)
    claimant = torch.where(wins, claimant, len(gt))
    owner = slot.new_full((slots,), len(gt)).scatter_reduce_(0, slot, claimant, "amin")
    owner = torch.where(owner < len(gt), owner, BACKGROUND)
    return owner.view(gt.num_images, len(anchors.boxes))
