"""Runs of a comparison: initial weights."""

import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from atss.analysis.runs import pair_weights


def build(row, seed):
    seed_all_rng(seed)
    return build_model(make_cfg(config=f"tables/{row}.yaml"))


@pytest.fixture(scope="module")
def first():
    return build("atss_point", 1)


@pytest.mark.parametrize("keep", [None, "backbone.bottom_up."])
def test_rows_begin_with_the_weights_of_the_first(first, keep):
    """Layers of the same name and shape get equal weights; all others keep theirs."""
    other, weights = build("retinanet_A1", 2), first.state_dict()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    pair_weights(other, first, keep)
    after = other.state_dict()
    kept = {x for x in after if keep and x.startswith(keep)}
    shared = {
        name
        for name in (after.keys() & weights.keys()) - kept
        if after[name].ndim > 1 and after[name].shape == weights[name].shape
    }
    assert {name.split(".")[0] for name in shared} == {"backbone", "head"}
    assert all(torch.equal(after[name], weights[name]) for name in shared)
    assert any(not torch.equal(after[name], before[name]) for name in shared)
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - shared)


def test_zeros_and_other_deviations_stay():
    model, other = torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)
    for factor in (0.0, 2.0):
        weight = model.weight.detach().clone()
        other.weight.data = weight.roll(1) * factor
        pair_weights(model, other)
        assert torch.equal(model.weight, weight)
