"""Conflicts: several objects choose one anchor, and one of them gets it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..structures import BACKGROUND, GroundTruth
from .batch import AssignmentBatch

# Higher than the index of any object.
NOBODY = torch.iinfo(torch.int64).max


def keep_best(best: Tensor, owner: Tensor, slot: Tensor, claimant: Tensor, rank: Tensor) -> None:
    """Give anchors, in place, to the claimants of highest rank; of equal ranks the lower object wins.
    A batch in pieces calls it once a piece.

    Args:
        best, owner: (S, ...) highest rank and object of each anchor so far; -inf and NOBODY at
            first.
        slot: (M, ...) int64 into dimension 0 of these.
        claimant: int64 objects, which broadcast to (M, ...).
        rank: (M, ...); -inf claims nothing.
    """
    before = best.gather(0, slot)
    best.scatter_reduce_(0, slot, rank, "amax")
    now = best.gather(0, slot)
    # An anchor whose rank rises loses its owner. All its pairs write the same value.
    owner.scatter_(0, slot, owner.gather(0, slot).masked_fill_(now > before, NOBODY))
    wins = (rank == now).logical_and_(rank > -torch.inf)
    owner.scatter_reduce_(0, slot, torch.where(wins, claimant, NOBODY), "amin")


def assign_best(gt: GroundTruth, index: Tensor, affinity: Tensor, num_anchors: int) -> Tensor:
    """Give each anchor of each image to its pair of highest affinity (paper, section 4.1: of several
    objects the one with the highest IoU); of equal affinities the lower object gets it.

    Args:
        gt: G objects of N images.
        index: (C, G) int64 into R, the candidates of each object, each at most once.
        affinity: (C, G); -inf where the anchor is not positive for the object.
        num_anchors: R.
    Returns:
        (N, R) int64 into G, or BACKGROUND.
    """
    slots = gt.num_images * num_anchors
    slot = (gt.image_index * num_anchors + index).flatten()
    best = affinity.new_full((slots,), -torch.inf)
    owner = slot.new_full((slots,), NOBODY)
    claimant = torch.arange(len(gt), device=slot.device).expand_as(affinity)
    keep_best(best, owner, slot, claimant.flatten(), affinity.flatten())
    return owner.masked_fill_(owner == NOBODY, BACKGROUND).view(gt.num_images, -1)


class Conflicts:
    """Which objects choose each anchor of each image, and which of them gets it, for pairs in pieces.

    Args:
        batch: of the images.
        counted: whether an anchor that one object chooses goes to it whatever others pay; if several
            choose it, to the one of highest rank of all that compete.
    """

    def __init__(self, batch: AssignmentBatch, counted: bool = False):
        self.best = batch.objects.new_full((batch.num_slots,), -torch.inf)
        self.owner = batch.gt.image_index.new_full((batch.num_slots,), NOBODY)
        self.claims = torch.zeros_like(self.owner, dtype=torch.int32) if counted else None
        self.claimant = torch.full_like(self.owner, NOBODY) if counted else self.owner

    def claim(self, pairs: Any, chosen: Tensor) -> None:
        """Count the (...) pairs that are chosen. A rule that does not count has no need to."""
        if self.claims is not None:
            number, claimant = chosen.int(), torch.where(chosen, pairs.owner, NOBODY)
            shape = pairs.address.shape
            pairs.view(self.claims).scatter_add_(0, pairs.address, number.view(shape))
            claimants = pairs.view(self.claimant)
            claimants.scatter_reduce_(0, pairs.address, claimant.view(shape), "amin")

    def compete(self, pairs: Any, rank: Tensor) -> None:
        """Let (...) pairs compete for their anchors; with a rank of -inf they do not."""
        shape = pairs.address.shape
        owner = pairs.owner.expand_as(rank).reshape(shape)
        best, owners = pairs.view(self.best), pairs.view(self.owner)
        keep_best(best, owners, pairs.address, owner, rank.reshape(shape))

    def above(self, cost: float) -> Tensor:
        """(s,) int64 anchors that several objects choose and that cost their owners so much or
        more."""
        assert self.claims is not None
        return ((self.claims > 1) & (self.best <= -cost)).nonzero().squeeze(1)

    def settle(self) -> Tensor:
        """(N * R,) int64 into G, or BACKGROUND."""
        owner = self.owner
        if self.claims is not None:
            owner = torch.where(self.claims > 1, owner, self.claimant)
        return owner.masked_fill(owner == NOBODY, BACKGROUND)
