"""Box codes: between boxes and a head's box regression."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError, WrongValue, check_range
from ..geometry import centres, side_distances


class BoxCode(Protocol):
    """Protocol of box codes.

    Attributes:
        channels: D, values that the head predicts for each anchor.
        initial: box regression before training.
        uses_shape: whether decoding depends on the anchor's width and height.
        relative: whether the box regression counts from the anchor, as convolutions predict it.
        comparable: whether the box regression can be compared with encoded boxes (smooth L1).
        form: "deltas", "log_distances" or "corners", for heads that need one of these.
        bins: of each side's distribution; 0 without distributions.
        inference_only: whether training with this code is refused.
        legacy: pixels to add to a box that weights of the authors' code predict.
    """

    channels: int = 4
    initial: float = 0.0
    uses_shape: bool = False
    relative: bool = True
    comparable: bool = False
    form: str = ""
    bins: int = 0
    inference_only: bool = False
    # The authors' coordinates name the centres of pixels, half a pixel before ours. Their boxes
    # contain the last pixel, which their deltas count and their distances do not.
    legacy: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """Encode (..., 4) boxes, given (..., 4) anchors and (...) strides in pixels, as (..., E)
        targets; E <= D."""
        ...

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """Decode (..., D) box regression to (..., 4) boxes, given the same."""
        ...

    def after_resizing(self, instances: Any, input_hw: tuple[int, int]) -> None:
        """Correct an image's detections in place; ``input_hw`` is the network's input."""
        return None


class BoxDeltas(BoxCode):
    """Shift and scaling of the anchor box (R-CNN, arXiv 1311.2524, appendix C; "box" in the paper):
    dx = wx * (x - x_anchor) / w_anchor, dw = ww * ln(w / w_anchor), and the same for y and h. Boxes
    and anchors must not be empty.

    Args:
        weights: (wx, wy, ww, wh).
    """

    uses_shape = True
    comparable = True
    form = "deltas"
    legacy = (0.5, 0.5, 0.5, 0.5)
    # Stops exp() from overflowing: a box may be 1000 / 16 times as large as its anchor.
    MAX_LOG_SCALE = math.log(1000 / 16)

    def __init__(self, weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)):
        check_range("weights", weights, 1e-6, 1e6)
        if len(weights) != 4:
            raise WrongValue("weights", f"must be four numbers, got {weights}")
        self.weights = tuple(weights)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        wx, wy, ww, wh = self.weights
        anchor_size = anchors[..., 2:] - anchors[..., :2]
        dx, dy = ((centres(boxes) - centres(anchors)) / anchor_size).unbind(-1)
        dw, dh = ((boxes[..., 2:] - boxes[..., :2]) / anchor_size).log().unbind(-1)
        return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = box_regression.unbind(-1)
        x, y = centres(anchors).unbind(-1)
        w, h = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
        x = x + dx * (w / wx)
        y = y + dy * (h / wy)
        half_w = (dw / ww).clamp(max=self.MAX_LOG_SCALE).exp() * (w / 2)
        half_h = (dh / wh).clamp(max=self.MAX_LOG_SCALE).exp() * (h / 2)
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)


class PointDistances(BoxCode):
    """Distances from the anchor's centre to the four sides, in strides ("point" in the paper).

    Decoding applies a ReLU. Before training boxes have sides of 8 strides.
    """

    initial = 4.0

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return side_distances(centres(anchors), boxes) / stride[..., None]

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return _box_around(centres(anchors), box_regression.relu() * stride[..., None])


class LogDistances(BoxCode):
    """Logarithms of the distances in pixels from the anchor's centre to the four sides (FCOS, arXiv
    1904.01355, section 3.1: exp(x)). Encoded boxes must contain the centre."""

    form = "log_distances"
    # Stops exp() from overflowing.
    MAX_LOG = math.log(1 << 16)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return side_distances(centres(anchors), boxes).log()

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return _box_around(centres(anchors), box_regression.clamp(max=self.MAX_LOG).exp())


class Distribution(nn.Module, BoxCode):
    """Distribution of each side over 0, 1, ..., ``reg_max`` strides from the anchor's centre, as
    logits (GFL, arXiv 2006.04388, section 3.2). Decoding takes its mean.

    Attributes:
        project: (bins,) these distances, part of a model's weights as in mmdet.
    """

    project: Tensor

    # Targets stay this far below ``reg_max``, as in the authors' code.
    MARGIN = 0.1

    def __init__(self, reg_max: int = 16):
        super().__init__()
        check_range("reg_max", reg_max, 1, 1024)
        if reg_max != int(reg_max):
            raise WrongValue("reg_max", f"must be a whole number, got {reg_max!r}")
        self.bins = int(reg_max) + 1
        self.channels = 4 * self.bins
        self.register_buffer("project", torch.arange(self.bins, dtype=torch.float32))

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """Return (..., 4) distances in strides, clamped to the bins."""
        distances = side_distances(centres(anchors), boxes) / stride[..., None]
        return distances.clamp(min=0, max=self.bins - 1 - self.MARGIN)

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        probabilities = box_regression.unflatten(-1, (4, self.bins)).softmax(-1)
        distances = (probabilities * self.project.to(probabilities.dtype)).sum(-1)
        return _box_around(centres(anchors), distances * stride[..., None])


class Corners(BoxCode):
    """The box itself, in strides, for heads that decode and refine their boxes (TOOD)."""

    comparable = True
    relative = False
    form = "corners"

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return boxes / stride[..., None]

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return box_regression * stride[..., None]


class LegacyPixels(BoxCode):
    """Conversion of boxes of the authors' weights to our convention, for inference only: losses
    would learn other boxes than inference reports."""

    inference_only = True

    def __init__(self, code: BoxCode):
        if code.bins:
            raise UserError(
                "MODEL.ATSS.LEGACY_PIXELS True is for weights of the authors' code, and none of "
                "these has MODEL.ATSS.REGRESSION distribution"
            )
        self.code = code
        self.channels, self.initial, self.uses_shape = code.channels, code.initial, code.uses_shape

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        return self.code.encode(boxes, anchors, stride)

    def decode(self, box_regression: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        boxes = self.code.decode(box_regression, anchors, stride)
        return boxes + boxes.new_tensor(self.code.legacy)

    def after_resizing(self, instances: Any, input_hw: tuple[int, int]) -> None:
        """Undo the resizing of the last pixel, one pixel of the original image."""
        height, width = instances.image_size
        boxes = instances.pred_boxes.tensor
        boxes[:, 2] += 1 - width / input_hw[1]
        boxes[:, 3] += 1 - height / input_hw[0]
        instances.pred_boxes.clip((height, width))


def _box_around(points: Tensor, distances: Tensor) -> Tensor:
    """Return (..., 4) boxes from (..., 2) points and (..., 4) distances."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
