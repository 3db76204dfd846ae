"""Anchors on pyramids of regular grids, and their generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from .caching import cached
from .errors import WrongValue, check_range


@dataclass(frozen=True)
class Anchors:
    """Anchors on a pyramid of regular grids. Location (row i, column j) of a level has its centre
    at ``((j + offset) * stride, (i + offset) * stride)`` and A boxes around it.

    Attributes:
        boxes: (R, 4) float32.
        strides: pixels between neighbouring locations, by level.
        sizes: (height, width) in locations, by level.
        offset: position of the first centre, in strides.
        num_anchors: A.
    """

    boxes: Tensor
    strides: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    offset: float
    num_anchors: int

    @classmethod
    def on_levels(
        cls,
        sizes: Sequence[Sequence[int]],
        strides: Sequence[int],
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
        device: torch.device | str | None = None,
    ) -> Anchors:
        """Generate anchors from the sizes of levels.

        Args:
            sizes, strides, offset: as in the class.
            scales: square root of the anchors' area, in strides (paper, Table 5).
            ratios: height / width.
        """
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} level sizes for {len(strides)} strides")
        boxes = []
        for (height, width), stride in zip(sizes, strides, strict=True):
            x = (torch.arange(width, dtype=torch.float32, device=device) + offset) * stride
            y = (torch.arange(height, dtype=torch.float32, device=device) + offset) * stride
            centres = torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)
            corners = [
                (-w / 2, -h / 2, w / 2, h / 2)
                for scale in scales
                for ratio in ratios
                for w in [scale * stride / math.sqrt(ratio)]
                for h in [w * ratio]
            ]
            cells = torch.tensor(corners).to(centres.device, non_blocking=True)
            boxes.append((centres.repeat(1, 1, 2)[:, :, None] + cells).reshape(-1, 4))
        return cls(
            boxes=torch.cat(boxes),
            strides=tuple(strides),
            sizes=tuple((h, w) for h, w in sizes),
            offset=float(offset),
            num_anchors=len(scales) * len(ratios),
        )

    @classmethod
    def grid(
        cls,
        canvas_hw: tuple[int, int],
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
        device: torch.device | str | None = None,
    ) -> Anchors:
        """Generate anchors for a canvas of (height, width) pixels, on FPN's levels of ceil(height /
        stride) x ceil(width / stride), by :meth:`on_levels`."""
        sizes = [tuple(-(-side // stride) for side in canvas_hw) for stride in strides]
        return cls.on_levels(sizes, strides, scales, ratios, offset, device)

    @cached_property
    def per_level(self) -> list[int]:
        return [height * width * self.num_anchors for height, width in self.sizes]

    @cached_property
    def stride(self) -> Tensor:
        """(R,) float32: stride of each anchor's level."""
        return self.of_levels(self.strides)

    @cached
    def of_levels(self, values: tuple[float, ...]) -> Tensor:
        """Return (R,) float32 the value of each anchor's level."""
        levels = zip(self.per_level, values, strict=True)
        # Training cannot use tensors that inference mode has made.
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([self.boxes.new_full((n,), value) for n, value in levels])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    @cached_property
    def points(self) -> Tensor:
        """(R, 2) float64 centres in pixels; centres of the float32 boxes would be rounded."""
        levels = []
        for stride, (height, width) in zip(self.strides, self.sizes, strict=True):
            cell = torch.arange(height * width, device=self.boxes.device)
            cell = torch.stack([cell % width, cell // width], dim=-1)
            levels.append((cell.double() + self.offset) * stride)
        return torch.cat(levels).repeat_interleave(self.num_anchors, dim=0)

    @cached_property
    def sides(self) -> Tensor:
        """(4, R) float64 x1 of all boxes, then y1 of all and so on: faster than box after box."""
        return self.boxes.T.to(torch.float64, memory_format=torch.contiguous_format)

    def level_of(self, index: Tensor) -> Tensor:
        """Return the (...) int64 levels of (...) anchor indices."""
        first = self.lattice[:, 3].long() * self.num_anchors
        return torch.searchsorted(first.contiguous(), index, right=True) - 1

    @cached_property
    def lattice(self) -> Tensor:
        """(L, 4) float64: stride, width, height, and index of the first location over all
        levels."""
        first, rows = 0, []
        for stride, (height, width) in zip(self.strides, self.sizes, strict=True):
            rows.append((stride, width, height, first))
            first += height * width
        # torch.tensor(..., device=...) would make the host wait for the GPU.
        lattice = torch.tensor(rows, dtype=torch.float64)
        return lattice.to(self.boxes.device, non_blocking=True)


# Shared by all generators, because a lock cannot be pickled.
_LOCK = Lock()


class GridAnchorGenerator(nn.Module):
    """Generator of anchors on regular grids, with Detectron2's interface (``forward``,
    ``num_anchors``, ``box_dim``) and :meth:`grid`.

    Args:
        strides, scales, ratios: see :meth:`Anchors.on_levels`.
        offset: position of the first centre, in strides, in [0, 1).
    """

    box_dim = 4
    # Multi-scale training has some hundred canvas sizes. A grid takes 68 bytes per anchor, for
    # boxes, their sides and centres in float64, and strides; with MaxIoU 20 more on CPUs.
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
        check_range("scales", scales, 1e-6, 1e6)
        check_range("ratios", ratios, 1e-6, 1e6)
        if not 0 <= offset < 1:
            raise WrongValue("offset", f"must be >= 0 and < 1, got {offset}")
        self.strides, self.scales, self.ratios = tuple(strides), tuple(scales), tuple(ratios)
        self.offset = offset
        self._grids: dict[tuple, Anchors] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_grids": {}}

    @property
    def num_anchors(self) -> list[int]:
        """A, for each level."""
        return [len(self.scales) * len(self.ratios)] * len(self.strides)

    def grid(self, features: Sequence[Tensor]) -> Anchors:
        """Return the anchors for feature maps (N, C, H, W), one per level, on their device. They
        are cached: never change them in place."""
        key = tuple(tuple(x.shape[-2:]) for x in features), features[0].device
        layout = (self.strides, self.scales, self.ratios, self.offset)
        if torch.compiler.is_exporting():  # sizes are symbols, which are no keys
            return Anchors.on_levels(key[0], *layout, key[1])
        with _LOCK:  # several threads may use one model
            if key not in self._grids:
                if len(self._grids) >= self.CACHED_GRIDS:
                    self._grids.pop(next(iter(self._grids)))  # the oldest
                # Training cannot use tensors that inference mode has made.
                with torch.inference_mode(False), torch.no_grad():
                    self._grids[key] = Anchors.on_levels(key[0], *layout, key[1])
            return self._grids[key]

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """Return a copy of the boxes of each level."""
        anchors = self.grid(features)
        return [Boxes(boxes.clone()) for boxes in anchors.boxes.split(anchors.per_level)]
