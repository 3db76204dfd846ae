"""A mixture of two Gaussians, fitted to many rows at once."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Log densities that differ by less are equal.
TIE = 1e-6


def good_ones(values: Tensor, take: str) -> Tensor:
    """(S, M) bool: the values of each row that a mixture of two Gaussians finds good.

    Args:
        values: (S, M) in rising order, then infinity.
        take: "component" or "all", see :class:`~atss.assigners.PAA`.
    """
    count = (values < torch.inf).sum(dim=1)
    good = torch.zeros_like(values, dtype=torch.bool)
    some = count > 0
    if not some.any():
        return good
    width = int(count.max())
    values, lonely = values[some, :width], count[some] < 2
    component, density = mixture(values)
    if take == "all":
        lonely = lonely | ~component.any(dim=1)
    density = density.masked_fill(~component, -torch.inf)
    # Two values alone in a component are equally dense: the first, whatever rounding says.
    highest = density >= density.amax(dim=1, keepdim=True) - TIE
    up_to_peak = torch.arange(width) <= highest.int().argmax(dim=1, keepdim=True)
    if take == "all":
        good[some, :width] = (up_to_peak | lonely[:, None]) & (values < torch.inf)
    else:
        good[some, :width] = up_to_peak & component & ~lonely[:, None]
    return good


def mixture(
    values: Tensor, tolerance: float = 1e-3, floor: float = 1e-6, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Two Gaussians fitted to each row by expectation maximisation, from its least and its greatest
    value, with variances of 1. Each row stops by itself.

    Args:
        values: (S, M) in rising order, one or more in each row, infinite where it ends.
        tolerance: a row stops where its mean log likelihood changes by less.
        floor: added to variances.
    Returns:
        (S, M) bool: which the first Gaussian is likelier to have made; and (S, M) log densities,
        -inf where a row ends.
    """
    there = (values < torch.inf).to(values.dtype)
    count = there.sum(dim=1, keepdim=True)
    last = values.gather(1, count.long() - 1)
    middle = (values[:, :1] + last) / 2
    # What rows have is counted from their middles, so that squares lose no digits.
    x = torch.where(there > 0, values - middle, 0)
    mean = torch.cat([values[:, :1], last], dim=1) - middle  # (S, 2)
    fitted = torch.stack([torch.full_like(mean, 0.5), mean, torch.ones_like(mean)])
    tiny = 10 * torch.finfo(x.dtype).eps

    rows, now = torch.arange(len(x), device=x.device), fitted
    known, at, powers, size = there, x, torch.stack([there, x, x * x], dim=2), count.squeeze(1)
    before = x.new_full((len(x),), -torch.inf)
    for _ in range(iterations):
        first, second = _log_densities(at, now)
        share = (first - second).sigmoid() * known
        likelihood = ((second + F.softplus(first - second)) * known).sum(dim=1) / size
        # (S, 2) each: of each component the sum of shares, of x and of x^2.
        sums, of_x, of_squares = (torch.stack([share, known - share], dim=1) @ powers).unbind(-1)
        sums = sums + tiny
        mean = of_x / sums
        # Rounding may leave less than nothing, beside an outlier.
        variance = (of_squares / sums - mean.square()).clamp(min=0) + floor
        now = torch.stack([sums / sums.sum(dim=1, keepdim=True), mean, variance])
        goes_on = (likelihood - before).abs() >= tolerance
        before = likelihood
        if not goes_on.all():
            fitted[:, rows] = now
            kept = (v[goes_on] for v in (rows, known, at, powers, size, before))
            rows, known, at, powers, size, before = kept
            now = now[:, goes_on]
            if not len(rows):
                break
    fitted[:, rows] = now
    first, second = _log_densities(x, fitted)
    density = torch.where(there > 0, torch.logaddexp(first, second), -torch.inf)
    return (first >= second) & (there > 0), density


def _log_densities(x: Tensor, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """(S, M) each: of (S, M) values under both components, with their weights.

    Args:
        fitted: (3, S, 2) weights, means, variances.
    """
    weight, mean, variance = fitted.movedim(2, 1)[..., None].unbind()  # (2, S, 1) each
    constant = weight.log() - (2 * math.pi * variance).log() / 2
    first, second = constant - (x - mean).square() / (2 * variance)
    return first, second
