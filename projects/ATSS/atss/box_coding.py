"""How the four numbers that the head regresses describe a box."""

import math

import torch
from torch import Tensor

from .geometry import centres


class BoxDeltas:
    """Shift and scaling of the anchor box (R-CNN, arXiv 1311.2524, appendix C; "box" in the paper).

    dx = wx * (x - x_anchor) / w_anchor, dw = ww * ln(w / w_anchor), and the same for y and h.

    Args:
        weights: (wx, wy, ww, wh).
    """

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
