"""Tables of candidate pairs, for GPUs: few operators, and the host knows all shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry import centres
from ..structures import cached_property
from .engine import table_limit
from .pairs import AssignmentBatch, CandidatePairs, ClassLoss
from .sinkhorn import Columns


@dataclass(frozen=True)
class Rows(CandidatePairs):
    """(g, C) pairs: an object in each row.

    Attributes:
        owner: (g, 1).
        exists: (g, C) bool: the pair is one; None: all are.
    """

    batch: Tables
    exists: Tensor | None = None

    @cached_property
    def possible(self) -> Tensor:
        """(g, C) bool: an object with an area, and an eligible anchor whose prediction is
        finite."""
        possible = self.batch.nonempty[self.owner]
        if self.batch.usable is not None:
            possible = possible & self.per_anchor(self.batch.usable)
        return possible if self.exists is None else possible & self.exists

    def highest_of_object(self, values: Tensor) -> Tensor:
        """(g, 1) the highest of the (g, C) values of each row."""
        return values.amax(dim=1, keepdim=True)

    def highest_overlaps(self, k: int) -> Tensor:
        """(g, k or R) the highest similarities of each row's object with any eligible anchor."""
        overlap = self.overlap.masked_fill(~self.possible, 0)
        return overlap.topk(min(k, overlap.shape[1])).values

    def columns(self, loss: ClassLoss, chosen: Tensor) -> Columns:
        """All anchors, for a transport. Background losses that are not finite become 0: their
        anchors are in no pair."""
        background = self.batch.background(loss).nan_to_num(0, posinf=0)
        return Columns(self.slot, background)


@dataclass(frozen=True)
class Table(Rows):
    """(g, R): objects, and all anchors of their images. Every row has R pairs, so nothing is
    padded.

    Attributes:
        owner: (g, 1) neighbours.
        index: (1, R).
        first: the first object.
    """

    first: int = 0

    @property
    def image(self) -> Tensor:
        """(g,) of each object."""
        return self.batch.gt.image_index[self.first : self.first + len(self.owner)]

    def per_anchor(self, values: Tensor) -> Tensor:
        """(N, R) -> (g, R)"""
        return values.index_select(0, self.image)

    @property
    def address(self) -> Tensor:
        """(g, R) int64: the image."""
        return self.image[:, None].expand(self.shape)

    def view(self, per_slot: Tensor) -> Tensor:
        """(N * R,) -> (N, R)"""
        return per_slot.view(self.batch.shape)

    @property
    def boxes(self) -> Tensor:  # type: ignore[override]
        """(g, R, 4), in memory x1 of all, then y1 of all; not kept, because they are large."""
        return self.batch.columns.index_select(1, self.image).double().movedim(0, -1)

    @cached_property
    def classes(self) -> Tensor:
        """(g, R)"""
        per_class = self.batch.classes.view(*self.batch.shape, -1).transpose(1, 2)
        return per_class[self.image, self.batch.gt.classes[self.owner[:, 0]]]


@dataclass(frozen=True)
class Matches(CandidatePairs):
    """(N, R): every anchor of every image with its object, if it has one.

    Attributes:
        exists: (N, R) bool: it has one. Others have the first object.
        table: of all objects, whose similarities and probabilities need not be computed again.
    """

    batch: Tables
    exists: Tensor
    table: Table | None = None

    @cached_property
    def slot(self) -> Tensor:
        """(N, R)"""
        return torch.arange(self.exists.numel(), device=self.exists.device).view_as(self.exists)

    @cached_property
    def possible(self) -> Tensor:
        """(N, R) bool: the anchor has an object, and its predicted box is finite."""
        return self.exists & self.batch.finite

    @cached_property
    def overlap(self) -> Tensor:
        """(N, R); 0 of an anchor without an object."""
        overlap = self._from_table("overlap")
        overlap = super().overlap if overlap is None else overlap
        return overlap.masked_fill(~self.exists, 0)

    @cached_property
    def probability(self) -> Tensor:
        """(N, R)"""
        probability = self._from_table("probability")
        return super().probability if probability is None else probability

    def _from_table(self, name: str) -> Tensor | None:
        if self.table is None or name not in self.table.__dict__:
            return None
        return self.table.__dict__[name][self.owner, self.index]


@dataclass(frozen=True)
class Tables(AssignmentBatch):
    """A batch whose pairs stand in tables."""

    def tables(self) -> Iterator[Table]:
        """Tables of all objects, each of at most so many pairs as :func:`use_engine` allows. If one
        holds all, it is kept with its cached values."""
        count = len(self.gt)
        step = max(1, table_limit() // self.shape[1])
        if count <= step:
            yield self.once(Table, lambda: self.table(0, count))
            return
        for first in range(0, count, step):
            yield self.table(first, min(first + step, count))

    def table(self, first: int, stop: int) -> Table:
        """A table of the objects from the first on, without the last."""
        owner = torch.arange(first, stop, device=self.gt.boxes.device)[:, None]
        index = torch.arange(self.shape[1], device=owner.device)[None]
        return Table(self, owner, index, first=first)

    def window(self, radius: float) -> Rows:
        """Objects with the anchors whose centres lie less than ``radius`` strides from theirs along
        both axes, and a few more; with all anchors, if that is no more."""
        anchors = self.anchors
        n = int(2 * radius) + 1
        if n * n * len(anchors.strides) >= self.shape[1] // anchors.num_anchors:
            return self.table(0, len(self.gt))
        stride, width, height, first = anchors.lattice.unbind(1)
        count = torch.stack([width, height], dim=1)[..., None]  # (L, 2, 1)
        at = centres(self.objects)[:, None] / stride[:, None]  # (G, L, 2)
        start = (at - (anchors.offset + n / 2)).ceil()
        place = start[..., None] + torch.arange(n, dtype=at.dtype, device=at.device)
        exists = (place >= 0) & (place < count)  # (G, L, 2, n)
        exists = (exists[:, :, 1, :, None] & exists[:, :, 0, None]).flatten(1)
        row = place[:, :, 1] * width[:, None] + first[:, None]  # (G, L, n)
        location = (row[..., None] + place[:, :, 0, None]).flatten(1)
        index, exists = self.anchors_at(location.masked_fill(~exists, 0).long(), exists)
        owner = torch.arange(len(self.gt), device=index.device)[:, None]
        return Rows(self, owner, index, exists)

    def matches(self, gt_index: Tensor) -> Matches:
        """Every anchor with its object.

        Args:
            gt_index: (N, R) int64 into G; less than 0 for none.
        """
        index = torch.arange(self.shape[1], device=gt_index.device)[None]
        table = self._computed.get(Table)
        return Matches(self, gt_index.clamp(min=0), index, gt_index >= 0, table)

    @cached_property
    def usable(self) -> Tensor | None:
        """(N, R) bool: eligible anchors whose predicted boxes are finite; None: all."""
        if self.predictions is None or self.eligible_radius is None:
            return None if self.predictions is None else self.finite
        eligible = torch.zeros(self.shape, dtype=torch.int8, device=self.gt.boxes.device)
        for table in self.tables():
            near = table.inside()
            if self.eligible_radius > 0:
                near = near | table.around(self.eligible_radius)
            near = near & self.nonempty[table.owner]
            eligible.scatter_reduce_(0, table.address, near.to(torch.int8), "amax")
        return self.finite & eligible.bool()

    def scores(self, gt_index: Tensor, score: Callable[[Any], Tensor]) -> Tensor:
        """(N, R) float32 ``score`` of the matches, 0 elsewhere.

        Args:
            gt_index: (N, R) int64 into G, or BACKGROUND.
        """
        matches = self.matches(gt_index)
        return score(matches).float().masked_fill(~matches.exists, 0)
