"""Mixtures of two Gaussians, fitted to many rows at once."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Log densities with a smaller difference are equal.
TIE = 1e-6


def select_cheap(values: Tensor, take: str) -> Tensor:
    """Return (S, M) bool: values up to the peak of the lower of two Gaussians.

    Args:
        values: (S, M) in rising order, then infinity.
        take: see :class:`~atss.assigners.PAA`.
    """
    count = (values < torch.inf).sum(dim=1)
    selected = torch.zeros_like(values, dtype=torch.bool)
    nonempty = count > 0
    if not nonempty.any():
        return selected
    width = int(count.max())
    values, single = values[nonempty, :width], count[nonempty] < 2
    component, density = mixture(values)
    if take == "all":
        single = single | ~component.any(dim=1)
    density = density.masked_fill(~component, -torch.inf)
    # Two values of a component have equal densities: the first is the peak, despite rounding.
    peak = density >= density.amax(dim=1, keepdim=True) - TIE
    up_to_peak = torch.arange(width) <= peak.int().argmax(dim=1, keepdim=True)
    if take == "all":
        selected[nonempty, :width] = (up_to_peak | single[:, None]) & (values < torch.inf)
    else:
        selected[nonempty, :width] = up_to_peak & component & ~single[:, None]
    return selected


def mixture(
    values: Tensor, tolerance: float = 1e-3, floor: float = 1e-6, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Fit two Gaussians to each row by expectation maximisation, from its lowest and highest value
    and variances of 1. Each row stops by itself.

    Args:
        values: (S, M) in rising order, at least one, then infinity.
        tolerance: least change of a row's mean log likelihood.
        floor: added to variances.

    Returns:
        (S, M) bool: the first Gaussian is more likely; and (S, M) log densities.
    """
    exists = (values < torch.inf).to(values.dtype)
    count = exists.sum(dim=1, keepdim=True)
    last = values.gather(1, count.long() - 1)
    middle = (values[:, :1] + last) / 2
    # Values are relative to the middle of their row, so that squares lose no digits.
    x = torch.where(exists > 0, values - middle, 0)
    mean = torch.cat([values[:, :1], last], dim=1) - middle  # (S, 2)
    fitted = torch.stack([torch.full_like(mean, 0.5), mean, torch.ones_like(mean)])
    tiny = 10 * torch.finfo(x.dtype).eps

    # Below: of the rows that have not stopped.
    rows, before = torch.arange(len(x), device=x.device), x.new_full((len(x),), -torch.inf)
    mask, row_x, powers = exists, x, torch.stack([exists, x, x * x], dim=2)
    current, size = fitted, count.squeeze(1)
    for _ in range(iterations):
        first, second = _log_densities(row_x, current)
        share = (first - second).sigmoid() * mask
        likelihood = ((second + F.softplus(first - second)) * mask).sum(dim=1) / size
        # (S, 2) each: per component the sums of shares, of x and of x^2.
        sums, sums_x, sums_squares = (torch.stack([share, mask - share], dim=1) @ powers).unbind(-1)
        sums = sums + tiny
        mean = sums_x / sums
        # Rounding may make it negative beside an outlier.
        variance = (sums_squares / sums - mean.square()).clamp(min=0) + floor
        current = torch.stack([sums / sums.sum(dim=1, keepdim=True), mean, variance])
        active = (likelihood - before).abs() >= tolerance
        before = likelihood
        if not active.all():
            fitted[:, rows] = current
            state = rows, mask, row_x, powers, size, before
            rows, mask, row_x, powers, size, before = (v[active] for v in state)
            current = current[:, active]
            if not len(rows):
                break
    fitted[:, rows] = current
    first, second = _log_densities(x, fitted)
    density = torch.where(exists > 0, torch.logaddexp(first, second), -torch.inf)
    return (first >= second) & (exists > 0), density


def _log_densities(x: Tensor, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Return (S, M) weighted log densities under each component, by (3, S, 2) weights, means and
    variances."""
    weight, mean, variance = fitted.movedim(2, 1)[..., None].unbind()  # (2, S, 1) each
    constant = weight.log() - (2 * math.pi * variance).log() / 2
    first, second = constant - (x - mean).square() / (2 * variance)
    return first, second
