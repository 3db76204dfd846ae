"""Lists of candidate pairs, for CPUs: few pairs, of which the host must know the number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import centres
from ..structures import cached_property
from .box_index import BoxIndex
from .locations import anchors_between, covered
from .pairs import AssignmentBatch, CandidatePairs, ClassLoss
from .segments import Segments
from .sinkhorn import Columns

# Pairs that are computed together at most: bounds memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class ListPairs(CandidatePairs):
    """(P,) pairs in rising order of objects and, of each, of anchors."""

    batch: Lists

    def at(self, chosen: Tensor) -> ListPairs:
        """Some of them."""
        return ListPairs(self.batch, self.owner[chosen], self.index[chosen])

    @cached_property
    def possible(self) -> Tensor:
        """(P,) bool: the predicted box is finite."""
        if self.batch.predictions is None:
            return torch.ones_like(self.owner, dtype=torch.bool)
        return self.boxes.isfinite().all(dim=1)

    def background_loss(self, loss: ClassLoss) -> Tensor:
        """(P,) float64 class loss of the anchor without an object, all classes added up."""
        return self.batch.background_of(loss, self.slot)

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

    def columns(self, loss: ClassLoss, chosen: Tensor) -> Columns:
        """The anchors of the (P,) pairs that are chosen, for a transport."""
        batch = self.batch
        slots, column = self.slot[chosen].unique(return_inverse=True)
        image = slots.div(batch.shape[1], rounding_mode="floor")
        segments = Segments(image)
        # Rows are filled with anchors of no pair, for which any cost will do.
        rows = segments.table(batch.background_of(loss, slots), 0)
        background = rows.new_zeros(batch.shape[0], rows.shape[1])
        background[segments.ids] = rows
        place = torch.zeros_like(self.slot)
        place[chosen] = (image * rows.shape[1] + segments.column)[column]
        return Columns(self.rows(place, 0), background)

    def highest_overlaps(self, k: int) -> Tensor:
        """(g, k) the highest similarities of each row's object with any eligible anchor, then 0."""
        return self.batch.highest_overlaps(k)[self.row_ids]

    def highest_of_object(self, values: Tensor) -> Tensor:
        """(P,) the highest of the (P,) values of each pair's object, or 0."""
        highest = values.new_zeros(len(self.batch.gt))
        return highest.scatter_reduce_(0, self.owner, values, "amax")[self.owner]

    def kth_highest(self, values: Tensor, k: int) -> Tensor:
        """(G,) of the (P,) values of each object; 0 if it has fewer."""
        result = values.new_zeros(len(self.batch.gt))
        table = self.rows(values, 0)
        if table.shape[1] >= k:
            result[self.row_ids] = table.topk(k).values[:, -1]
        return result


@dataclass(frozen=True)
class Lists(AssignmentBatch):
    """A batch whose pairs stand in lists."""

    @cached_property
    def all_objects(self) -> Tensor:
        """(g,) int64 ids of all objects with an area."""
        return self.nonempty.nonzero().squeeze(1)

    def pieces(self, ids: Tensor, pairs_of_each: int) -> tuple[Tensor, ...]:
        """Cut ids of objects or anchors into pieces of at most PIECE pairs."""
        return ids.split(max(1, PIECE // max(pairs_of_each, 1)))

    @cached_property
    def eligible(self) -> Tensor | None:
        """(N * R,) bool: anchors that may be chosen; None for all."""
        if self.eligible_radius is None:
            return None
        ids = self.all_objects
        rectangles = [self.objects[ids, None].expand(-1, len(self.anchors.strides), -1)]
        if self.eligible_radius > 0:
            rectangles.append(torch.cat(self.square_around(ids, self.eligible_radius), dim=-1))
        image = self.gt.image_index[ids].repeat(len(rectangles))
        return covered(self.anchors, self.gt.num_images, image, torch.cat(rectangles))

    def pairs(self, owner: Tensor, index: Tensor) -> ListPairs:
        """List (P,) objects and (P,) anchors, as far as these are eligible."""
        pairs = ListPairs(self, owner, index)
        return pairs if self.eligible is None else pairs.at(self.eligible[pairs.slot])

    def all_pairs(self, ids: Tensor) -> ListPairs:
        """List objects with every anchor."""
        index = torch.arange(self.shape[1], device=ids.device)
        return self.pairs(ids.repeat_interleave(len(index)), index.repeat(len(ids)))

    def between(self, ids: Tensor, low: Tensor, high: Tensor) -> ListPairs:
        """List objects with the anchors whose centres lie in a rectangle of each object and level,
        and a few more.

        Args:
            low, high: (g, L, 2) corners in pixels.
        """
        pairs = [(ids[:0], ids[:0]), *anchors_between(self.anchors, low, high)]
        owner, index = (torch.cat(x) for x in zip(*pairs, strict=True))
        return self.pairs(ids[owner], index)

    def square_around(self, ids: Tensor, radius: float | Tensor) -> tuple[Tensor, Tensor]:
        """(g, L, 2) corners of squares around the centres of objects.

        Args:
            radius: half a side, in strides: a number, or (g, L, 1).
        """
        middle = centres(self.objects[ids])[:, None]
        half = radius * self.anchors.lattice[:, :1]
        return middle - half, middle + half

    def around(self, ids: Tensor, radius: float) -> ListPairs:
        """List objects with the anchors whose centres lie in the square around theirs, and a few
        more."""
        return self.between(ids, *self.square_around(ids, radius))

    def central(self, ids: Tensor, radius: float | Tensor) -> ListPairs:
        """List objects with the anchors that lie inside them and in the square around their
        centres, and a few more."""
        low, high = self.square_around(ids, radius)
        boxes = self.objects[ids, None]
        low, high = torch.maximum(boxes[..., :2], low), torch.minimum(boxes[..., 2:], high)
        return self.between(ids, low, high)

    def near(self, ids: Tensor, least: Tensor | None = None) -> ListPairs:
        """List objects with the anchors whose predicted boxes are similar: see
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
        """List (s,) anchors among the N * R with every object of their images."""
        image = slots.div(self.shape[1], rounding_mode="floor")
        ids = self.all_objects[self.gt.image_index[self.all_objects].sort(stable=True).indices]
        count = torch.bincount(self.gt.image_index[ids], minlength=self.shape[0])
        each, first = count[image], (count.cumsum(0) - count)[image]
        which = torch.arange(len(slots), device=ids.device).repeat_interleave(each)
        place = torch.arange(len(which), device=ids.device) - (each.cumsum(0) - each)[which]
        return ListPairs(self, ids[first[which] + place], (slots % self.shape[1])[which])

    def highest_overlaps(self, k: int) -> Tensor:
        """(G, k) the highest similarities of each object with any eligible anchor, then 0."""
        return self.once(("highest overlaps", k), lambda: self._highest_overlaps(k))

    def _highest_overlaps(self, k: int) -> Tensor:
        highest = self.objects.new_zeros(len(self.gt), k)
        for ids in self.pieces(self.all_objects, self.shape[1]):
            # The k-th highest at the objects' centres is a lower bound of the k-th of all.
            central = self.around(ids, 1.5)
            pairs = self.near(ids, central.kth_highest(central.overlap, k)[ids])
            best = pairs.rows(pairs.overlap, 0)
            best = best.topk(min(k, best.shape[1])).values
            highest[pairs.row_ids, : best.shape[1]] = best
        return highest

    def background_of(self, loss: ClassLoss, slots: Tensor) -> Tensor:
        """(P,) float64 class loss of anchors among the N * R without an object. Computed for those
        that are asked for."""
        slots_of_all = self.shape[0] * self.shape[1]
        known = self.once(
            ("background of", loss), lambda: self.objects.new_full((slots_of_all,), torch.nan)
        )
        asked = torch.zeros_like(known, dtype=torch.bool)
        asked[slots] = True
        new = (asked & known.isnan()).nonzero().squeeze(1)
        for some in self.pieces(new, self.classes.shape[1]):
            known[some] = self.sum_over_classes(loss, self.classes[some])
        return known[slots]

    def scores(self, gt_index: Tensor, score) -> Tensor:
        """(N, R) float32 ``score`` of the matches, 0 elsewhere.

        Args:
            gt_index: (N, R) int64 into G, or BACKGROUND.
        """
        image, index = (gt_index >= 0).nonzero(as_tuple=True)
        scores = self.gt.boxes.new_zeros(self.shape)
        pairs = ListPairs(self, gt_index[image, index], index)
        scores[image, index] = score(pairs).float()
        return scores
