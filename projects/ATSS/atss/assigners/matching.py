"""The frame of rules that choose among pairs of objects and anchors: cost, select, rank, score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anchors import Anchors
from ..deprecated import renamed_names
from ..errors import Checked, UserError, check_shape
from ..structures import BACKGROUND, Assignment, GroundTruth, Predictions
from .conflicts import Conflicts
from .engine import uses_tables
from .function_rule import FunctionRule
from .lists import ListPairs, Lists
from .segments import cheapest
from .similarities import IOU, Similarity
from .tables import Tables
from .trace import active_trace, record_pairs

__getattr__ = renamed_names(__name__)
MISSING = "{} must define the methods cost and select; with fallbacks also num_wanted"
NO_PREDICTIONS = "{} needs the predictions of a model, got none"
Candidates = Callable[[Lists, Tensor], ListPairs]  # batch, (g,) int64 objects -> pairs


class Matching(FunctionRule, Checked):
    """A rule in steps: pairs have costs, by which each object selects some; an anchor that several
    objects select goes to the pair of highest rank, then to the lower object; matches have scores.

    A subclass is a frozen dataclass. Pairs are a list on CPUs and a table on GPUs
    (:mod:`atss.assigners.engine`), so cost, rank and score are elementwise functions of them.

    Attributes:
        similarity: of predicted boxes and objects: the IoU of costs and scores.
        eligible_radius: see :class:`~atss.assigners.pairs.AssignmentBatch`.
        together: whether objects depend on each other, so that batches are never split.
        lists_only: whether the methods need (P,) pairs.
        rank: method: pairs -> (...). None: an anchor that several objects select goes to the
            cheapest of all its pairs, even of an object that did not select it.
        score: method: pairs -> (...) in [0, 1]; None for no scores. Its pairs are the matches; a
            table (N, R) also has anchors without an object, whose score is not used.
    """

    looks_at_predictions: ClassVar[bool] = True
    eligible_radius: ClassVar[Any] = None
    together: ClassVar[bool] = False
    lists_only: bool = False
    similarity: Similarity = IOU
    rank: Any = None
    score: Any = None

    def cost(self, pairs: Any) -> Tensor:
        """Return the (...) cost of each pair; infinite if it cannot be selected."""
        raise NotImplementedError(MISSING.format(type(self).__name__))

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        """Return (...) bool: the pairs that their objects select by their (...) costs."""
        raise NotImplementedError(MISSING.format(type(self).__name__))

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """List the pairs that (g,) objects can select: by default those of any similarity and those
        whose anchors lie inside. Others need an infinite cost, because tables contain them."""
        return batch.near(ids)

    def tables(self, batch: Tables) -> Iterable[Any]:
        """Return tables of the pairs that objects can select: by default all pairs."""
        return [batch.table(0, len(batch.gt))] if self.together else batch.tables()

    def fallbacks(self) -> Sequence[tuple[float, Candidates]]:
        """Return further candidates of lists, each with a lower bound of the cost of every pair
        that the candidates before do not list."""
        return ()

    def num_wanted(self, batch: Lists) -> Tensor:
        """Return (G,) int64 pairs that objects select if they can; for rules with fallbacks."""
        raise NotImplementedError(MISSING.format(type(self).__name__))

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """See :class:`~atss.structures.Assigner`.

        Raises:
            UserError: if the rule needs predictions and has none.
        """
        if predictions is None and self.looks_at_predictions:
            raise UserError(NO_PREDICTIONS.format(type(self).__name__))
        shape = gt.num_images, len(anchors.boxes)
        if not len(gt):
            gt_index = gt.image_index.new_full(shape, BACKGROUND)
            return Assignment(gt_index, None if self.score is None else gt.boxes.new_zeros(shape))
        args = anchors, gt, predictions, self.similarity, self.eligible_radius
        conflicts = Conflicts(gt, len(anchors.boxes))
        batch: Lists | Tables
        if uses_tables(gt.boxes.device) and not self.lists_only:
            batch = Tables(*args)
            for pairs in self.tables(batch):
                cost = self._costs(pairs)
                selected = self._checked("select", self.select(pairs, cost), pairs)
                self._enter(conflicts, pairs, cost, selected)
        else:
            batch = Lists(*args)
            self._match_lists(batch, conflicts)
        gt_index = conflicts.settle()
        return Assignment(gt_index, self.score and batch.scores(gt_index, self.score))

    def _costs(self, pairs: Any) -> Tensor:
        """Return the (...) cost of each pair; infinite if it is NaN or the pair impossible."""
        cost = self._checked("cost", self.cost(pairs), pairs).double()
        return cost.masked_fill(cost.isnan() | ~pairs.possible, torch.inf)

    def _checked(self, method: str, values: Tensor, pairs: Any) -> Tensor:
        """Return the values of a method, perhaps the user's own.

        Raises:
            UserError: naming the method, if the shape is not that of the pairs.
        """
        name = f"{type(self).__name__}.{method}"
        check_shape(name, values, pairs.shape)
        if method == "select" and values.dtype != torch.bool:
            raise UserError(f"{name} must return a tensor of bool, got {values.dtype}")
        return values

    def _enter(self, conflicts: Conflicts, pairs: Any, cost: Tensor, selected: Tensor) -> None:
        selected = selected & (cost < torch.inf)
        if self.rank is None:  # pairs that are not selected compete, too
            conflicts.claim(pairs, selected)
            conflicts.compete(pairs, -cost)
        else:
            rank = self._checked("rank", self.rank(pairs), pairs).double().expand(pairs.shape)
            conflicts.compete(pairs, rank.masked_fill(~selected, -torch.inf))

    # Lengths of lists depend on the data: torch.compile would break the graph at each.
    @torch.compiler.disable
    def _match_lists(self, batch: Lists, conflicts: Conflicts) -> None:
        all_objects = batch.all_objects
        for ids in [all_objects] if self.together else batch.pieces(all_objects, batch.shape[1]):
            self._match_objects(batch, ids, conflicts)
        fallbacks = self.fallbacks()
        if self.rank is None and fallbacks:
            # The winning cost exceeds the bound, so an object that never considered this anchor may
            # be cheaper: compare all.
            for slots in batch.pieces(conflicts.above_bound(fallbacks[0][0]), len(batch.gt)):
                pairs = batch.of_anchors(slots)
                conflicts.compete(pairs, -self._costs(pairs))

    def _match_objects(self, batch: Lists, ids: Tensor, conflicts: Conflicts) -> None:
        """Match (g,) objects. Those with fewer than ``num_wanted`` pairs below the bound are
        matched again with the next candidates."""
        fallbacks = self.fallbacks()
        stages = [self.candidates, *(candidates for _, candidates in fallbacks)]
        bounds = [*(bound for bound, _ in fallbacks), torch.inf]
        for candidates, bound in zip(stages, bounds, strict=True):
            pairs = candidates(batch, ids)
            cost = self._costs(pairs)
            selected = self._checked("select", self.select(pairs, cost), pairs)
            if fallbacks:
                below = pairs.owner[selected & (cost < bound)]
                count = torch.bincount(below, minlength=len(batch.gt))
                settled = (count >= self.num_wanted(batch)) | (bound == torch.inf)
                ids = ids[~settled[ids]]
                kept = settled[pairs.owner]
                pairs, cost, selected = pairs.at(kept), cost[kept], selected[kept]
            if trace := active_trace(self):
                possible = cost < torch.inf
                values = {"similarity": pairs.anchor_similarity}
                if batch.predictions is not None:
                    values = {"similarity": pairs.similarity, "probability": pairs.probability}
                    values["cost"] = cost
                chosen = selected & possible
                record_pairs(trace, pairs.owner, pairs.index, chosen, possible, **values)
            self._enter(conflicts, pairs, cost, selected)
            if not len(ids):
                break


def select_cheapest(pairs: Any, cost: Tensor, k: int | Tensor, max_k: int | None = None) -> Tensor:
    """Return (...) bool: the k cheapest pairs of each object with finite costs; of equal costs the
    first anchor.

    Args:
        k: a number, or (g,) int64 for each row of ``pairs.rows``.
        max_k: the largest k, if k is a tensor; None: the number of pairs of an object, which is
            slower.
    """
    rows = pairs.rows(cost, torch.inf)
    if isinstance(k, int):
        max_k = k
    return pairs.from_rows(cheapest(rows, k, rows.shape[1] if max_k is None else max_k))
