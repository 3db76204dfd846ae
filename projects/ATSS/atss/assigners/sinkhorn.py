"""Sinkhorn iterations for optimal transport between objects, background and anchors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .conflicts import LOWEST, NOBODY, keep_best

# As in the authors' code each row supplies, and each anchor demands, so much more.
SURPLUS = 1e-8
# In place of the cost of a pair that is none, and of the sum of a row without pairs.
NEVER, TINY = 1e30, 1e-300
# Parts that agree to one step of so many are equal.
STEPS = 2.0**32
# Iterations until shares are computed from logarithms again.
RENEW = 10


class Columns(NamedTuple):
    """The anchors that take part in a transport: C of each image, all others are in no pair.

    Attributes:
        column: (g, M) int64 the anchor of each pair, into the N * C.
        background: (N, C) float64 cost of having no object.
    """

    column: Tensor
    background: Tensor


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

    An iteration scales the shares of each anchor, so that they add up to its demand, and then those
    of each row, so that they add up to its supply. It changes a sum by a factor between 1e-8 / R
    and G R, so within RENEW iterations no share that counts overflows or vanishes; the first
    iteration, of which that is not true, and every RENEW-th after it are computed with logarithms.

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
        that their object gives to any; of equal parts the lower object has it, and rather any
        object than the background.
    """
    column, background = columns
    if not background.numel():
        return cost < torch.inf  # no pair is possible
    flat, shape = column.flatten(), background.shape
    others = num_anchors - shape[1]
    possible = cost < torch.inf
    served = possible.any(dim=1, keepdim=True)
    supply = supply.to(cost.dtype)[:, None] * served
    rest = supply.new_full((len(background), 1), num_anchors)
    rest = rest.index_add(0, image, supply, alpha=-1).clamp(min=0)
    # One share is the demand of an anchor.
    supply, rest = ((x + SURPLUS) / (1 + SURPLUS) for x in (supply, rest))
    supply = supply * served

    paid = (cost / regularisation).masked_fill(~possible, NEVER)
    unpaid = background / regularisation
    # Logarithms of the factors of objects, background and anchors.
    of_object, of_rest = torch.zeros_like(supply), torch.zeros_like(rest)
    of_anchor = unpaid.flatten().scatter_reduce(0, flat, paid.flatten(), "amin")
    given, kept = (of_anchor[column] - paid).exp(), (of_anchor.view(shape) - unpaid).exp()
    for start in range(0, iterations, RENEW):
        total = kept.flatten().scatter_add(0, flat, given.flatten())
        of_anchor = of_anchor - total.log()
        given, kept = of_anchor[column] - paid, of_anchor.view(shape) - unpaid
        of_object = supply.log() - given.logsumexp(dim=1, keepdim=True)
        sum_kept = kept.logsumexp(dim=1, keepdim=True)
        if others:  # an anchor of no pair has one share, the background's
            sum_kept = torch.logaddexp(sum_kept, math.log(others) - of_rest)
        before, of_rest = of_rest, rest.log() - sum_kept
        given, kept = (of_object + given).exp(), (of_rest + kept).exp()

        by_object, by_rest = torch.ones_like(supply), torch.ones_like(rest)
        by_anchor = torch.ones_like(of_anchor)
        before = (before - of_rest).exp()
        for _ in range(min(RENEW, iterations - start) - 1):
            total = (kept * by_rest).flatten()
            total = total.scatter_add(0, flat, (given * by_object).flatten())
            by_anchor = total.reciprocal()
            sum_given = (given * by_anchor[column]).sum(dim=1, keepdim=True)
            sum_kept = (kept * by_anchor.view(shape)).sum(dim=1, keepdim=True)
            if others:
                sum_kept = sum_kept + others / by_rest
            by_object = supply / sum_given.clamp(min=TINY)
            before, by_rest = by_rest, rest / sum_kept
        of_object, of_rest, of_anchor = (
            x + y.log()
            for x, y in zip(
                (of_object, of_rest, of_anchor), (by_object, by_rest, by_anchor), strict=True
            )
        )
        given = given * by_object * by_anchor[column]
        kept = kept * by_rest * by_anchor.view(shape)

    most_kept = kept.amax(dim=1, keepdim=True)
    if others:
        most_kept = torch.maximum(most_kept, by_rest / before)
    # In steps, because rounding must not decide between equal parts.
    given = (given / given.amax(dim=1, keepdim=True) * STEPS).round()
    kept = (kept / most_kept * STEPS).round()
    best = given.new_full((kept.numel(),), LOWEST)
    owner = torch.full_like(best, NOBODY, dtype=torch.int64)
    row = torch.arange(len(cost), device=cost.device)[:, None]
    rank = given.masked_fill(~possible, -torch.inf).flatten()
    keep_best(best, owner, flat, row.expand_as(cost).flatten(), rank, True)
    owner = owner.masked_fill(best < kept.flatten(), NOBODY)
    return possible & (owner[column] == row)
