"""Locations of anchors near points and inside rectangles.

Anchors lie on regular grids. The locations nearest to a point are therefore known in closed form,
and a rule need not look at all anchors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..anchors import Anchors

# A centre counts as inside an object from more than this many pixels on, as in the authors' code
# and in most others.
INSIDE_MARGIN = 0.01
_INFINITY = torch.tensor(torch.inf, dtype=torch.float64).view(torch.int64).item()


def nearest_locations(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k locations of each level whose centres are nearest to each point (Alg. 1, line 4).

    Exact everywhere: at borders, on levels with fewer than k locations, for points outside the
    canvas. Of equally distant locations the one with the lower index is nearer; distances that
    agree in all but their last few of 53 bits count as equal.

    Args:
        points: (G, 2) float64 (x, y) in pixels.
    Returns:
        (k, G, L) int64 index among the locations of all levels, nearest first, and (k, G, L) bool
        that is False if the level has fewer than k locations.
    """
    stride, width, _, first = anchors.lattice.unbind(1)  # (L,) each
    count = anchors.lattice[:, 1:3].T[:, None]  # (2, 1, L)
    at = points.T[..., None] / stride - anchors.offset  # (2, G, L), in locations
    # The k x k locations around the point, within the level as far as it is that long, hold the k
    # nearest: each row and each column beyond has k that are nearer. Of two windows the lower.
    start = (at - k / 2).ceil().clamp(min=0).minimum((count - k).clamp(min=0))
    place = start[..., None] + torch.arange(k, dtype=at.dtype, device=at.device)  # (2, G, L, k)
    squared = (place - at[..., None]).mul_(stride[:, None]).square_()
    squared = squared.masked_fill_(place >= count[..., None], torch.inf)
    distance = (squared[1, ..., None] + squared[0, ..., None, :]).flatten(-2)  # row by row
    # One integer per location that orders by distance, then by index: a positive float's bits
    # order like its value, and the lowest of them make room for the place in the window.
    bits = (k * k - 1).bit_length()
    key = distance.view(torch.int64) >> bits << bits
    key += torch.arange(k * k, device=at.device)
    key = key.topk(k, largest=False).values.movedim(-1, 0)
    valid = key < _INFINITY
    local = key & ((1 << bits) - 1)
    row, column = start[1] + local.div(k, rounding_mode="floor"), start[0] + local % k
    return (first + row * width + column).masked_fill_(~valid, 0).long(), valid


def rectangles(
    anchors: Anchors, low: Tensor, high: Tensor, piece: int = 1 << 18
) -> Iterator[tuple[Tensor, Tensor]]:
    """All locations in a rectangle of its own per object and level, and at most one column or row
    beyond it; a few at a time. Their number depends on the objects, so the host waits for it.

    Args:
        low, high: (G, L, 2) corners (x, y) in pixels.
        piece: pairs at a time.
    Yields:
        (M,) int64 object and (M,) int64 location, objects in rising order.
    """
    stride, width, height, first = anchors.lattice.unbind(1)  # (L,) each
    count = torch.stack([width, height], dim=1)
    start = (low / stride[:, None] - anchors.offset).floor().clamp(min=0).minimum(count)
    stop = (high / stride[:, None] - anchors.offset).ceil().add(1).clamp(min=0).minimum(count)
    columns, rows = (stop - start).clamp(min=0).long().flatten(0, 1).unbind(1)
    start_column, start_row = start.long().flatten(0, 1).unbind(1)
    ends = (columns * rows).cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, piece):
        pair = torch.arange(begin, min(begin + piece, total), device=ends.device)
        cell = torch.searchsorted(ends, pair, right=True)  # object * L + level
        within = pair - (ends - columns * rows)[cell]
        column = start_column[cell] + within % columns[cell]
        row = start_row[cell] + within // columns[cell]
        level = cell % len(stride)
        yield cell // len(stride), first.long()[level] + row * width.long()[level] + column


def anchors_between(anchors: Anchors, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The A anchors of each location of :func:`rectangles`: (M,) int64 object and (M,) int64 into
    R, objects in rising order."""
    each = torch.arange(anchors.num_anchors, device=low.device)
    for owner, location in rectangles(anchors, low, high):
        index = location[:, None] * anchors.num_anchors + each
        yield owner.repeat_interleave(anchors.num_anchors), index.flatten()


def covered(anchors: Anchors, num_images: int, image: Tensor, rectangles: Tensor) -> Tensor:
    """(N * R,) bool: anchors whose centres lie strictly inside a rectangle of their image and
    level. As many steps, however large these are.

    Args:
        num_images: N.
        image, rectangles: (M,) and (M, L, 4), in pixels.
    """
    stride, width, height, _ = anchors.lattice.unbind(1)
    count = torch.stack([width, height], dim=1)
    start = (rectangles[..., :2] / stride[:, None] - anchors.offset).floor().add(1)
    stop = (rectangles[..., 2:] / stride[:, None] - anchors.offset).ceil()
    start = start.clamp(min=0).minimum(count).long()
    stop = stop.clamp(min=0).minimum(count).long().maximum(start)
    found = []
    for level, (rows, columns) in enumerate(anchors.sizes):
        # A rectangle begins with 1 and ends with -1, along both axes: sums from there are 1 inside.
        steps = image.new_zeros(num_images, rows + 1, columns + 1)
        for (x, y), step in (
            (start[:, level].unbind(1), 1),
            (stop[:, level].unbind(1), 1),
            ((start[:, level, 0], stop[:, level, 1]), -1),
            ((stop[:, level, 0], start[:, level, 1]), -1),
        ):
            steps.index_put_((image, y, x), torch.full_like(x, step), accumulate=True)
        inside = steps.cumsum(1).cumsum(2)[:, :rows, :columns] > 0
        found.append(inside.flatten(1).repeat_interleave(anchors.num_anchors, dim=1))
    return torch.cat(found, dim=1).flatten()


def all_anchors(anchors: Anchors, location: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """From locations to the A anchors of each: (k, G, L) -> (k * A * L, G), index and validity;
    all levels of the first location's first anchor come first."""
    if anchors.num_anchors == 1:
        return location.movedim(-1, 1).flatten(0, 1), valid.movedim(-1, 1).flatten(0, 1)
    each = torch.arange(anchors.num_anchors, device=location.device)[:, None, None]
    index = (location[:, None] * anchors.num_anchors + each).movedim(-1, 2).flatten(0, 2)
    valid = valid[:, None].expand(-1, anchors.num_anchors, -1, -1).movedim(-1, 2).flatten(0, 2)
    return index, valid
