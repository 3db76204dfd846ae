"""Rows of different lengths: values of a flat list side by side, and the cheapest of each row."""

import torch
from torch import Tensor


class Segments:
    """Equal ids of a flat list as the rows of a table.

    Args:
        ids: (P,) int64, equal ones beside each other.

    Attributes:
        ids: (S,) the id of each row, in their order.
        count: (S,) the number of values of each row.
        row, column: (P,) where each value stands in the table.
    """

    def __init__(self, ids: Tensor):
        self.ids, self.row, self.count = torch.unique_consecutive(
            ids, return_inverse=True, return_counts=True
        )
        start = self.count.cumsum(0) - self.count
        self.column = torch.arange(len(ids), device=ids.device) - start[self.row]

    def table(self, values: Tensor, fill: float) -> Tensor:
        """(S, M) the (P,) values of each row, then ``fill``."""
        width = int(self.count.max()) if len(self.count) else 0
        table = values.new_full((len(self.count), width), fill)
        table[self.row, self.column] = values
        return table


def cheapest(cost: Tensor, k: int | Tensor, most: int) -> Tensor:
    """Choose the k lowest costs of each row, as far as they are finite; of equal costs the first.

    Args:
        cost: (g, M).
        k: of each row: a number, or (g,) int64.
        most: at least the largest k.
    Returns:
        (g, M) bool.
    """
    # ``topk`` promises no order of equal values: the k-th value is the threshold, and of those
    # equal to it the first are taken.
    lowest = cost.topk(min(most, cost.shape[1]), dim=1, largest=False).values
    if isinstance(k, Tensor):
        k = k.clamp(max=lowest.shape[1])[:, None]
        last = lowest.gather(1, k - 1)
    else:
        k, last = lowest.shape[1], lowest[:, -1:]
    below = cost < last
    level = cost == last
    left = k - below.sum(dim=1, keepdim=True)
    chosen = below | (level & (level.cumsum(dim=1, dtype=torch.int32) <= left))
    return chosen & (cost < torch.inf)
