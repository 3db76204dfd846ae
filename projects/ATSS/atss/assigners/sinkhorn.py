"""Sinkhorn iterations for optimal transport between objects, background and anchors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .conflicts import NOBODY, keep_best

# Each anchor demands one label and, as in the authors' code, this much more.
SURPLUS = 1e-8
# In place of the cost of a pair that is none.
NEVER = 1e30


class Columns(NamedTuple):
    """The anchors that take part in a transport.

    Attributes:
        column: (g, M) int64 the anchor of each pair, into the N * C.
        background: (N, C) float64 cost of having no object; infinite for no anchor.
        others: (N,) float64 number of anchors that are in no pair and no column; None for none.
    """

    column: Tensor
    background: Tensor
    others: Tensor | None


def transport(
    cost: Tensor,
    supply: Tensor,
    image: Tensor,
    columns: Columns,
    num_anchors: int,
    regularisation: float,
    iterations: int,
) -> Tensor:
    """Serve all objects and the background of each image at the least cost: objects and background
    supply labels, each anchor demands one (OTA, arXiv 2103.14259, algorithm 1).

    With costs and potentials in units of the regularisation, all shares of an anchor add up to one
    after its step. A row's step then multiplies them by its supply over the sum of its shares, which
    is between 1e-8 / R and R: so the next sum neither overflows nor vanishes, and only the first
    one is taken relative to the anchor's lowest cost.

    Args:
        cost: (g, M) float64 of pairs; infinite for none. Rows in the order of objects.
        supply: (g,) number of labels of each object.
        image: (g,) int64 of each object.
        columns: the anchors.
        num_anchors: R of each image.
        regularisation: of the entropy.
        iterations: of Sinkhorn's algorithm.
    Returns:
        (g, M) bool: pairs that get the largest part of their anchor, relative to the largest part
        that their object gives to any; of equal parts the lower object has it, and rather any object
        than the background.
    """
    column, background, others = columns
    possible = cost < torch.inf
    served = possible.any(dim=1, keepdim=True)
    demand = math.log1p(SURPLUS)
    supply = supply.to(cost.dtype)[:, None] * served
    rest = supply.new_full((len(background),), num_anchors)
    rest = rest.scatter_add(0, image, -supply[:, 0]).clamp(min=0)[:, None]
    # Shares are counted in what an anchor demands.
    log_supply = torch.where(served, (supply + SURPLUS).log() - demand, -torch.inf)
    log_rest = (rest + SURPLUS).log() - demand
    log_others = None if others is None else others[:, None].log()

    paid, unpaid = torch.where(possible, cost / regularisation, NEVER), background / regularisation
    flat, shape = column.flatten(), unpaid.shape
    of_object, of_rest = torch.zeros_like(log_supply), torch.zeros_like(log_rest)
    of_anchor = unpaid.flatten().scatter_reduce(0, flat, paid.flatten(), "amin")
    of_anchor = of_anchor.masked_fill(of_anchor == torch.inf, 0)
    given, kept, before = of_anchor[column] - paid, of_anchor.view(shape) - unpaid, of_rest
    for _ in range(iterations):
        total = (of_rest + kept).exp().flatten()
        total = total.scatter_add(0, flat, (of_object + given).exp().flatten())
        # A column without an anchor has a total of zero.
        of_anchor = of_anchor - total.clamp(min=1e-300).log()
        given, kept = of_anchor[column] - paid, of_anchor.view(shape) - unpaid
        of_object = log_supply - given.logsumexp(dim=1, keepdim=True)
        sum_kept = kept.logsumexp(dim=1, keepdim=True)
        if log_others is not None:  # an anchor of no pair keeps all: b + v - cost is 0
            sum_kept = torch.logaddexp(sum_kept, log_others - of_rest)
        before, of_rest = of_rest, log_rest - sum_kept

    given, kept = of_object + given, of_rest + kept
    given = given - torch.where(served, given.amax(dim=1, keepdim=True), 0)
    most_kept = kept.amax(dim=1, keepdim=True)
    if others is not None:
        most_kept = torch.maximum(most_kept, torch.where(others[:, None] > 0, of_rest - before, -torch.inf))
    best = given.new_full((kept.numel(),), -torch.inf)
    owner = torch.full_like(best, NOBODY, dtype=torch.int64)
    row = torch.arange(len(cost), device=cost.device)[:, None]
    rank = torch.where(possible, given, -torch.inf).flatten()
    keep_best(best, owner, flat, row.expand_as(cost).flatten(), rank)
    owner = owner.masked_fill(best < (kept - most_kept).flatten(), NOBODY)
    return possible & (owner[column] == row)
