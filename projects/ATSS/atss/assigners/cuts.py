"""Cuts: which of its candidates an object chooses, by what they cost."""

import importlib.util
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .matching import cheapest, in_order
from .pairs import NOBODY, keep_best
from .scene import Pairs, Scene, Segments


@dataclass(frozen=True)
class Cheapest:
    """A fixed number.

    Args:
        k: of each object.
    """

    k: int

    def __call__(self, pairs: Pairs, cost: Tensor) -> Tensor:
        """(P,) bool."""
        segments = Segments(pairs.owner)
        return cheapest(segments, cost, torch.full_like(segments.ids, self.k))


@dataclass(frozen=True)
class DynamicK:
    """As many as an object's best predicted boxes are similar to it, added up, rounded down, and at
    least one (OTA, arXiv 2103.14259, section 3.3).

    Args:
        top_k: how many similarities are added.
    """

    top_k: int

    def __call__(self, pairs: Pairs, cost: Tensor) -> Tensor:
        """(P,) bool."""
        segments = Segments(pairs.owner)
        return cheapest(segments, cost, self.wants(pairs.scene)[segments.ids])

    def wants(self, scene: Scene) -> Tensor:
        """(G,) int64, from all anchors that take part."""
        return scene.once(self, lambda: self._count(scene))

    def _count(self, scene: Scene) -> Tensor:
        k = torch.ones_like(scene.gt.classes)
        for some in scene.pieces(scene.every(), len(scene.anchors.boxes)):
            objects, wanted = self.of(scene.most_similar(some, self.top_k))
            k[objects] = wanted
        return k

    def of(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The objects of some pairs, (S,) int64 into G, and how many each wants of these."""
        segments = Segments(pairs.owner)
        table = segments.table(pairs.overlap, 0)
        best = table.topk(min(self.top_k, table.shape[1])).values
        return segments.ids, best.sum(dim=1).long().clamp(min=1)


@dataclass(frozen=True)
class OneEach:
    """One candidate for each object and none for two, so that those of an image together cost the
    least: a bipartite matching, which SciPy finds on the host while a GPU waits.

    Args:
        nothing: what it costs an object to get none.

    Raises:
        ValueError: where SciPy is not installed.
    """

    nothing: float

    def __post_init__(self) -> None:
        if importlib.util.find_spec("scipy") is None:
            raise ValueError("it matches by SciPy, which is not installed: pip install scipy")

    def __call__(self, pairs: Pairs, cost: Tensor) -> Tensor:
        """(P,) bool."""
        worth = cost < self.nothing
        some, costs = pairs.at(worth), cost[worth].cpu()
        image = pairs.scene.gt.image_index[some.owner].cpu()
        owner, slot = some.owner.cpu(), some.slot.cpu()
        taken = torch.zeros_like(costs, dtype=torch.bool)
        for i in image.unique():
            own = (image == i).nonzero().squeeze(1)
            taken[own] = self._of_image(owner[own], slot[own], costs[own])
        chosen = torch.zeros_like(worth)
        chosen[worth] = taken.to(chosen.device)
        return chosen

    def _of_image(self, owner: Tensor, slot: Tensor, cost: Tensor) -> Tensor:
        """(p,) bool, of pairs that are all worth it."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import min_weight_full_bipartite_matching

        segments = Segments(owner)
        slots, column = slot.unique(return_inverse=True)
        # Beside the anchors each object has a column of its own: to get nothing.
        each = torch.arange(len(segments.ids))
        rows = torch.cat([segments.row, each])
        columns = torch.cat([column, len(slots) + each])
        costs = torch.cat([cost, cost.new_full(each.shape, self.nothing)])
        # A sparse matrix does not hold what costs 0. Older releases want indices of 32 bits.
        costs = costs - costs.min() + 1
        table = csr_array((costs.numpy(), (rows.int().numpy(), columns.int().numpy())))
        _, matched = min_weight_full_bipartite_matching(table)
        return column == torch.as_tensor(matched)[segments.row]


@dataclass(frozen=True)
class TwoGaussians:
    """Those that a mixture of two Gaussians over an object's costs finds likely to be good: up to
    where it is densest among those of its cheaper component (PAA, arXiv 2007.08103, section 3.1 and
    figure 3c).

    Args:
        top_k: cheapest of each level, over which the mixture is fitted.
        take: of which costs: "component", those of the cheaper component, and none of an object
            with a single candidate (mmdet); "all", and all candidates where there is a single one,
            or none in the component (the authors).
    """

    top_k: int
    take: str
    # Log densities that differ by less are equal.
    TIE: ClassVar[float] = 1e-6

    def __call__(self, pairs: Pairs, cost: Tensor) -> Tensor:
        """(P,) bool."""
        chosen = torch.zeros_like(cost, dtype=torch.bool)
        pooled, segments, values = self.pool(pairs, cost)
        if not len(pooled):
            return chosen
        good, density = mixture(values)

        lonely = segments.count < 2
        if self.take == "all":
            lonely = lonely | ~good.any(dim=1)
        density = density.masked_fill(~good, -torch.inf)
        # Two values alone in a component lie where it is equally dense: the first, whatever
        # rounding says.
        highest = density >= density.amax(dim=1, keepdim=True) - self.TIE
        peak = highest.int().argmax(dim=1, keepdim=True)
        place = torch.arange(values.shape[1], device=cost.device)
        taken = place <= peak
        every = lonely[:, None]
        taken = taken | every if self.take == "all" else taken & good & ~every
        chosen[pooled[taken[segments.row, segments.column]]] = True
        return chosen

    def pool(self, pairs: Pairs, cost: Tensor) -> tuple[Tensor, Segments, Tensor]:
        """The pairs whose costs are fitted, in the order of objects and costs; as segments; and
        their costs, (S, top_k * L at most), infinite where an object has fewer."""
        anchors = pairs.scene.anchors
        of_level = pairs.owner * len(anchors.strides) + anchors.level_of(pairs.index)
        order = in_order((cost < torch.inf).nonzero().squeeze(1), cost, of_level)
        pooled = order[Segments(of_level[order]).column < self.top_k]
        pooled = in_order(pooled, cost, pairs.owner)
        segments = Segments(pairs.owner[pooled])
        return pooled, segments, segments.table(cost[pooled], torch.inf)


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


@dataclass(frozen=True)
class Transport:
    """The plan of an optimal transport: objects and background supply labels, each anchor wants one
    (OTA, arXiv 2103.14259, algorithm 1). An object supplies as many as :class:`DynamicK` says.

    Args:
        k: how many labels an object supplies.
        regularisation: of the entropy, in Sinkhorn's iteration.
        iterations: of it.
    """

    k: DynamicK
    regularisation: float
    iterations: int

    def __call__(self, pairs: Pairs, cost: Tensor, background: Tensor) -> Tensor:
        """
        Args:
            pairs: of all objects, at finite costs. An object without pairs gets nothing.
            background: (P,) what it costs the anchor of each pair to have no object.
        Returns:
            (P,) bool: pairs that get most of their anchor, as a share of the most that their object
            gives to any.
        """
        gt, eps = pairs.scene.gt, self.regularisation
        supply = cost.new_zeros(len(gt))
        objects, k = self.k.of(pairs)
        supply[objects] = k.to(cost.dtype)
        slot, column = pairs.slot.unique(return_inverse=True)
        nothing = cost.new_empty(len(slot)).scatter_(0, column, background)
        image = slot.div(len(pairs.scene.anchors.boxes), rounding_mode="floor")
        rest = cost.new_full((gt.num_images,), len(pairs.scene.anchors.boxes))
        # Anchors of no pair are the background's, all alike.
        others = rest.scatter_add(0, image, -cost.new_ones(len(image)))
        rest = rest.scatter_add(0, gt.image_index, -supply).clamp(min=0)
        demand = math.log1p(1e-8)

        u, v, b = cost.new_ones(len(gt)), cost.new_ones(len(slot)), torch.ones_like(rest)
        columns = torch.cat([column, torch.arange(len(slot), device=column.device)])
        images = torch.cat([image, torch.arange(len(rest), device=image.device)])

        def plan() -> tuple[Tensor, Tensor]:
            """Logarithms of what objects and background give to the anchors."""
            return (u[pairs.owner] + v[column] - cost) / eps, (b[image] + v - nothing) / eps

        for _ in range(self.iterations):
            v = v + eps * (demand - _logsumexp(torch.cat(plan()), columns, len(slot)))
            given, kept = plan()
            u = u + eps * ((supply + 1e-8).log() - _logsumexp(given, pairs.owner, len(gt)))
            kept = torch.cat([kept, others.log() + demand])
            before, b = b, b + eps * ((rest + 1e-8).log() - _logsumexp(kept, images, len(rest)))
        given, kept = plan()
        most = cost.new_full((len(gt),), -torch.inf)
        most.scatter_reduce_(0, pairs.owner, given, "amax")
        # What an anchor of no pair is given, whose column summed up before the last step.
        most_kept = torch.where(others > 0, demand + (b - before) / eps, -torch.inf)
        most_kept = most_kept.scatter_reduce(0, image, kept, "amax")
        given, kept = given - most[pairs.owner], kept - most_kept[image]
        # Of equal shares the lower object has it, and rather any object than the background.
        winner = torch.full_like(slot, NOBODY)
        keep_best(kept, winner, column, pairs.owner, given)
        return pairs.owner == winner[column]


def _logsumexp(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """(count,) of the values of each segment."""
    peak = values.new_full((count,), -torch.inf).scatter_reduce(0, segment, values, "amax")
    shares = (values - peak[segment]).exp()
    return peak + torch.zeros_like(peak).scatter_add(0, segment, shares).log()
