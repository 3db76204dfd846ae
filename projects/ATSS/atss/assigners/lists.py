"""Lists of candidate pairs, for CPUs: few pairs, whose number the host must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caching import cached, cached_property
from ..deprecated import renamed_attribute
from ..geometry import centres
from .box_index import BoxIndex
from .locations import anchors_between, covered
from .pairs import AssignmentBatch, CandidatePairs, ClassLoss
from .segments import Segments
from .sinkhorn import Columns

# Most pairs that are computed at a time, which bounds memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class ListPairs(CandidatePairs):
    """(P,) pairs in rising order of objects and, for each, of anchors."""

    batch: Lists

    def at(self, selected: Tensor) -> ListPairs:
        """Select pairs by a mask."""
        return ListPairs(self.batch, self.owner[selected], self.index[selected])

    @cached_property
    def possible(self) -> Tensor:
        """(P,) bool: the predicted box is finite."""
        if self.batch.predictions is None:
            return torch.ones_like(self.owner, dtype=torch.bool)
        return self.boxes.isfinite().all(dim=1)

    def background_loss(self, loss: ClassLoss) -> Tensor:
        return self.batch.background_at(loss, self.slot)

    @cached_property
    def _segments(self) -> Segments:
        return Segments(self.owner)

    def rows(self, values: Tensor, fill: float) -> Tensor:
        return self._segments.table(values, fill)

    def from_rows(self, table: Tensor) -> Tensor:
        return table[self._segments.row, self._segments.column]

    @property
    def row_ids(self) -> Tensor:
        return self._segments.ids

    def columns(self, loss: ClassLoss, selected: Tensor) -> Columns:
        """Return the anchors of the (P,) selected pairs."""
        batch = self.batch
        slots, column = self.slot[selected].unique(return_inverse=True)
        image = slots.div(batch.shape[1], rounding_mode="floor")
        segments = Segments(image)
        # Rows are filled with anchors without pairs, whose cost does not matter.
        costs = segments.table(batch.background_at(loss, slots), 0)
        background = costs.new_zeros(batch.shape[0], costs.shape[1])
        background[segments.ids] = costs
        position = torch.zeros_like(self.slot)
        position[selected] = (image * costs.shape[1] + segments.column)[column]
        return Columns(self.rows(position, 0), background)

    def highest_similarities(self, k: int) -> Tensor:
        """Return (g, k): :meth:`Lists.highest_similarities` of each row."""
        return self.batch.highest_similarities(k)[self.row_ids]

    def highest_of_object(self, values: Tensor) -> Tensor:
        """Return (P,): the highest of the (P,) values of each pair's object."""
        highest = values.new_full((len(self.batch.gt),), -torch.inf)
        return highest.scatter_reduce_(0, self.owner, values, "amax")[self.owner]

    def kth_highest(self, values: Tensor, k: int) -> Tensor:
        """Return (G,): the k-th highest of the (P,) values of each object, or 0."""
        result = values.new_zeros(len(self.batch.gt))
        table = self.rows(values, 0)
        if table.shape[1] >= k:
            result[self.row_ids] = table.topk(k).values[:, -1]
        return result


@dataclass(frozen=True)
class Lists(AssignmentBatch):
    """A batch whose pairs are lists. Objects are (g,) int64 ids."""

    @cached_property
    def all_objects(self) -> Tensor:
        """(g,) objects with an area."""
        return self.nonempty.nonzero().squeeze(1)

    def pieces(self, ids: Tensor, num_pairs: int) -> tuple[Tensor, ...]:
        """Split ids of ``num_pairs`` pairs each into pieces of at most PIECE pairs."""
        return ids.split(max(1, PIECE // max(num_pairs, 1)))

    @cached_property
    def eligible(self) -> Tensor | None:
        """(N * R,) bool: anchors that may be selected; None for all."""
        if self.eligible_radius is None:
            return None
        ids = self.all_objects
        rectangles = [self.objects[ids, None].expand(-1, len(self.anchors.strides), -1)]
        if self.eligible_radius > 0:
            rectangles.append(torch.cat(self.square_around(ids, self.eligible_radius), dim=-1))
        image = self.gt.image_index[ids].repeat(len(rectangles))
        return covered(self.anchors, self.gt.num_images, image, torch.cat(rectangles))

    def pairs(self, owner: Tensor, index: Tensor) -> ListPairs:
        """List pairs of (P,) objects and (P,) anchors, unless these are not eligible."""
        pairs = ListPairs(self, owner, index)
        return pairs if self.eligible is None else pairs.at(self.eligible[pairs.slot])

    def all_pairs(self, ids: Tensor) -> ListPairs:
        """List pairs of objects with all anchors."""
        index = torch.arange(self.shape[1], device=ids.device)
        return self.pairs(ids.repeat_interleave(len(index)), index.repeat(len(ids)))

    def square_around(self, ids: Tensor, radius: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the (g, L, 2) corners of squares around the centres of objects, whose sides are
        twice the radius: a number of strides, or (g, L, 1)."""
        middle = centres(self.objects[ids])[:, None]
        half = radius * self.anchors.lattice[:, :1]
        return middle - half, middle + half

    def near_centre(self, ids: Tensor, radius: float | Tensor, inside: bool = False) -> ListPairs:
        """List pairs of objects with the anchors in :meth:`square_around` their centres, and a few
        more; on request only with those inside the object."""
        low, high = self.square_around(ids, radius)
        if inside:
            boxes = self.objects[ids, None]
            low, high = torch.maximum(boxes[..., :2], low), torch.minimum(boxes[..., 2:], high)
        # The first is empty, because torch.cat refuses an empty list.
        pairs = [(ids[:0], ids[:0]), *anchors_between(self.anchors, low, high)]
        owner, index = (torch.cat(x) for x in zip(*pairs, strict=True))
        return self.pairs(ids[owner], index)

    def central(self, ids: Tensor, radius: float | Tensor) -> ListPairs:
        return self.near_centre(ids, radius, inside=True)

    def near(self, ids: Tensor, least: Tensor | None = None) -> ListPairs:
        """List pairs of objects with the anchors whose predicted boxes are similar: see
        :meth:`BoxIndex.near`."""
        boxes, image = self.gt.boxes[ids], self.gt.image_index[ids]
        owner, index = self._index.near(self.similarity, boxes, image, least)
        return self.pairs(ids[owner], index)

    @cached_property
    def _index(self) -> BoxIndex:
        usable = self.finite
        if self.eligible is not None:
            usable = usable & self.eligible.view_as(usable)
        return BoxIndex(self.anchors, self.boxes, usable)

    def of_anchors(self, slots: Tensor) -> ListPairs:
        """List pairs of (M,) anchors among the N * R with all objects of their images."""
        image = slots.div(self.shape[1], rounding_mode="floor")
        ids = self.all_objects[self.gt.image_index[self.all_objects].sort(stable=True).indices]
        count = torch.bincount(self.gt.image_index[ids], minlength=self.shape[0])
        num_objects, first = count[image], (count.cumsum(0) - count)[image]
        row = torch.arange(len(slots), device=ids.device).repeat_interleave(num_objects)
        start = num_objects.cumsum(0) - num_objects
        column = torch.arange(len(row), device=ids.device) - start[row]
        return ListPairs(self, ids[first[row] + column], (slots % self.shape[1])[row])

    @cached
    def highest_similarities(self, k: int) -> Tensor:
        """Return (G, k): the highest similarities of each object with eligible anchors, then 0."""
        highest = self.objects.new_zeros(len(self.gt), k)
        for ids in self.pieces(self.all_objects, self.shape[1]):
            # The k-th highest of central anchors is a lower bound of the k-th highest of all.
            central = self.near_centre(ids, 1.5)
            pairs = self.near(ids, central.kth_highest(central.similarity, k)[ids])
            best = pairs.rows(pairs.similarity, 0)
            best = best.topk(min(k, best.shape[1])).values
            highest[pairs.row_ids, : best.shape[1]] = best
        return highest

    def background_at(self, loss: ClassLoss, slots: Tensor) -> Tensor:
        """Return (P,) float64 :meth:`background_loss` of anchors among the N * R, each of which is
        computed at most once."""
        values = self._background(loss)
        missing = torch.zeros_like(values, dtype=torch.bool)
        missing[slots] = True
        missing &= values.isnan()
        for piece in self.pieces(missing.nonzero().squeeze(1), self.classes.shape[1]):
            values[piece] = self.background_loss(loss, self.classes[piece])
        return values[slots]

    @cached
    def _background(self, loss: ClassLoss) -> Tensor:
        # Filled by background_at; NaN until then.
        return self.objects.new_full((self.shape[0] * self.shape[1],), torch.nan)

    def scores(self, gt_index: Tensor, score: Callable[[Any], Tensor]) -> Tensor:
        """Return (N, R) float32 ``score`` of the matches of an (N, R) gt_index, 0 elsewhere."""
        image, index = (gt_index >= 0).nonzero(as_tuple=True)
        scores = self.gt.boxes.new_zeros(self.shape)
        pairs = ListPairs(self, gt_index[image, index], index)
        scores[image, index] = score(pairs).float()
        return scores

    around = renamed_attribute("Lists.around", "Lists.near_centre")
