"""Conflicts: several objects select one anchor, which goes to one of them."""

from typing import Any

import torch
from torch import Tensor

from ..structures import BACKGROUND, GroundTruth
from .trace import active_trace, record_columns

NO_OBJECT = torch.iinfo(torch.int64).max  # above the index of every object
LOWEST = torch.finfo(torch.float64).min  # below every rank but -inf


def keep_best(
    best: Tensor, owner: Tensor, slot: Tensor, claimant: Tensor, rank: Tensor, first: bool
) -> None:
    """Give anchors, in place, to the claimants of highest rank; of equal ranks to the lower object.

    Args:
        best, owner: (S, ...) highest rank and object so far; at first LOWEST and NO_OBJECT.
        slot: (M, ...) int64 into dimension 0 of these.
        claimant, rank: (M, ...) int64 objects, and float64; -inf claims nothing.
        first: whether this is the first call.
    """
    before = None if first else best.gather(0, slot)
    best.scatter_reduce_(0, slot, rank, "amax")
    now = best.gather(0, slot)
    if before is not None:
        # An anchor whose rank rises loses its owner. All its pairs write the same value.
        owner.scatter_(0, slot, owner.gather(0, slot).masked_fill_(now > before, NO_OBJECT))
    owner.scatter_reduce_(0, slot, claimant.masked_fill(rank != now, NO_OBJECT), "amin")


class Conflicts:
    """The owner of each anchor of each image, from pairs that come in pieces.

    Attributes:
        best: (N * R,) float64 highest rank.
        owner: (N * R,) int64 object of highest rank, or NO_OBJECT.
        claims, claimant: (N * R,) int64 number of claims, and the lowest object that claims.
    """

    def __init__(self, gt: GroundTruth, num_anchors: int):
        self.shape = gt.num_images, num_anchors
        slots = gt.num_images * num_anchors
        self.best = gt.boxes.new_full((slots,), LOWEST, dtype=torch.float64)
        self.owner = gt.image_index.new_full((slots,), NO_OBJECT)
        self.claims: Any = None
        self.claimant: Any = None
        self.first = True

    def compete(self, pairs: Any, rank: Tensor) -> None:
        """Let (...) pairs compete for their anchors, unless their rank is -inf."""
        slot = pairs.address
        owner, rank = (x.expand(pairs.shape).reshape(slot.shape) for x in (pairs.owner, rank))
        best, owners = pairs.view(self.best), pairs.view(self.owner)
        keep_best(best, owners, slot, owner, rank, self.first)
        self.first = False

    def claim(self, pairs: Any, selected: Tensor) -> None:
        """Let the (...) selected pairs claim their anchors: an anchor with one claim goes to its
        claimant, whatever the ranks of others."""
        if self.claims is None:
            self.claims = torch.zeros_like(self.owner)
            self.claimant = torch.full_like(self.owner, NO_OBJECT)
        slot, claimant = pairs.address, pairs.owner.expand(pairs.shape)
        claimant = claimant.masked_fill(~selected, NO_OBJECT).view(slot.shape)
        pairs.view(self.claims).scatter_add_(0, slot, selected.long().view(slot.shape))
        pairs.view(self.claimant).scatter_reduce_(0, slot, claimant, "amin")

    def above_bound(self, cost: float) -> Tensor:
        """Return (M,) int64 anchors that several objects claim, none at a cost below ``cost``."""
        return ((self.claims > 1) & (self.best <= -cost)).nonzero().squeeze(1)

    def settle(self) -> Tensor:
        """Return (N, R) int64 into G, or BACKGROUND."""
        owner = self.owner
        if self.claims is not None:
            owner = torch.where(self.claims > 1, owner, self.claimant)
        return owner.masked_fill(owner == NO_OBJECT, BACKGROUND).view(self.shape)


def assign_best(gt: GroundTruth, index: Tensor, affinity: Tensor, num_anchors: int) -> Tensor:
    """Return (N, R) int64 into G, or BACKGROUND: the object of highest affinity of each anchor
    (paper, section 4.1: of highest IoU); of equal affinities the lower object.

    Args:
        gt: G objects of N images.
        index: (C, G) int64 into R, the candidates of each object, each at most once.
        affinity: (C, G) float64; -inf if the anchor is not positive for the object.
        num_anchors: R.
    """
    if (trace := active_trace()) and not trace.pairs:  # a rule that records nothing itself
        unknown = torch.full_like(affinity, torch.nan)
        every = torch.ones_like(index, dtype=torch.bool)
        record_columns(trace, index, affinity > -torch.inf, every, similarity=unknown)
    conflicts = Conflicts(gt, num_anchors)
    slot = (gt.image_index * num_anchors + index).flatten()
    claimant = torch.arange(len(gt), device=slot.device).expand_as(affinity)
    keep_best(conflicts.best, conflicts.owner, slot, claimant.flatten(), affinity.flatten(), True)
    return conflicts.settle()
