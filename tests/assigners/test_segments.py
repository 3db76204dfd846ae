import numpy as np
import pytest
import torch

from atss.assigners.segments import Segments, cheapest


def test_cheapest_selects_the_first_of_equal_costs():
    """Three costs are at most the second lowest: the lowest is the last of them."""
    cost = torch.tensor([[2.0, 2, 1]])
    assert cheapest(cost, 2, 2).tolist() == [[True, False, True]]
    assert cheapest(cost, torch.tensor([2]), 3).tolist() == [[True, False, True]]
    assert cheapest(cost, 5, 5).tolist() == [[True, True, True]]


@pytest.mark.parametrize("seed", range(5))
def test_cheapest_equals_a_sort_of_each_segment(seed):
    """Costs from 0 to 3, most of which tie, and infinite ones; segments of any length and k."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 9, 30)
    cost = rng.choice([0.0, 1.0, 2.0, 3.0, np.inf], count.sum())
    k = rng.integers(1, 7, 30)
    ids = np.repeat(rng.permutation(30), count)
    segments = Segments(torch.tensor(ids))
    table = segments.table(torch.tensor(cost), torch.inf)
    chosen = cheapest(table, torch.tensor(k), 6)[segments.row, segments.column]
    first = 0
    for length, wanted in zip(count, k, strict=True):
        values = cost[first : first + length]
        order = np.argsort(values, kind="stable")[:wanted]
        best = [i for i in order if values[i] < np.inf]
        assert chosen[first : first + length].nonzero().squeeze(1).tolist() == sorted(best)
        first += length
