"""What the rules share: candidate pairs (ground truth, anchor), and who wins an anchor.

Anchors lie on regular grids. The locations nearest to a point are therefore known in closed form,
and a rule never looks at all anchors.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..anchors import Anchors
from ..structures import BACKGROUND, Assignment, GroundTruth

# A centre counts as inside an object from more than this many pixels on, as in the authors' code
# and in most others.
INSIDE_MARGIN = 0.01
NOBODY = torch.iinfo(torch.int64).max
_INFINITY = torch.tensor(torch.inf, dtype=torch.float64).view(torch.int64).item()


def nearest_locations(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k locations of each level whose centres are nearest to each point (Alg. 1, line 4).

    Exact everywhere: at borders, on levels with fewer than k locations, for points outside the
    canvas. Of equally distant locations the one with the lower index is nearer; distances that
    agree in all but their last ten or so of 53 bits count as equal.

    Args:
        points: (G, 2) float64 (x, y) in pixels.
    Returns:
        (k, G, L) int64 index among the locations of all levels, nearest first, and (k, G, L) bool
        that is False where the level has fewer than k locations.
    """
    nearest, step, squared = _outwards(anchors, points, k)
    # One integer per location that orders by distance, then by index: a positive float's bits
    # order like its value, and the lowest of them make room for row and column. In place where it
    # can be, because fresh memory costs more than the arithmetic.
    bits = (2 * k - 2).bit_length()
    place = step.add_(k - 1)
    place[:, 1] <<= bits
    distance = torch.cat([squared[:i, 0] + squared[j, 1] for i, j in _reach(k)])
    key = distance.view(torch.int64)
    key >>= 2 * bits
    key <<= 2 * bits
    key |= torch.cat([place[:i, 0] | place[j, 1] for i, j in _reach(k)])
    key = key.topk(k, dim=0, largest=False).values

    column = nearest[0] + (key & ((1 << bits) - 1)) - (k - 1)
    row = nearest[1] + (key >> bits & ((1 << bits) - 1)) - (k - 1)
    _, width, _, first = anchors.lattice.long().unbind(1)
    valid = key < _INFINITY
    return (first + row * width + column).masked_fill_(~valid, 0), valid


def surrounding_locations(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A superset of the k best locations of each level, for every score that nowhere rises on the
    way from a point outwards along a row or a column, as an overlap does.

    Args:
        points: (G, 2) float64 (x, y) in pixels.
    Returns:
        (M, G, L) int64 index among the locations of all levels, and (M, G, L) bool that is False
        where there is no such location; M is the number of (i, j) with i * j <= k.
    """
    nearest, step, squared = _outwards(anchors, points, k)
    step += nearest
    _, width, _, first = anchors.lattice.long().unbind(1)
    location = torch.cat([step[:i, 0] + step[j, 1] * width for i, j in _reach(k)]) + first
    valid = torch.cat([squared[:i, 0] + squared[j, 1] < torch.inf for i, j in _reach(k)])
    return location.masked_fill_(~valid, 0), valid


def _reach(k: int) -> list[tuple[int, int]]:
    """(how many columns, which row), nearest first. A location in the i-th nearest column and the
    j-th nearest row has i * j - 1 others that are nowhere farther, those in columns and rows at
    least as near: only i * j <= k can be among the k best."""
    return [(k // j, j - 1) for j in range(1, k + 1)]


def _outwards(anchors: Anchors, points: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k columns and the k rows of each level nearest to each point, nearest first.

    Returns:
        (2, G, L) int64 nearest column and row, (k, 2, G, L) int64 steps from there, and
        (k, 2, G, L) float64 squared distances in pixels, infinite beyond the level.
    """
    stride, width, height, _ = anchors.lattice.unbind(1)  # (L,) each
    count = torch.stack([width, height])[:, None]  # (2, 1, L)
    # Where the points lie, counted in locations from the first one: (2, G, L).
    at = points.T[..., None] / stride - anchors.offset

    # They alternate between both sides, beginning with the side on which the point lies, until the
    # shorter side is used up.
    nearest = (at - 0.5).ceil().clamp(min=0).minimum(count - 1)
    below, above = nearest, count - 1 - nearest
    shorter = torch.minimum(below, above)
    rank = torch.arange(k, dtype=at.dtype, device=at.device)[:, None, None, None]
    one_sided = rank > 2 * shorter
    upwards = (one_sided & (above > below)) | (~one_sided & ((at > nearest) == (rank % 2 > 0)))
    step = torch.maximum((rank / 2).ceil(), rank - shorter)
    step *= upwards * 2 - 1  # (k, 2, G, L)
    squared = ((nearest + step).sub_(at)).mul_(stride).square_()
    squared.masked_fill_(rank >= count, torch.inf)
    return nearest.long(), step.long(), squared


def window(anchors: Anchors, level: int, points: Tensor, reach: float) -> Tensor:
    """A rectangle of locations of one level around each point, of one size for all points, that
    holds every location less than ``reach`` pixels away along both axes.

    Args:
        points: (G, 2) float64 (x, y) in pixels.
        reach: in pixels; infinity for the whole level.
    Returns:
        (M, G) int64 index among the locations of all levels.
    """
    height, width = anchors.sizes[level]
    stride = anchors.strides[level]
    spans = []
    for count, coordinate in zip((width, height), points.unbind(1), strict=True):
        # The nearest n, where no more than n can be within reach.
        n = count if math.isinf(reach) else min(count, int(2 * reach / stride) + 1)
        start = (coordinate / stride - anchors.offset - n / 2).ceil().clamp(0, count - n)
        spans.append(start.long() + torch.arange(n, device=points.device)[:, None])
    columns, rows = spans
    first = sum(h * w for h, w in anchors.sizes[:level])
    return (first + rows[:, None] * width + columns).flatten(0, 1)


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
    each = torch.arange(anchors.num_anchors, device=location.device)[:, None, None]
    index = (location[:, None] * anchors.num_anchors + each).movedim(-1, 2).flatten(0, 2)
    valid = valid[:, None].expand(-1, anchors.num_anchors, -1, -1).movedim(-1, 2).flatten(0, 2)
    return index, valid


def assign_pairs(
    anchors: Anchors,
    gt: GroundTruth,
    candidates: Callable[..., tuple[Tensor, Tensor]],
    chunk: int,
    *per_object: Tensor,
) -> Assignment:
    """The hard assignment of a rule that knows each object's candidates by itself.

    Args:
        candidates: (anchors, (g, 4) boxes, *those of per_object) -> (C, g) index and affinity, as
            :func:`resolve` takes.
        chunk: objects at a time, which bounds memory.
        per_object: (G, ...) what else the rule wants to know of each object.
    """
    chunks = zip(*(x.split(chunk) for x in (gt.boxes, *per_object)), strict=True)
    pairs = [candidates(anchors, *x) for x in chunks]
    index, affinity = (torch.cat(x, dim=1) for x in zip(*pairs, strict=True))
    return Assignment.hard(resolve(anchors, gt, index, affinity))


def keep_best(best: Tensor, owner: Tensor, slot: Tensor, claimant: Tensor, rank: Tensor) -> None:
    """Gives anchors, in place, to the claimants of highest rank, of equal ones to the lower ground
    truth; several times for the pairs of a batch in pieces.

    Args:
        best, owner: (N * R,) rank and ground truth of each until now; -inf and NOBODY at first.
        slot, claimant, rank: (M,) of the pairs.
    """
    before = best.gather(0, slot)
    best.scatter_reduce_(0, slot, rank, "amax")
    now = best.gather(0, slot)
    owner[slot[now > before]] = NOBODY
    wins = rank == now
    owner.scatter_reduce_(0, slot[wins], claimant[wins], "amin")


def resolve(anchors: Anchors, gt: GroundTruth, index: Tensor, affinity: Tensor) -> Tensor:
    """Gives each anchor of each image to its pair of highest affinity (paper, section 4.1: of
    several objects the one with the highest IoU); of equal ones, to the lower ground truth.

    Args:
        index: (C, G) int64 into R, the candidates of each ground truth, each at most once.
        affinity: (C, G); -inf where the pair is none.
    Returns:
        (N, R) int64 into G, or BACKGROUND.
    """
    slots = gt.num_images * len(anchors.boxes)
    slot = (gt.image_index * len(anchors.boxes) + index).flatten()
    best = affinity.new_full((slots,), -torch.inf)
    best.scatter_reduce_(0, slot, affinity.flatten(), "amax")
    wins = (affinity == best.gather(0, slot).view_as(affinity)) & (affinity > -torch.inf)
    claimant = torch.arange(len(gt), device=slot.device).expand_as(wins)
    claimant = claimant.masked_fill(~wins, len(gt))
    owner = slot.new_full((slots,), len(gt))
    owner.scatter_reduce_(0, slot, claimant.flatten(), "amin")
    return owner.masked_fill_(owner == len(gt), BACKGROUND).view(gt.num_images, -1)
