"""Sinkhorn iterations for optimal transport between objects, background and anchors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .conflicts import LOWEST, NO_OBJECT, keep_best

# Added to each supply and each demand, as in the authors' code.
SURPLUS = 1e-8
# Cost of impossible pairs, and least sum of a row.
NEVER, TINY = 1e30, 1e-300
# Parts that differ by less than a step of 1 / STEPS are equal.
STEPS = 2.0**32
# Iterations between those with logarithms.
RENEW = 10


class Columns(NamedTuple):
    """Anchors of a transport: C of each image, among them all that have pairs.

    Attributes:
        column: (g, M) int64 anchor of each pair, into the N * C.
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
    """Transport labels from objects and background to the anchors of each image by Sinkhorn's
    algorithm (OTA, arXiv 2103.14259, algorithm 1).

    The plan is exp(u + v - cost / regularisation) with logarithmic factors u of rows (objects and
    background) and v of anchors. An iteration scales columns to the demand of 1, then rows to their
    supply, by factors between 1e-8 / R and G R, so within RENEW iterations no relevant entry
    overflows or vanishes. The first iteration, an exception, and every RENEW-th after it are
    computed with logarithms.

    Args:
        cost: (g, M) float64 of pairs, infinite if impossible.
        supply: (g,) number of labels of each object.
        image: (g,) int64 of each object, in rising order.
        num_anchors: R of each image.
        regularisation: weight of the entropy.

    Returns:
        (g, M) bool: pairs with the largest entry of their anchor, relative to the largest of their
            row; of equal ones the lower object, and an object rather than the background.
    """
    column, background = columns
    if not background.numel():
        return cost < torch.inf  # no pair is possible
    index, shape = column.flatten(), background.shape
    num_others = num_anchors - shape[1]  # anchors without pairs, of each image
    possible = cost < torch.inf
    has_pairs = possible.any(dim=1, keepdim=True)
    supply = supply.to(cost.dtype)[:, None] * has_pairs
    supply_bg = supply.new_full((len(background), 1), num_anchors)
    supply_bg = supply_bg.index_add(0, image, supply, alpha=-1).clamp(min=0)
    # The unit is the demand of an anchor.
    supply, supply_bg = ((x + SURPLUS) / (1 + SURPLUS) for x in (supply, supply_bg))
    supply = supply * has_pairs

    cost = (cost / regularisation).masked_fill(~possible, NEVER)
    cost_bg = background / regularisation
    u_bg = torch.zeros_like(supply_bg)
    v = cost_bg.flatten().scatter_reduce(0, index, cost.flatten(), "amin")
    plan, plan_bg = (v[column] - cost).exp(), (v.view(shape) - cost_bg).exp()
    for start in range(0, iterations, RENEW):
        total = plan_bg.flatten().scatter_add(0, index, plan.flatten())
        v = v - total.log()
        plan, plan_bg = v[column] - cost, v.view(shape) - cost_bg
        u = supply.log() - plan.logsumexp(dim=1, keepdim=True)
        sum_bg = plan_bg.logsumexp(dim=1, keepdim=True)
        if num_others:  # the background supplies each of them whole
            sum_bg = torch.logaddexp(sum_bg, math.log(num_others) - u_bg)
        before, u_bg = u_bg, supply_bg.log() - sum_bg
        plan, plan_bg = (u + plan).exp(), (u_bg + plan_bg).exp()

        # Factors since the logarithms, of objects, background and anchors.
        rows, row_bg, scale = (
            torch.ones_like(supply),
            torch.ones_like(supply_bg),
            torch.ones_like(v),
        )
        before = (before - u_bg).exp()
        for _ in range(min(RENEW, iterations - start) - 1):
            total = (plan_bg * row_bg).flatten()
            total = total.scatter_add(0, index, (plan * rows).flatten())
            scale = total.reciprocal()
            sums = (plan * scale[column]).sum(dim=1, keepdim=True)
            sum_bg = (plan_bg * scale.view(shape)).sum(dim=1, keepdim=True)
            if num_others:
                sum_bg = sum_bg + num_others / row_bg
            rows = supply / sums.clamp(min=TINY)
            before, row_bg = row_bg, supply_bg / sum_bg
        u_bg, v = u_bg + row_bg.log(), v + scale.log()
        plan = plan * rows * scale[column]
        plan_bg = plan_bg * row_bg * scale.view(shape)

    largest_bg = plan_bg.amax(dim=1, keepdim=True)
    if num_others:
        largest_bg = torch.maximum(largest_bg, row_bg / before)
    # Steps, because rounding must not decide between equal entries.
    part = (plan / plan.amax(dim=1, keepdim=True) * STEPS).round()
    part_bg = (plan_bg / largest_bg * STEPS).round()
    best = part.new_full((part_bg.numel(),), LOWEST)
    owner = torch.full_like(best, NO_OBJECT, dtype=torch.int64)
    row = torch.arange(len(cost), device=cost.device)[:, None]
    rank = part.masked_fill(~possible, -torch.inf).flatten()
    keep_best(best, owner, index, row.expand_as(cost).flatten(), rank, True)
    owner = owner.masked_fill(best < part_bg.flatten(), NO_OBJECT)
    return possible & (owner[column] == row)
