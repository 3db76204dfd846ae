"""Anchors, and what generates them: one square anchor of 8 strides per location, by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from .errors import UserError, WrongValue, check_range


@dataclass(frozen=True)
class Anchors:
    """Anchors on a pyramid of regular grids, together with the grids that made them.

    Location (row i, column j) of a level has its centre at
    ``((j + offset) * stride, (i + offset) * stride)`` and carries A boxes around it.

    Attributes:
        boxes: (R, 4) float32.
        strides: pixels between neighbouring locations, per level.
        sizes: (height, width) of each level, in locations.
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
        """Anchors for levels of known size.

        Args:
            sizes: (height, width) of each level, in locations.
            strides: pixels between locations, per level.
            scales: square root of the anchors' area, in strides (paper, Table 5).
            ratios: height / width.
            offset: position of the first centre, in strides.
        """
        if len(sizes) != len(strides):
            raise UserError(f"{len(sizes)} level sizes for {len(strides)} strides")
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
        """Anchors for a canvas of (height, width) pixels, on levels as FPN makes them:
        ceil(height / stride) x ceil(width / stride). Other arguments as in :meth:`on_levels`."""
        sizes = [tuple(-(-side // stride) for side in canvas_hw) for stride in strides]
        return cls.on_levels(sizes, strides, scales, ratios, offset, device)

    @cached_property
    def per_level(self) -> list[int]:
        """Number of anchors of each level; they sum to R."""
        return [height * width * self.num_anchors for height, width in self.sizes]

    @cached_property
    def stride(self) -> Tensor:
        """(R,) float32: pixels between the locations of each anchor's level."""
        return self.of_levels(self.strides)

    def kept(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Compute a value that depends on the anchors alone when it is asked for first."""
        values = self.__dict__.setdefault("_kept", {})
        if key not in values:
            # What inference mode makes cannot be trained with.
            with torch.inference_mode(False), torch.no_grad():
                values[key] = compute()
        return values[key]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def of_levels(self, values: tuple[float, ...]) -> Tensor:
        """(R,) float32: a value of each level, for its anchors."""
        levels = list(zip(self.per_level, values, strict=True))
        return self.kept(
            ("of levels", values),
            lambda: torch.cat([self.boxes.new_full((n,), value) for n, value in levels]),
        )

    @cached_property
    def points(self) -> Tensor:
        """(R, 2) float64 centres in pixels: those of the float32 boxes are rounded."""
        counts = [height * width for height, width in self.sizes]
        locations = torch.arange(sum(counts), device=self.boxes.device).split(counts)
        points = [self.centres_of(some, level) for level, some in enumerate(locations)]
        return torch.cat(points).repeat_interleave(self.num_anchors, dim=0)

    @cached_property
    def sides(self) -> Tensor:
        """(4, R) float64: the boxes in memory x1 of all, then y1 of all, which is faster to work
        on than box by box."""
        return self.boxes.T.to(torch.float64, memory_format=torch.contiguous_format)

    def level_of(self, index: Tensor) -> Tensor:
        """(...) int64 levels of anchors, (...) int64 into R."""
        first = self.lattice[:, 3].long() * self.num_anchors
        return torch.searchsorted(first.contiguous(), index, right=True) - 1

    def centres_of(self, location: Tensor, level: int) -> Tensor:
        """(..., 2) float64 centres in pixels of locations of one level.

        Args:
            location: (...) int64 among the locations of all levels.
        """
        local = location - sum(height * width for height, width in self.sizes[:level])
        width = self.sizes[level][1]
        cell = torch.stack([local % width, local // width], dim=-1)
        return (cell.double() + self.offset) * self.strides[level]

    @cached_property
    def lattice(self) -> Tensor:
        """(L, 4) float64 on the boxes' device: stride, width, height, index of the level's first
        location among the locations of all levels."""
        first, rows = 0, []
        for stride, (height, width) in zip(self.strides, self.sizes, strict=True):
            rows.append((stride, width, height, first))
            first += height * width
        # Not torch.tensor(..., device=...): that would make the host wait for the GPU.
        lattice = torch.tensor(rows, dtype=torch.float64)
        return lattice.to(self.boxes.device, non_blocking=True)


# Of all generators, because a lock cannot be pickled with one.
_LOCK = Lock()


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
    # Multi-scale training sees some hundreds of canvas sizes; a grid costs 68 bytes an anchor, for
    # boxes, their sides and centres in float64, and strides; MaxIoU keeps 20 more on CPUs.
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
            raise WrongValue("offset", f"must be at least 0 and less than 1, not {offset}")
        self.strides, self.scales, self.ratios = tuple(strides), tuple(scales), tuple(ratios)
        self.offset = offset
        self._grids: dict[tuple, Anchors] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_grids": {}}  # they are made anew in no time

    @property
    def num_anchors(self) -> list[int]:
        """A for each level (all equal)."""
        return [len(self.scales) * len(self.ratios)] * len(self.strides)

    def grid(self, features: Sequence[Tensor]) -> Anchors:
        """Anchors for feature maps (N, C, H, W), one per level, on their device. They are kept and
        handed out again: not to be changed in place."""
        key = tuple(tuple(x.shape[-2:]) for x in features), features[0].device
        layout = (self.strides, self.scales, self.ratios, self.offset)
        if torch.compiler.is_exporting():  # sizes are symbols, which are no keys
            return Anchors.on_levels(key[0], *layout, key[1])
        with _LOCK:  # several threads may use one model
            if key not in self._grids:
                if len(self._grids) >= self.CACHED_GRIDS:
                    self._grids.pop(next(iter(self._grids)))  # the oldest
                # What inference mode makes cannot be trained with.
                with torch.inference_mode(False), torch.no_grad():
                    self._grids[key] = Anchors.on_levels(key[0], *layout, key[1])
            return self._grids[key]

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """One Boxes per level, as Detectron2 wants them; the caller's own."""
        anchors = self.grid(features)
        return [Boxes(boxes.clone()) for boxes in anchors.boxes.split(anchors.per_level)]
