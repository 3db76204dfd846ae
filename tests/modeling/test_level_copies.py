"""Copies of shared layers: the same losses and gradients, by fewer operators."""

import copy
from functools import partial

import pytest
import torch
from detectron2.layers import ShapeSpec
from dispatch import Operators
from torch import nn

from atss import GridAnchorGenerator
from atss.modeling import ATSSHead, DynamicTower, TOODHead, VFNetHead, foreach
from atss.modeling.level_copies import for_levels

STRIDES = (8, 16, 32)
SHARED = {"in_channels": 32, "num_classes": 3, "num_convs": 2}
ATSS = partial(ATSSHead, **SHARED, num_levels=3)
DYNAMIC = ATSS(tower=DynamicTower(32, 3, 2))
TOOD = partial(
    TOODHead, **SHARED, num_levels=3, anchor_generator=GridAnchorGenerator(strides=STRIDES)
)
VFNET = partial(
    VFNetHead, **SHARED, input_shape=[ShapeSpec(channels=32, stride=s) for s in STRIDES]
)
HEADS = {
    "atss": ATSS(),
    "atss, class tower": ATSS(centerness="cls", num_anchors=2),
    "atss, distribution": ATSS(centerness="distribution", box_channels=32, bins=8),
    "atss, batch norm": ATSS(norm="BN"),
    "atss, deformable": ATSS(norm="", deform="v2"),
    "dynamic": DYNAMIC,
    "tood": TOOD(num_deform=1),
    "tood, batch norm": TOOD(norm="BN"),
    "vfnet": VFNET(deform="v1"),
}


def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 6), (2, 3), (1, 2))
    return [torch.randn(2, 32, *hw, generator=generator).requires_grad_() for hw in sizes]


def tensors_of(outputs) -> list[torch.Tensor]:
    outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
    return [x for output in outputs for x in output if isinstance(x, torch.Tensor)]


def run(head, monkeypatch, grouped, precision=None):
    """Outputs, gradients of features and parameters, buffers, and the operators."""
    monkeypatch.setattr(foreach, "ONE_BY_ONE", set() if grouped else {"cpu"})
    head, maps = copy.deepcopy(head), features()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in head.parameters():
            x.add_(0.1 * torch.randn(x.shape, generator=generator))
    with Operators() as operators:
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            outputs = tensors_of(head(maps))
        sum((x.float() * x.detach().float()).sum() for x in outputs).backward()
    found = {f"output {i}": x for i, x in enumerate(outputs)}
    found |= {f"feature {i}": x.grad for i, x in enumerate(maps)}
    found |= {name: x.grad for name, x in head.named_parameters()}
    return found | dict(head.named_buffers()), operators.count


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_are_equal(name, monkeypatch):
    (plain, before), (grouped, after) = (run(HEADS[name], monkeypatch, x) for x in (False, True))
    for key, x in plain.items():
        assert torch.equal(grouped[key], x), key
    # Two additions for each shared parameter, in place of four (two of each kind) for all.
    additions = [sum(n for k, n in x.items() if k in ("add", "add_")) for x in (before, after)]
    assert additions[0] - additions[1] >= 2 * 2 * 2 * 2
    assert 0 < sum(n for k, n in after.items() if k.startswith("_foreach_add")) <= 2 * 2 * 2


@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_equal_under_autocast(name, monkeypatch):
    """And so is the precision of what is predicted without it; gradients differ by rounding."""
    results = [run(HEADS[name], monkeypatch, x, torch.bfloat16) for x in (False, True)]
    (plain, before), (grouped, after) = results
    for key, x in plain.items():
        if key.startswith("output"):
            assert torch.equal(grouped[key], x), key
        else:
            assert grouped[key].dtype == x.dtype
            assert (grouped[key] - x).float().norm() <= 0.02 * x.float().norm() + 1e-6, key
    assert after["_to_copy"] < before["_to_copy"]


def layers():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


@pytest.fixture
def grouped(monkeypatch):
    monkeypatch.setattr(foreach, "ONE_BY_ONE", set())


def test_copies_share_hooks_and_buffers(grouped):
    shared, x = layers(), torch.randn(2, 3, 4, 4)
    seen, gradients = [], []
    shared[0].register_forward_hook(lambda module, inputs, output: seen.append(output.sum()))
    shared[0].weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    levels = for_levels(3, shared)
    sum(own(x).square().sum() for (own,) in levels).backward()
    assert len(seen) == 3
    assert len(gradients) == 1  # the sum, once
    assert torch.equal(gradients[0], shared[0].weight.grad)
    assert shared[1].num_batches_tracked == 3
    assert all(own[2] is shared[2] for (own,) in levels)
    assert [*shared.state_dict()] == [*layers().state_dict()]


def test_only_trained_parameters_have_aliases(grouped):
    shared = layers()
    shared[0].weight.requires_grad_(False)
    (copied,), _ = for_levels(2, shared)
    assert copied[0].weight is shared[0].weight
    assert copied[0].bias is not shared[0].bias
    assert copied[0].bias.data_ptr() == shared[0].bias.data_ptr()


def test_no_copies_without_gradients(grouped, monkeypatch):
    shared = layers()

    def copied(levels=2):
        return for_levels(levels, shared)[0][0] is not shared

    assert copied()
    assert not copied(levels=1)
    with torch.no_grad():
        assert not copied()
    with torch.inference_mode():
        assert not copied()
    monkeypatch.setattr(foreach, "is_traced", lambda: True)
    assert not copied()
    monkeypatch.undo()
    assert not copied()  # on a CPU
    shared.requires_grad_(False)
    monkeypatch.setattr(foreach, "ONE_BY_ONE", set())
    assert not copied()


def test_two_passes_before_one_backward(grouped):
    head, alone = ATSS(), []
    maps = features()
    for scale in (1.0, 2.0):
        head([scale * x for x in maps]).classes.sum().backward()
        alone.append(head.cls_score.weight.grad.clone())
        head.zero_grad()
    both = [head([scale * x for x in maps]).classes.sum() for scale in (1.0, 2.0)]
    sum(both).backward()
    torch.testing.assert_close(head.cls_score.weight.grad, sum(alone))
