"""A search for the anchors that overlap objects, which need not compare all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..geometry import area, centres
from .conflicts import Conflicts
from .lists import ListPairs, Lists
from .locations import all_anchors, anchors_between, nearest_locations


@dataclass(frozen=True)
class AnchorIndex:
    """Anchors by level. Those of a level have few shapes, so an object's similarity with one of them
    bounds how far apart their centres can be.

    Args:
        batch: of objects; its similarity is that of anchors and objects.
    """

    batch: Lists

    def search(
        self, least: float, claims: bool, best_of_claimed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the object that each anchor overlaps most, and the anchors that each object overlaps
        most.

        Args:
            least: similarity from which on an anchor's best object is asked for.
            claims: whether an object's best anchors are asked for.
            best_of_claimed: whether the best objects of these are asked for, too, whatever their
                similarity.
        Returns:
            (N * R,) float64 similarity of the best object, (N * R,) int64 object, and (N * R,) int64
            last object of which it is a best anchor, -1 for none.
        """
        gt = self.batch.gt
        conflicts = Conflicts(self.batch)
        claimant = torch.full_like(conflicts.owner, -1)
        highest = self.batch.objects.new_zeros(len(gt))
        # Most pairs are of large objects with anchors of the fine levels, which their sizes exclude.
        limit = self.limits
        asked = limit.new_full((len(gt), 1), least)
        if claims:
            asked = asked.minimum(self.of_nearest[:, None])
        distance = self.max_distance(asked).masked_fill_((limit < asked)[..., None], -torch.inf)

        def compare(distance: Tensor) -> None:
            for pairs, overlap in self.within(distance):
                conflicts.compete(pairs, overlap)
                highest.scatter_reduce_(0, pairs.owner, overlap, "amax")

        compare(distance)
        if not claims:
            return conflicts.best, conflicts.owner, claimant
        for pairs, overlap in self.within(distance):
            claimed = (overlap == highest[pairs.owner]) & (overlap > 0)
            claimant.scatter_reduce_(
                0, pairs.slot, torch.where(claimed, pairs.owner, -1), "amax"
            )
        if best_of_claimed:
            # An object that did not ask for a claimed anchor may overlap it more than its claimant.
            claimed = (claimant >= 0).nonzero().squeeze(1)
            level = self.batch.anchors.level_of(claimed % self.batch.shape[1])
            best = limit.new_full(limit.shape[1:], torch.inf)
            best.scatter_reduce_(0, level, conflicts.best[claimed], "amin")
            more = self.max_distance(best.expand_as(limit))
            known = (more <= distance).all(dim=-1)
            compare(more.masked_fill_((known | (limit < best))[..., None], -torch.inf))
        return conflicts.best, conflicts.owner, claimant

    @cached_property
    def of_nearest(self) -> Tensor:
        """(G,) similarity of each object with its best anchor, or hardly less: of a shape, none is
        better than the one at the location nearest to the object's centre."""
        anchors, objects = self.batch.anchors, self.batch.objects
        index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(objects), 1))
        overlap = self.batch.similarity(anchors.boxes[index].double(), objects)
        return (overlap * valid * self.batch.nonempty).amax(dim=0) * (1 - 1e-9)

    @cached_property
    def limits(self) -> Tensor:
        """(G, L) upper bound of the similarity of each object with an anchor of each level: that of
        boxes of their sizes at one place."""
        objects, cells = torch.broadcast_tensors(self._sides[:, None, None], self._cells)
        laid = (torch.cat([-sides, sides], dim=-1) for sides in (objects / 2, cells / 2))
        # Rounding of boxes far from the origin must not exceed it.
        return self.batch.similarity(*laid).amax(dim=-1) + 1e-4

    def max_distance(self, least: Tensor) -> Tensor:
        """(G, L, 2) distance along x and y up to which the centres of an object and of an anchor of
        a level can be as similar as (G, L or 1) ``least``."""
        sides = self._sides[:, None] + self._cells.amax(dim=1)
        # Rounding must not leave out what is as similar as that.
        scale, distance = self.batch.similarity.reach(least * (1 - 1e-9))
        return scale * sides / 2 + distance + 1e-6

    def within(self, distance: Tensor) -> Iterator[tuple[ListPairs, Tensor]]:
        """Pieces of all pairs whose centres are within (G, L, 2) of each other, in the order of the
        objects, and their (P,) float64 similarities."""
        batch, middle = self.batch, centres(self.batch.objects)[:, None]
        for owner, index in anchors_between(batch.anchors, middle - distance, middle + distance):
            pairs = ListPairs(batch, owner, index)
            overlap = batch.similarity(batch.anchors.boxes[index].double(), pairs.objects)
            # No box code can describe an object without an area.
            yield pairs, overlap * (area(pairs.objects) > 0)

    @cached_property
    def _sides(self) -> Tensor:
        """(G, 2) width and height of the objects."""
        return (self.batch.objects[:, 2:] - self.batch.objects[:, :2]).clamp(min=0)

    @cached_property
    def _cells(self) -> Tensor:
        """(L, A, 2) float64 width and height of the anchors of a location of each level."""
        anchors = self.batch.anchors
        levels = anchors.boxes.split(anchors.per_level)
        cells = torch.stack([x[: anchors.num_anchors] for x in levels]).double()
        return cells[..., 2:] - cells[..., :2]
