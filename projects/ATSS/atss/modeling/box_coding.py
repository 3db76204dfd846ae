"""How the numbers that the head regresses describe a box."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError, WrongValue, check_range
from ..geometry import centres, side_distances


class BoxCode(Protocol):
    """What every box code has.

    Attributes:
        channels: D, numbers that the head predicts for each anchor.
        initial: the number that the head predicts before training.
        uses_shape: whether it looks at the anchor's width and height, so that several anchors of a
            location say different things.
        relative: whether numbers count from the anchor, so that the same ones are another box
            elsewhere, as convolutions want it.
        comparable: whether numbers of the head may be compared with encoded boxes.
        bins: of the distribution, as logits, that the numbers are for each side; 0: they are none.
        legacy: pixels to add to a box that weights of the authors' code predict.
    """

    channels: int = 4
    initial: float = 0.0
    uses_shape: bool = False
    relative: bool = True
    comparable: bool = False
    bins: int = 0
    # Their coordinates name the centres of pixels, half a pixel before ours, and their boxes hold
    # their last pixel, which their deltas count and their distances do not.
    legacy: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes and (..., 4) anchors in pixels, (...) strides -> (..., E) numbers, of
        which there may be fewer than channels."""
        ...

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., D) numbers, (..., 4) anchors in pixels, (...) strides -> (..., 4) boxes in
        pixels."""
        ...


class BoxDeltas(BoxCode):
    """Shift and scaling of the anchor box (R-CNN, arXiv 1311.2524, appendix C; "box" in the paper).

    dx = wx * (x - x_anchor) / w_anchor, dw = ww * ln(w / w_anchor), and the same for y and h.

    Args:
        weights: (wx, wy, ww, wh).
    """

    uses_shape = True
    comparable = True
    legacy = (0.5, 0.5, 0.5, 0.5)
    # Stops exp() from overflowing: a box may be 1000 / 16 times as large as its anchor.
    MAX_LOG_SCALE = math.log(1000 / 16)

    def __init__(self, weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)):
        check_range("weights", weights, 1e-6, 1e6)
        if len(weights) != 4:
            raise WrongValue("weights", f"must be four numbers, not {weights}")
        self.weights = tuple(weights)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, neither empty -> (..., 4) deltas."""
        wx, wy, ww, wh = self.weights
        anchor_size = anchors[..., 2:] - anchors[..., :2]
        dx, dy = ((centres(boxes) - centres(anchors)) / anchor_size).unbind(-1)
        dw, dh = ((boxes[..., 2:] - boxes[..., :2]) / anchor_size).log().unbind(-1)
        return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) deltas, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = numbers.unbind(-1)
        x, y = centres(anchors).unbind(-1)
        w, h = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
        x = x + dx * (w / wx)
        y = y + dy * (h / wy)
        half_w = (dw / ww).clamp(max=self.MAX_LOG_SCALE).exp() * (w / 2)
        half_h = (dh / wh).clamp(max=self.MAX_LOG_SCALE).exp() * (h / 2)
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)


class PointDistances(BoxCode):
    """Distances from the anchor's centre to the four sides, in strides ("point" in the paper): all
    that matters of the anchor is where it lies.

    Decoding rectifies. Before training every box is 8 strides wide and high.
    """

    initial = 4.0

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, (...) strides -> (..., 4) distances in strides."""
        return side_distances(centres(anchors), boxes) / stride[..., None]

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) distances in strides -> (..., 4) boxes in pixels."""
        return _box_around(centres(anchors), numbers.relu() * stride[..., None])


class LogDistances(BoxCode):
    """Logarithms of the distances in pixels from the anchor's centre to the four sides (FCOS, arXiv
    1904.01355, section 3.1: exp(x), before it counted in strides)."""

    # Stops exp() from overflowing.
    MAX_LOG = math.log(1 << 16)

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, the centres inside -> (..., 4) logarithms."""
        return side_distances(centres(anchors), boxes).log()

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) logarithms, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        return _box_around(centres(anchors), numbers.clamp(max=self.MAX_LOG).exp())


class Distribution(nn.Module, BoxCode):
    """Of each side, how likely it is 0, 1, ..., ``reg_max`` strides from the anchor's centre, as
    logits (GFL, arXiv 2006.04388, section 3.2): it lies where it does on average.

    Args:
        reg_max: the farthest a side can be, in strides.

    Attributes:
        project: (bins,) those distances, part of a model's weights as in mmdet.
    """

    project: Tensor

    # How much nearer than that targets stay, as in the authors' code.
    MARGIN = 0.1

    def __init__(self, reg_max: int = 16):
        super().__init__()
        check_range("reg_max", reg_max, 1, 1024)
        if reg_max != int(reg_max):
            raise WrongValue("reg_max", f"must be a whole number, not {reg_max!r}")
        self.bins = int(reg_max) + 1
        self.channels = 4 * self.bins
        self.register_buffer("project", torch.arange(self.bins, dtype=torch.float32))

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes and anchors in pixels, (...) strides -> (..., 4) distances in strides, as
        far as bins reach."""
        distances = side_distances(centres(anchors), boxes) / stride[..., None]
        return distances.clamp(min=0, max=self.bins - 1 - self.MARGIN)

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4 * bins) logits, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        shares = numbers.unflatten(-1, (4, self.bins)).softmax(-1)
        distances = (shares * self.project.to(shares.dtype)).sum(-1)
        return _box_around(centres(anchors), distances * stride[..., None])


class Corners(BoxCode):
    """The box itself, in strides: for heads that decode, and move what they decoded, themselves."""

    comparable = True
    relative = False

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes in pixels, (...) strides -> (..., 4) boxes in strides."""
        return boxes / stride[..., None]

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) boxes in strides, (...) strides -> (..., 4) boxes in pixels."""
        return numbers * stride[..., None]


class LegacyPixels(BoxCode):
    """The boxes of everyone from numbers of the authors' weights, for inference: in training the
    losses would learn other boxes than inference reports.

    Args:
        code: how the weights write boxes.

    Raises:
        ValueError: for distributions, which the authors' weights do not know.
    """

    def __init__(self, code: BoxCode):
        if code.bins:
            raise UserError(
                "MODEL.ATSS.LEGACY_PIXELS True is for weights of the authors' code, and none of "
                "these has MODEL.ATSS.REGRESSION distribution"
            )
        self.code = code
        self.channels, self.initial, self.uses_shape = code.channels, code.initial, code.uses_shape

    def encode(self, boxes: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """As the code in it."""
        return self.code.encode(boxes, anchors, stride)

    def decode(self, numbers: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
        """(..., D) numbers, (..., 4) anchors in pixels -> (..., 4) boxes in pixels."""
        boxes = self.code.decode(numbers, anchors, stride)
        return boxes + boxes.new_tensor(self.code.legacy)

    @staticmethod
    def after_resizing(instances: Any, input_hw: tuple[int, int]) -> None:
        """The last pixel of a box is one pixel of the original image wide, whatever the size of the
        input: resizing it with the box was wrong by the difference. In place.

        Args:
            instances: detections of one image, in its own pixels.
            input_hw: (height, width) of the input.
        """
        height, width = instances.image_size
        boxes = instances.pred_boxes.tensor
        boxes[:, 2] += 1 - width / input_hw[1]
        boxes[:, 3] += 1 - height / input_hw[0]
        instances.pred_boxes.clip((height, width))


def _box_around(points: Tensor, distances: Tensor) -> Tensor:
    """(..., 2) points and (..., 4) distances to left, top, right and bottom -> (..., 4) boxes."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
