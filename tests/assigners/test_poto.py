import numpy as np
import pytest
from conftest import make_gt
from predicted_scenes import predict

from atss import Anchors
from atss.assigners import (
    POTO,
)
from atss.assigners.lists import Lists
from atss.assigners.poto import match_one_each


def test_match_one_each_is_not_greedy():
    """A greedy first row would get the first slot, and leave a costly one to the second."""
    slots = np.tile(np.arange(3.0), (3, 1))
    cost = -np.array([[0.9, 0.8, -1.0], [0.85, 0.2, -1.0]])
    assert match_one_each(cost, slots[:2], 1.0).tolist() == [1, 0]
    # The last row stays unmatched; otherwise two others would cost 1.8 more.
    cost = -np.array([[0.9, 0.0, -1], [-1, 0.9, 0.0], [0.0, -1, -1]])
    assert match_one_each(cost, slots, 1.0).tolist() == [0, 1, -1]
    assert (match_one_each(np.minimum(cost, 0), slots, 2.0) >= 0).all()
    assert POTO.UNMATCHED == 1.0  # as the authors' -1
    # A pair at the cost of no pair is not selected.
    assert match_one_each(np.full((2, 3), 0.5), slots[:2], 0.5).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("p", "overlap", "alpha", "q"), [(0.3, 0.6, 0.8, 0.52233), (0.3, 0.6, 0.5, 0.424264)]
)
def test_poto_quality_by_hand(p, overlap, alpha, q):
    anchors = Anchors.grid((8, 8), strides=(8,), scales=(1.0,))
    batch = Lists(
        anchors,
        make_gt([[0, 0, 8, 8]]),
        predict([[[p]]], [[[0, 0, 8, 8 * overlap]]], probabilities=True),
    )
    cost = POTO(alpha).cost(batch.all_pairs(batch.all_objects))
    assert cost.item() == pytest.approx(-q, abs=1e-6)


def test_poto_needs_scipy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs SciPy, which is not installed: pip install"):
        POTO()
