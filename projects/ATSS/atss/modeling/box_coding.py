"""How the four numbers that the head regresses describe a box.

A coder has ``encode(boxes, anchors)`` and ``decode(numbers, anchors)``, both on (..., 4);
``initial``, the number that the head predicts before training; and ``legacy``, the pixels to add to
a box that weights of the authors' code predict. Its coordinates name the centres of pixels, half a
pixel before ours, and its boxes hold their last pixel, which its deltas count and its distances do
not.
"""

import math

import torch
from torch import Tensor

from ..geometry import centres, side_distances


class BoxDeltas:
    """Shift and scaling of the anchor box (R-CNN, arXiv 1311.2524, appendix C; "box" in the paper).

    dx = wx * (x - x_anchor) / w_anchor, dw = ww * ln(w / w_anchor), and the same for y and h.

    Args:
        weights: (wx, wy, ww, wh).
    """

    initial = 0.0
    legacy = (0.5, 0.5, 0.5, 0.5)
    # Stops exp() from overflowing: a box may be 1000 / 16 times as large as its anchor.
    MAX_LOG_SCALE = math.log(1000 / 16)

    def __init__(self, weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)):
        if len(weights) != 4 or min(weights) <= 0:
            raise ValueError(f"box coder weights must be four positive numbers, got {weights}")
        self.weights = tuple(weights)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, neither empty -> (..., 4) deltas."""
        wx, wy, ww, wh = self.weights
        anchor_size = anchors[..., 2:] - anchors[..., :2]
        dx, dy = ((centres(boxes) - centres(anchors)) / anchor_size).unbind(-1)
        dw, dh = ((boxes[..., 2:] - boxes[..., :2]) / anchor_size).log().unbind(-1)
        return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) deltas, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = deltas.unbind(-1)
        x, y = centres(anchors).unbind(-1)
        w, h = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
        x = x + dx * (w / wx)
        y = y + dy * (h / wy)
        half_w = (dw / ww).clamp(max=self.MAX_LOG_SCALE).exp() * (w / 2)
        half_h = (dh / wh).clamp(max=self.MAX_LOG_SCALE).exp() * (h / 2)
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)


class PointDistances:
    """Distances from the anchor's centre to the four sides, in strides ("point" in the paper): all
    that matters of the anchor is where it lies.

    Decoding rectifies. Before training every box is 8 strides wide and high.

    Args:
        anchor_scale: square root of the anchors' area, in strides.
    """

    initial = 4.0
    legacy = (0.0, 0.0, 1.0, 1.0)

    def __init__(self, anchor_scale: float = 8.0):
        if anchor_scale <= 0:
            raise ValueError(f"the anchors' scale must be positive, got {anchor_scale}")
        self.anchor_scale = anchor_scale

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels -> (..., 4) distances in strides."""
        return side_distances(centres(anchors), boxes) / self._stride(anchors)

    def decode(self, distances: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) distances in strides, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        return _box_around(centres(anchors), distances.relu() * self._stride(anchors))

    def _stride(self, anchors: Tensor) -> Tensor:
        size = anchors[..., 2:] - anchors[..., :2]
        return size.prod(dim=-1, keepdim=True).sqrt() / self.anchor_scale


class LogDistances:
    """Logarithms of the distances in pixels from the anchor's centre to the four sides (FCOS, arXiv
    1904.01355, section 3.1: exp(x), before it counted in strides)."""

    initial = 0.0
    legacy = (0.0, 0.0, 1.0, 1.0)
    # Stops exp() from overflowing.
    MAX_LOG = math.log(1 << 16)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, the centres inside -> (..., 4) logarithms."""
        return side_distances(centres(anchors), boxes).log()

    def decode(self, logarithms: Tensor, anchors: Tensor) -> Tensor:
        """(..., 4) logarithms, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        return _box_around(centres(anchors), logarithms.clamp(max=self.MAX_LOG).exp())


def _box_around(points: Tensor, distances: Tensor) -> Tensor:
    """(..., 2) points and (..., 4) distances to left, top, right and bottom -> (..., 4) boxes."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
