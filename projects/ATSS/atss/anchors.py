"""The anchor generator: one square anchor of 8 strides per location, by default."""

from collections.abc import Sequence

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
    # Multi-scale training sees some hundreds of canvas sizes; each costs R * 16 bytes.
    CACHED_GRIDS = 32

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
        self._grids: dict[tuple, Anchors] = {}

    @property
    def num_anchors(self) -> list[int]:
        """A for each level (all equal)."""
        return [len(self.scales) * len(self.ratios)] * len(self.strides)

    def grid(self, features: Sequence[Tensor]) -> Anchors:
        """Anchors for feature maps (N, C, H, W), one per level, on their device."""
        sizes, device = tuple(tuple(x.shape[-2:]) for x in features), features[0].device
        if (sizes, device) not in self._grids:
            if len(self._grids) >= self.CACHED_GRIDS:
                self._grids.pop(next(iter(self._grids)))  # the oldest
            with torch.no_grad():
                self._grids[sizes, device] = Anchors.on_levels(
                    sizes, self.strides, self.scales, self.ratios, self.offset, device
                )
        return self._grids[sizes, device]

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """One Boxes per level, as Detectron2 wants them."""
        anchors = self.grid(features)
        return [Boxes(boxes) for boxes in anchors.boxes.split(anchors.per_level)]
