"""Rows of different lengths in a flat list, and the cheapest of each row."""

import torch
from torch import Tensor


class Segments:
    """Table whose rows are the runs of equal ids in a flat list.

    Args:
        ids: (P,) int64, equal ones adjacent.

    Attributes:
        ids: (S,) id of each row.
        count: (S,) number of values of each row.
        row, column: (P,) position of each value.
    """

    def __init__(self, ids: Tensor):
        self.ids, self.row, self.count = torch.unique_consecutive(
            ids, return_inverse=True, return_counts=True
        )
        start = self.count.cumsum(0) - self.count
        self.column = torch.arange(len(ids), device=ids.device) - start[self.row]

    def table(self, values: Tensor, fill: float) -> Tensor:
        """Return (S, M): the (P,) values of each row, then ``fill``."""
        width = int(self.count.max()) if len(self.count) else 0
        table = values.new_full((len(self.count), width), fill)
        table[self.row, self.column] = values
        return table


def cheapest(cost: Tensor, k: int | Tensor, max_k: int) -> Tensor:
    """Return (g, M) bool: the k lowest finite costs of each row; of equal costs the first.

    Args:
        cost: (g, M).
        k: a number, or (g,) int64.
        max_k: at least the largest k.
    """
    # ``topk`` orders equal values arbitrarily, so only the k-th value is used, as a threshold.
    lowest = cost.topk(min(max_k, cost.shape[1]), dim=1, largest=False).values
    if isinstance(k, Tensor):
        k = k.clamp(max=lowest.shape[1])[:, None]
        last = lowest.gather(1, k - 1)
    else:
        k, last = lowest.shape[1], lowest[:, -1:]
    below = cost < last
    equal = cost == last
    num_equal = k - below.sum(dim=1, keepdim=True)
    selected = below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= num_equal))
    return selected & (cost < torch.inf)
