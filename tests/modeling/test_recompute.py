"""Accumulation and activation checkpointing change neither losses nor gradients."""

import copy
import pickle

import pytest
import torch
from conftest import TINY, WIDE_FOR_GN, make_cfg, make_input
from detectron2.modeling import build_model
from torch import nn

from atss.modeling.recompute import recompute_stages

GROUP_NORM = (
    *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"),
    *(x for item in (TINY | WIDE_FOR_GN).items() for x in item),
)
# The parts differ in size and number of objects; one has none.
BATCH = [
    make_input(boxes, [i % 3 for i in range(len(boxes))], hw=hw, seed=n)
    for n, (boxes, hw) in enumerate(
        [
            ([[20, 20, 60, 40]], (48, 64)),
            ([[5, 5, 30, 30], [10, 10, 30, 25], [4, 4, 10, 12]], (32, 32)),
            ([], (32, 48)),
            ([], (48, 32)),
            ([[0, 20, 15, 45]], (48, 48)),
            ([[30, 4, 45, 35], [1, 1, 20, 20]], (64, 48)),
            ([[5, 5, 25, 25]], (32, 32)),
            ([[5, 5, 25, 30], [0, 0, 15, 30]], (32, 40)),
        ]
    )
]


def step(model, batch=BATCH):
    """Return the losses, gradients and buffers of a training step."""
    torch.manual_seed(0)
    losses = model.train()(batch)
    sum(losses.values()).backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad}
    model.zero_grad()
    return {**losses}, gradients, {name: x.clone() for name, x in model.named_buffers()}


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = (value - other[name]).abs().max()
        assert difference <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("config", ["", "successors/TAL_dual_R_50_FPN_1x.yaml"])
def test_four_parts_of_two_equal_eight_images(config):
    """Also rules that use predictions, several normalisers, branches, and counts of positives."""
    torch.manual_seed(0)
    opts = ("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.ATSS.LEVEL_WEIGHT", "balance")
    model = build_model(make_cfg(*GROUP_NORM, *opts, config=config)).double()
    with torch.no_grad():  # otherwise the last layer of zeros hides most gradients
        for x in model.head.parameters():
            x += 0.01 * torch.randn_like(x)
    whole = step(copy.deepcopy(model))
    model.accumulate = 4
    parts = step(model)
    for kind, other in zip(whole, parts, strict=True):
        assert_close(kind, other, 1e-6)


def with_norms(*opts):
    torch.manual_seed(0)
    values = TINY | {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN"}
    model = build_model(make_cfg(*(x for item in values.items() for x in item), *opts))
    model.backbone.bottom_up.res2.insert(0, nn.Dropout2d(0.3))
    return model


def test_checkpointed_stages_change_no_bit():
    """Gradients, dropout and the statistics of batch norms; also of copies."""
    plain = step(with_norms())
    model = with_norms()
    recompute_stages(model.backbone)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    calls = count_calls(model)
    for x in (model, *copies):
        assert_equal(step(x), plain)
    assert len(calls) == 2
    model.eval()
    del calls[:]
    model(BATCH[:1])
    assert len(calls) == 1


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def count_calls(model):
    calls = []
    model.backbone.bottom_up.res2[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_batch_norms_count_each_part_once():
    model = with_norms("SOLVER.ACCUMULATE", 4, "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", True)
    _, _, buffers = step(model)
    norm = "backbone.bottom_up.stem.conv1.norm"
    assert buffers[f"{norm}.num_batches_tracked"] == 4
    one_by_one = with_norms()
    with torch.no_grad():
        for pixels in one_by_one.preprocess_image(BATCH).tensor.split(2):
            one_by_one.backbone(pixels)
    mean = dict(one_by_one.named_buffers())[f"{norm}.running_mean"]
    assert torch.equal(buffers[f"{norm}.running_mean"], mean)


def test_backbone_without_stages_is_refused():
    with pytest.raises(ValueError, match="ACTIVATION_CHECKPOINTING needs a backbone with stages"):
        recompute_stages(nn.ModuleList([nn.Conv2d(3, 3, 1)]))
