"""Pure functions on boxes (..., 4) and points (..., 2). Leading dimensions broadcast.

Boxes are (x1, y1, x2, y2), continuous; any unit, as long as it is one.
"""

import torch
from torch import Tensor


def centres(boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (..., 2) centre points (x, y)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def side_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """(..., 4) distances from a point to the left, top, right and bottom side of a box; negative
    where the point lies beyond that side."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def nearest_side(points: Tensor, boxes: Tensor) -> Tensor:
    """(...) distance from a point to the nearest side of a box; negative where it lies outside."""
    (x, y), (x1, y1, x2, y2) = points.unbind(-1), boxes.unbind(-1)
    horizontal, vertical = torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y)
    return torch.minimum(horizontal, vertical)


def area(boxes: Tensor) -> Tensor:
    """(...) area; zero where a side is negative."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(...) areas of the intersection and of the union of two boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) intersection over union; zero where both boxes are empty."""
    intersection, union = intersection_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def normalised_wasserstein(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """(...) similarity of two boxes as Gaussians (NWD, arXiv 2110.13389): with
    differences d of centres and of sides, exp(-sqrt(dx^2 + dy^2 + (dw^2 + dh^2) / 4) / constant).

    Args:
        constant: in the boxes' unit.
    """
    apart = centres(a) - centres(b)
    sides = (_sizes(a) - _sizes(b)) / 2
    squared = (apart.square() + sides.square()).sum(-1)
    # The root of 0 has no slope.
    return (-squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt() / constant).exp()


def similarity_distance(a: Tensor, b: Tensor, m: float, n: float) -> Tensor:
    """(...) similarity of two boxes (SimD, arXiv 2407.02394): exp(-place - shape), each the length
    of a vector of differences, of centres and of sides, over the sum of both boxes' sides, its x
    times m and its y times n."""
    size_a, size_b = _sizes(a), _sizes(b)
    together = (size_a + size_b).clamp(min=torch.finfo(a.dtype).tiny)
    dx, dy = ((centres(a) - centres(b)) / together).unbind(-1)
    dw, dh = ((size_a - size_b) / together).unbind(-1)
    return (-torch.hypot(m * dx, n * dy) - torch.hypot(m * dw, n * dh)).exp()


def _sizes(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)


def centerness(distances: Tensor) -> Tensor:
    """How central a point is in its box (FCOS, arXiv 1904.01355, equation 3):
    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), 1 in the middle, 0 on the border and
    outside, where rules that do not ask for points inside may choose some.

    Args:
        distances: (..., 4) as from :func:`side_distances`, of a box with area.
    """
    left, top, right, bottom = distances.clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt()
