"""Search of anchors near points and inside rectangles. Anchors lie on regular grids, so a formula
replaces the comparison of all."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..anchors import Anchors

# Pixels from the nearest side, above which a centre counts as inside an object, as in the authors'
# code and in most others.
INSIDE_MARGIN = 0.01
_INFINITY = torch.tensor(torch.inf, dtype=torch.float64).view(torch.int64).item()


def nearest_locations(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k locations of each level that are nearest to each point (Algorithm 1, line 4).

    Of equally distant locations the lower index is nearer; distances that agree in all but the last
    few of 53 bits are equal.

    Args:
        points: (G, 2) float64 (x, y) in pixels, also outside the canvas.

    Returns:
        (k, G, L) int64 index among the locations of all levels, nearest first, and (k, G, L) bool,
        False beyond the number of locations of a level.
    """
    stride, width, _, first = anchors.lattice.unbind(1)  # (L,) each
    count = anchors.lattice[:, 1:3].T[:, None]  # (2, 1, L)
    position = points.T[..., None] / stride - anchors.offset  # (2, G, L), in locations
    # The k x k window around the point, moved into the level, contains the k nearest: each row and
    # each column outside has k locations that are nearer. The lower of two possible windows.
    start = (position - k / 2).ceil().clamp(min=0).minimum((count - k).clamp(min=0))
    cell = start[..., None] + torch.arange(k, dtype=stride.dtype, device=stride.device)
    squared = (cell - position[..., None]).mul_(stride[:, None]).square_()  # (2, G, L, k)
    squared = squared.masked_fill_(cell >= count[..., None], torch.inf)
    distance = (squared[1, ..., None] + squared[0, ..., None, :]).flatten(-2)  # row by row
    # One integer key orders by distance, then by index: the bits of a positive float order like its
    # value, and the lowest of them are replaced by the index in the window.
    bits = (k * k - 1).bit_length()
    key = distance.view(torch.int64) >> bits << bits
    key += torch.arange(k * k, device=stride.device)
    key = key.topk(k, largest=False).values.movedim(-1, 0)
    valid = key < _INFINITY
    local = key & ((1 << bits) - 1)
    row, column = start[1] + local.div(k, rounding_mode="floor"), start[0] + local % k
    return (first + row * width + column).masked_fill_(~valid, 0).long(), valid


def anchors_at(anchors: Anchors, location: Tensor) -> Tensor:
    """Return the (..., A) int64 anchors of (...) locations."""
    if anchors.num_anchors == 1:
        return location[..., None]
    each = torch.arange(anchors.num_anchors, device=location.device)
    return location[..., None] * anchors.num_anchors + each


def all_anchors(anchors: Anchors, location: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (k * A * L, G) index and validity of the anchors of (k, G, L) locations, ordered by
    location, then anchor, then level."""
    index = anchors_at(anchors, location)  # (k, G, L, A)
    valid = valid[..., None].expand_as(index)
    index, valid = (x.permute(0, 3, 2, 1).flatten(0, 2) for x in (index, valid))
    return index, valid


def anchors_between(
    anchors: Anchors, low: Tensor, high: Tensor, piece: int = 1 << 18
) -> Iterator[tuple[Tensor, Tensor]]:
    """List the anchors in one rectangle per object and level, and up to one column or row beyond.

    Args:
        low, high: (G, L, 2) corners (x, y) in pixels.
        piece: locations at a time, which bounds memory.

    Yields:
        (M,) int64 object and (M,) int64 anchor, objects in rising order.
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
        rectangle = torch.searchsorted(ends, pair, right=True)  # object * L + level
        local = pair - (ends - columns * rows)[rectangle]
        column = start_column[rectangle] + local % columns[rectangle]
        row = start_row[rectangle] + local // columns[rectangle]
        level = rectangle % len(stride)
        location = first.long()[level] + row * width.long()[level] + column
        owner = (rectangle // len(stride)).repeat_interleave(anchors.num_anchors)
        yield owner, anchors_at(anchors, location).flatten()


def covered(anchors: Anchors, num_images: int, image: Tensor, rectangles: Tensor) -> Tensor:
    """Return (N * R,) bool: anchors whose centres lie strictly inside one of (M, L, 4) rectangles
    of their level and (M,) image, in pixels. The cost does not depend on the size of rectangles."""
    stride, width, height, _ = anchors.lattice.unbind(1)
    count = torch.stack([width, height], dim=1)
    start = (rectangles[..., :2] / stride[:, None] - anchors.offset).floor().add(1)
    stop = (rectangles[..., 2:] / stride[:, None] - anchors.offset).ceil()
    start = start.clamp(min=0).minimum(count).long()
    stop = stop.clamp(min=0).minimum(count).long().maximum(start)
    levels = []
    for level, (rows, columns) in enumerate(anchors.sizes):
        # +1 at the start and -1 at the end of a rectangle along both axes: the cumulative sum
        # counts the rectangles at each location.
        steps = image.new_zeros(num_images, rows + 1, columns + 1)
        (x1, y1), (x2, y2) = start[:, level].unbind(1), stop[:, level].unbind(1)
        for x, y, step in ((x1, y1, 1), (x2, y2, 1), (x1, y2, -1), (x2, y1, -1)):
            steps.index_put_((image, y, x), torch.full_like(x, step), accumulate=True)
        inside = steps.cumsum(1).cumsum(2)[:, :rows, :columns] > 0
        levels.append(inside.flatten(1).repeat_interleave(anchors.num_anchors, dim=1))
    return torch.cat(levels, dim=1).flatten()
