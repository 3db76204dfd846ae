"""The frame of rules that choose among pairs of objects and anchors: cost, select, rank, score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..deprecated import renamed_names, warn
from ..errors import Checked, UserError
from ..structures import BACKGROUND, Assignment, GroundTruth, Predictions
from .conflicts import Conflicts
from .engine import uses_tables
from .lists import ListPairs, Lists
from .segments import cheapest
from .similarities import IOU, Similarity
from .tables import Tables

__getattr__ = renamed_names(__name__)
PerPair = Callable[[Any], Tensor]  # pairs -> (...)
Candidates = Callable[[Lists, Tensor], ListPairs]  # batch, (g,) int64 ids of objects


class Matching(Checked):
    """A rule in steps. Each of an object's pairs has a cost; the object selects pairs by their
    costs; an anchor that several objects select goes to the pair of highest rank, of equal ranks to
    the lower object; each match has a score.

    A subclass is a frozen dataclass with these methods. Pairs are a list on CPUs and a table on
    GPUs (:mod:`atss.assigners.engine`): cost, rank and score are elementwise functions of them.

    Attributes:
        similarity: of predicted boxes and objects.
        eligible_radius: see :class:`~atss.assigners.pairs.AssignmentBatch`.
        together: whether the choice of one object depends on that of others, so that their pairs
            are never cut into pieces.
        lists_only: whether the rule's functions need (P,) pairs, so that a GPU holds lists, too.
        rank: method: pairs -> (...); None: an anchor that several objects select goes to the
            cheapest of all its pairs, even of an object that did not select it.
        score: method: pairs -> (...) in [0, 1]; None if the rule has no score. Its pairs are the
            matches; in a table (N, R) of all anchors, of which those without an object do not
            count.
    """

    looks_at_predictions: ClassVar[bool] = True
    eligible_radius: ClassVar[Any] = None
    together: ClassVar[bool] = False
    lists_only: bool = False
    similarity: Similarity = IOU
    rank: Any = None
    score: Any = None

    def cost(self, pairs: Any) -> Tensor:
        """(...) cost of each pair; infinite for one that cannot be chosen."""
        raise NotImplementedError

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        """(...) bool: the pairs that their objects select by their (...) costs."""
        raise NotImplementedError

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """List the pairs that (g,) objects can select: by default those whose predicted boxes are
        similar at all or whose anchors lie inside. The cost of all others must be infinite, because
        a table holds them, too."""
        return batch.near(ids)

    def tables(self, batch: Tables) -> Iterable[Any]:
        """Return tables of the pairs that objects can select: by default all."""
        return [batch.table(0, len(batch.gt))] if self.together else batch.tables()

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """More candidates of a list, to try next, each with a lower bound of the cost of every pair
        that was not listed before."""
        return ()

    def num_wanted(self, batch: Lists) -> Tensor:
        """(G,) int64: pairs that each object selects if there are as many; for rules with
        fallbacks."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`.

        Raises:
            ValueError: without predictions, if the rule looks at them.
        """
        if predictions is None and self.looks_at_predictions:
            name = type(self).__name__
            raise UserError(f"{name} looks at what a model predicts, and there is none")
        shape = gt.num_images, len(anchors.boxes)
        if not len(gt):
            nothing = gt.image_index.new_full(shape, BACKGROUND)
            return Assignment(nothing, None if self.score is None else gt.boxes.new_zeros(shape))
        args = anchors, gt, predictions, self.similarity, self.eligible_radius
        conflicts = Conflicts(gt, len(anchors.boxes), counted=self.rank is None)
        batch: Lists | Tables
        if uses_tables(gt.boxes.device) and not self.lists_only:
            batch = Tables(*args)
            for pairs in self.tables(batch):
                cost = self._costs(pairs)
                self._claim(conflicts, pairs, cost, self.select(pairs, cost))
        else:
            batch = Lists(*args)
            self._match_lists(batch, conflicts)
        gt_index = conflicts.settle()
        score = None if self.score is None else batch.scores(gt_index, self.score)
        return Assignment(gt_index, score)

    def _costs(self, pairs: Any) -> Tensor:
        """(...) of each pair; infinite if it is NaN or the pair is not possible."""
        cost = self.cost(pairs)
        return cost.masked_fill(cost.isnan() | ~pairs.possible, torch.inf)

    def _claim(self, conflicts: Conflicts, pairs: Any, cost: Tensor, chosen: Tensor) -> None:
        if self.rank is None:
            conflicts.claim(pairs, chosen)
            conflicts.compete(pairs, -cost)
        else:
            rank = self.rank(pairs).expand(pairs.shape)
            conflicts.compete(pairs, rank.masked_fill(~chosen, -torch.inf))

    # Lengths of lists depend on the data: torch.compile would break the graph at each.
    @torch.compiler.disable
    def _match_lists(self, batch: Lists, conflicts: Conflicts) -> None:
        every = batch.all_objects
        for ids in [every] if self.together else batch.pieces(every, batch.shape[1]):
            self._match_objects(batch, ids, conflicts)
        fallbacks = self.fallbacks()
        if self.rank is None and fallbacks:
            # The winning cost exceeds the bound, so an object that never considered this anchor may
            # be cheaper: compare all.
            for slots in batch.pieces(conflicts.above(fallbacks[0][0]), len(batch.gt)):
                pairs = batch.of_anchors(slots)
                conflicts.compete(pairs, -self._costs(pairs))

    def _match_objects(self, batch: Lists, ids: Tensor, conflicts: Conflicts) -> None:
        """Match (g,) objects; those with fewer than ``num_wanted`` pairs below the bound are
        matched again with the next candidates."""
        fallbacks = self.fallbacks()
        stages = [self.candidates, *(candidates for _, candidates in fallbacks)]
        bounds = [*(bound for bound, _ in fallbacks), torch.inf]
        for candidates, bound in zip(stages, bounds, strict=True):
            pairs = candidates(batch, ids)
            cost = self._costs(pairs)
            chosen = self.select(pairs, cost)
            if fallbacks:
                wanted = self.num_wanted(batch)
                cheap = pairs.owner[chosen & (cost < bound)]
                count = torch.zeros_like(wanted).scatter_add_(0, cheap, torch.ones_like(cheap))
                settled = (count >= wanted) | (bound == torch.inf)
                ids = ids[~settled[ids]]
                kept = settled[pairs.owner]
                pairs, cost, chosen = pairs.at(kept), cost[kept], chosen[kept]
            self._claim(conflicts, pairs, cost, chosen)
            if not len(ids):
                break

    def __init__(self, *, cost: PerPair, cut: Callable[[Any, Tensor], Tensor], **functions: Any):
        """Deprecated: a rule of functions in place of methods, on lists.

        Args:
            cost, cut, functions: today's methods ``cost``, ``select``, ``candidates``,
                ``rank`` and ``score``; and the attributes ``together`` and ``similarity``.
        """
        instead = "the methods cost, select, rank and score, as docs/own_assigner.md shows"
        warn("Matching(cost=..., cut=...)", instead)
        if functions.pop("farther", None) or functions.pop("takes_part", None):
            raise TypeError(
                "Matching takes no farther and takes_part any more: write the methods fallbacks "
                "and num_wanted, and the attribute eligible_radius"
            )
        known = {"candidates", "rank", "score", "together", "similarity"}
        if not functions.keys() <= known:
            raise TypeError(f"Matching takes cost, cut, {sorted(known)}, not {sorted(functions)}")
        functions = {"rank": None, "score": None, "lists_only": True, **functions}
        self.__dict__.update(functions, cost=cost, select=cut)


def select_cheapest(pairs: Any, cost: Tensor, k: int | Tensor, max_k: int | None = None) -> Tensor:
    """(...) bool: the k cheapest pairs of each object, as far as their costs are finite; of equal
    costs the first anchor.

    Args:
        k: of each object: a number, or (g,) int64 of each row of ``pairs.rows``.
        max_k: the largest k, if that is a tensor: None for all pairs of an object, which takes
            longer.
    """
    rows = pairs.rows(cost, torch.inf)
    if isinstance(k, int):
        max_k = k
    return pairs.from_rows(cheapest(rows, k, rows.shape[1] if max_k is None else max_k))
