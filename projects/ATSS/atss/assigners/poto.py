"""Prediction-aware one-to-one assignment, by bipartite matching."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, arg
from .lists import ListPairs, Lists
from .matching import Matching
from .pairs import CandidatePairs, alignment
from .similarities import IOU, Similarity
from .tables import Tables


@dataclass(frozen=True)
class POTO(Matching):
    """One anchor per object, for detection without NMS (arXiv 2012.03544): the bipartite matching
    of highest total p^(1 - alpha) * IoU^alpha, among anchors inside their object and near its
    centre. Score: the IoU.

    An object without a free anchor has none; the authors' code gives it one elsewhere, with
    negative distances to the sides. SciPy matches on the host: a GPU waits for one copy each way.

    Args:
        radius: largest distance from the centre, in strides along both axes.

    Raises:
        UserError: if SciPy is not installed.
    """

    # Cost of an object without an anchor, in the authors' code.
    UNMATCHED: ClassVar[float] = 1.0
    together: ClassVar[bool] = True

    alpha: float = arg(0.8, low=0, high=1)
    radius: float = arg(1.5, low=1e-6)
    similarity: Similarity = IOU

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("scipy") is None:
            raise UserError("POTO needs SciPy, which is not installed: pip install scipy")

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        pairs = batch.central(ids, self.radius)
        return pairs.at(pairs.is_central(self.radius))

    def tables(self, batch: Tables) -> Iterable[Any]:
        return [batch.window(self.radius)]

    def cost(self, pairs: CandidatePairs) -> Tensor:
        quality = alignment(pairs, 1 - self.alpha, self.alpha)
        return torch.where(pairs.is_central(self.radius), -quality, torch.inf)

    def select(self, pairs: Any, cost: Tensor) -> Tensor:
        costs = pairs.rows(cost, torch.inf)
        # One copy to the host. Slots are integers below 2^53, exact in float64.
        host, slots = torch.stack([costs, pairs.rows(pairs.slot, 0).double()]).cpu().numpy()
        matched = torch.from_numpy(match_one_each(host, slots, self.UNMATCHED))
        matched = matched.to(costs.device, non_blocking=True)
        column = torch.arange(costs.shape[1], device=costs.device)
        return pairs.from_rows(column == matched[:, None])

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity  # does not matter: no two objects select one anchor

    def score(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity


def match_one_each(cost: np.ndarray, slot: np.ndarray, unmatched: float) -> np.ndarray:
    """Match each row with at most one slot, and each slot with at most one row, at the least cost.

    Args:
        cost, slot: (g, M) of pairs, and their anchors as integers; images share no slots.
        unmatched: cost of a row without a slot.

    Returns:
        (g,) int64 column of the pair of each row, or -1.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    matched = np.full(len(cost), -1, dtype=np.int64)
    row, column = np.nonzero(cost < unmatched)
    if not len(row):
        return matched
    rows, row_of = np.unique(row, return_inverse=True)
    slots, slot_of = np.unique(slot[row, column], return_inverse=True)
    # Each row has one more slot: to stay unmatched.
    each = np.arange(len(rows))
    weights = np.concatenate([cost[row, column], np.full(len(rows), unmatched)])
    place = np.concatenate([row_of, each]), np.concatenate([slot_of, len(slots) + each])
    # A sparse matrix does not store zeros. Older releases need indices of 32 bits.
    weights = weights - weights.min() + 1
    graph = csr_array((weights, tuple(x.astype(np.int32) for x in place)))
    _, partner = min_weight_full_bipartite_matching(graph)
    chosen = slot_of == partner[row_of]
    matched[row[chosen]] = column[chosen]
    return matched
