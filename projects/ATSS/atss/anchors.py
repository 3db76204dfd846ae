"""The anchor generator: one square anchor of 8 strides per location, by default."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from .structures import Anchors


class GridAnchorGenerator(nn.Module):
    """Anchors on regular grids. Answers Detectron2's contract for anchor generators
    (``forward``, ``num_anchors``, ``box_dim``) and, beyond it, hands out the grid itself.

    Args:
        strides: pixels between locations, per level.
        scales: square root of the anchors' area, in strides.
        ratios: height / width.
        offset: position of the first centre, in strides, in [0, 1).
    """

    box_dim = 4

    def __init__(
        self,
        *,
        strides: Sequence[int],
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
    ):
        super().__init__()
        if not scales or not ratios or min(scales) <= 0 or min(ratios) <= 0:
            raise ValueError(f"anchor scales {scales} and ratios {ratios} must be positive")
        if not 0 <= offset < 1:
            raise ValueError(f"anchor offset must be in [0, 1), got {offset}")
        self.strides, self.scales, self.ratios = tuple(strides), tuple(scales), tuple(ratios)
        self.offset = offset

    @property
    def num_anchors(self) -> list[int]:
        """A for each level (all equal)."""
        return [len(self.scales) * len(self.ratios)] * len(self.strides)

    def grid(self, features: Sequence[Tensor]) -> Anchors:
        """Anchors for feature maps (N, C, H, W), one per level, on their device."""
        sizes = tuple(tuple(x.shape[-2:]) for x in features)
        layout = (self.strides, self.scales, self.ratios, self.offset)
        return _cached_grid(sizes, *layout, features[0].device)

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """One Boxes per level, as Detectron2 wants them; the caller's own."""
        anchors = self.grid(features)
        return [Boxes(boxes.clone()) for boxes in anchors.boxes.split(anchors.per_level)]


# Of the whole process, and safe with several threads on one model. Multi-scale training sees some
# hundreds of canvas sizes; a grid costs 48 bytes an anchor, for boxes and their sides in float64.
@lru_cache(maxsize=32)
def _cached_grid(
    sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    offset: float,
    device: torch.device,
) -> Anchors:
    # What inference mode makes cannot be trained with.
    with torch.inference_mode(False), torch.no_grad():
        return Anchors.on_levels(sizes, strides, scales, ratios, offset, device)
