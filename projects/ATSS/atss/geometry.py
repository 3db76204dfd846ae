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


def area(boxes: Tensor) -> Tensor:
    """(...) area; zero where a side is negative."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(...) areas of the intersection and of the union of two boxes."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    intersection = width * height
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) intersection over union; zero where both boxes are empty."""
    intersection, union = intersection_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def centerness(distances: Tensor) -> Tensor:
    """How central a point is in its box (FCOS, arXiv 1904.01355, equation 3):
    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), 1 in the middle and 0 on the border.

    Args:
        distances: (..., 4) as from :func:`side_distances`, all positive.
    """
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt()
