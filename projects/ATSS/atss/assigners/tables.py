"""Tables of candidate pairs, for GPUs: few operators, whose shapes the host knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caching import cached_property
from ..geometry import centres
from .engine import table_limit
from .locations import anchors_at
from .pairs import AssignmentBatch, CandidatePairs, ClassLoss
from .sinkhorn import Columns


@dataclass(frozen=True)
class Rows(CandidatePairs):
    """(g, C) pairs: one object per row.

    Attributes:
        owner: (g, 1).
        exists: (g, C) bool: False for padding; None for no padding.
    """

    batch: Tables
    exists: Tensor | None = None

    @cached_property
    def possible(self) -> Tensor:
        """(g, C) bool: an object with an area and an eligible anchor with a finite prediction."""
        possible = self.batch.nonempty[self.owner]
        if self.batch.usable is not None:
            possible = possible & self.per_anchor(self.batch.usable)
        return possible if self.exists is None else possible & self.exists

    def highest_of_object(self, values: Tensor) -> Tensor:
        """Return (g, 1): the highest of the (g, C) values of each row."""
        return values.amax(dim=1, keepdim=True)

    def highest_similarities(self, k: int) -> Tensor:
        """Return (g, k or R): the highest similarities of each object with eligible anchors."""
        similarity = self.similarity.masked_fill(~self.possible, 0)
        return similarity.topk(min(k, similarity.shape[1])).values

    def columns(self, loss: ClassLoss, selected: Tensor) -> Columns:
        """Return all anchors. Background losses that are not finite become 0: their anchors have no
        pairs."""
        background = self.batch.background(loss).nan_to_num(0, posinf=0)
        return Columns(self.slot, background)


@dataclass(frozen=True)
class Table(Rows):
    """(g, R) pairs of consecutive objects with all anchors of their images, without padding.

    Attributes:
        owner: (g, 1).
        index: (1, R).
        first: the first object.
    """

    first: int = 0

    @property
    def image(self) -> Tensor:
        """(g,) image of each object."""
        return self.batch.gt.image_index[self.first : self.first + len(self.owner)]

    def per_anchor(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.image)

    @property
    def address(self) -> Tensor:
        """(g, R) int64: the image."""
        return self.image[:, None].expand(self.shape)

    def view(self, per_slot: Tensor) -> Tensor:
        return per_slot.view(self.batch.shape)

    @property
    def boxes(self) -> Tensor:  # type: ignore[override]
        """(g, R, 4), in memory x1 of all, then y1 of all; not cached, because they are large."""
        return self.batch.sides.index_select(1, self.image).double().movedim(0, -1)

    @cached_property
    def classes(self) -> Tensor:
        per_class = self.batch.classes.view(*self.batch.shape, -1).transpose(1, 2)
        return per_class[self.image, self.batch.gt.classes[self.owner[:, 0]]]


@dataclass(frozen=True)
class Matches(CandidatePairs):
    """(N, R) pairs: every anchor of every image with its object.

    Attributes:
        exists: (N, R) bool: the anchor has an object. Others have the first object as a
            placeholder.
        table: of all objects, whose similarities and probabilities are reused.
    """

    batch: Tables
    exists: Tensor
    table: Table | None = None

    @cached_property
    def slot(self) -> Tensor:
        return torch.arange(self.exists.numel(), device=self.exists.device).view_as(self.exists)

    @cached_property
    def possible(self) -> Tensor:
        """(N, R) bool: the anchor has an object, and its predicted box is finite."""
        return self.exists & self.batch.finite

    @cached_property
    def similarity(self) -> Tensor:
        """(N, R); 0 for an anchor without an object."""
        similarity = self._from_table("similarity")
        similarity = super().similarity if similarity is None else similarity
        return similarity.masked_fill(~self.exists, 0)

    @cached_property
    def probability(self) -> Tensor:
        probability = self._from_table("probability")
        return super().probability if probability is None else probability

    def _from_table(self, name: str) -> Tensor | None:
        if self.table is None or name not in self.table.__dict__:
            return None
        return self.table.__dict__[name][self.owner, self.index]


@dataclass(frozen=True)
class Tables(AssignmentBatch):
    """A batch whose pairs are tables."""

    @cached_property
    def sides(self) -> Tensor:
        """(4, N, R) predicted boxes, in memory x1 of all, then y1 of all."""
        return self.boxes.movedim(-1, 0).contiguous()

    @cached_property
    def whole(self) -> Table:
        """Table of all objects, with its cached values."""
        return self.table(0, len(self.gt))

    def tables(self) -> Iterator[Table]:
        """Yield tables of all objects, none larger than :func:`use_engine` allows."""
        count = len(self.gt)
        step = max(1, table_limit() // self.shape[1])
        if count <= step:
            yield self.whole
            return
        for first in range(0, count, step):
            yield self.table(first, min(first + step, count))

    def table(self, first: int, stop: int) -> Table:
        """Return the table of the objects from ``first`` to ``stop`` - 1."""
        owner = torch.arange(first, stop, device=self.gt.boxes.device)[:, None]
        index = torch.arange(self.shape[1], device=owner.device)[None]
        return Table(self, owner, index, first=first)

    def window(self, radius: float) -> Rows:
        """Return objects with the anchors whose centres lie less than ``radius`` strides from
        theirs along both axes, and a few more; with all anchors, if these are no more."""
        anchors = self.anchors
        n = int(2 * radius) + 1
        if n * n * len(anchors.strides) >= self.shape[1] // anchors.num_anchors:
            return self.table(0, len(self.gt))
        stride, width, height, first = anchors.lattice.unbind(1)
        count = torch.stack([width, height], dim=1)[..., None]  # (L, 2, 1)
        position = centres(self.objects)[:, None] / stride[:, None]  # (G, L, 2)
        start = (position - (anchors.offset + n / 2)).ceil()
        cell = start[..., None] + torch.arange(n, dtype=stride.dtype, device=stride.device)
        exists = (cell >= 0) & (cell < count)  # (G, L, 2, n)
        exists = (exists[:, :, 1, :, None] & exists[:, :, 0, None]).flatten(1)
        row = cell[:, :, 1] * width[:, None] + first[:, None]  # (G, L, n)
        location = (row[..., None] + cell[:, :, 0, None]).flatten(1)
        index = anchors_at(anchors, location.masked_fill(~exists, 0).long())
        exists = exists[..., None].expand_as(index)
        owner = torch.arange(len(self.gt), device=index.device)[:, None]
        return Rows(self, owner, index.flatten(1), exists.flatten(1))

    def matches(self, gt_index: Tensor) -> Matches:
        """Return every anchor with its object, by (N, R) gt_index."""
        index = torch.arange(self.shape[1], device=gt_index.device)[None]
        table = self.__dict__.get("whole")
        return Matches(self, gt_index.clamp(min=0), index, gt_index >= 0, table)

    @cached_property
    def usable(self) -> Tensor | None:
        """(N, R) bool: eligible anchors with finite predicted boxes; None without predictions."""
        if self.predictions is None or self.eligible_radius is None:
            return None if self.predictions is None else self.finite
        eligible = torch.zeros(self.shape, dtype=torch.int8, device=self.gt.boxes.device)
        for table in self.tables():
            near = table.inside(0.0)
            if self.eligible_radius > 0:
                near = near | table.is_near_centre(self.eligible_radius)
            near = near & self.nonempty[table.owner]
            eligible.scatter_reduce_(0, table.address, near.to(torch.int8), "amax")
        return self.finite & eligible.bool()

    def scores(self, gt_index: Tensor, score: Callable[[Any], Tensor]) -> Tensor:
        """See :meth:`Lists.scores`."""
        matches = self.matches(gt_index)
        return score(matches).float().masked_fill(~matches.exists, 0)
