"""Functions of boxes (x1, y1, x2, y2) and points, (..., 4) and (..., 2), whose leading dimensions
broadcast. Boxes are continuous, in any one unit."""

import torch
from torch import Tensor


def centres(boxes: Tensor) -> Tensor:
    """Return the (..., 2) centres of boxes."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def side_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the (..., 4) distances from points to the left, top, right and bottom sides; negative
    beyond that side."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def nearest_side(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the (...) distance from points to the nearest side; negative outside."""
    (x, y), (x1, y1, x2, y2) = points.unbind(-1), boxes.unbind(-1)
    horizontal, vertical = torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y)
    return torch.minimum(horizontal, vertical)


def area(boxes: Tensor) -> Tensor:
    """Return the (...) areas; 0 if a side is negative."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (...) areas of intersection and union of two boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the (...) intersection over union; 0 if both boxes are empty."""
    intersection, union = intersection_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def normalised_wasserstein(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """Return the (...) normalised Wasserstein distance (NWD, arXiv 2110.13389), exp(-sqrt(dx^2 +
    dy^2 + (dw^2 + dh^2) / 4) / constant) with differences d of centres and of sides; the constant
    is in the boxes' unit."""
    offset = centres(a) - centres(b)
    sides = (_sizes(a) - _sizes(b)) / 2
    squared = (offset.square() + sides.square()).sum(-1)
    # The square root has no gradient at 0.
    return (-squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt() / constant).exp()


def similarity_distance(a: Tensor, b: Tensor, m: float, n: float) -> Tensor:
    """Return the (...) similarity distance (SimD, arXiv 2407.02394), exp(-location - shape): the
    lengths of the differences of centres and of sides, each divided by the sum of both boxes' sides
    and multiplied by m along x and n along y."""
    size_a, size_b = _sizes(a), _sizes(b)
    total = (size_a + size_b).clamp(min=torch.finfo(a.dtype).tiny)
    dx, dy = ((centres(a) - centres(b)) / total).unbind(-1)
    dw, dh = ((size_a - size_b) / total).unbind(-1)
    return (-torch.hypot(m * dx, n * dy) - torch.hypot(m * dw, n * dh)).exp()


def _sizes(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)


def centerness(distances: Tensor) -> Tensor:
    """Return the (...) centerness of points (FCOS, arXiv 1904.01355, equation 3), sqrt(min(l, r) /
    max(l, r) * min(t, b) / max(t, b)), 0 outside, from (..., 4) distances of
    :func:`side_distances`. The box has an area."""
    left, top, right, bottom = distances.clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt()
