import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from conftest import THIN, TINY, WIDE_FOR_GN, make_cfg, make_input
from detectron2.modeling import build_model

from atss.config.build import check_model
from atss.modeling import branch

DISTRIBUTIONS = {"MODEL.ATSS.REGRESSION": "distribution", "MODEL.ATSS.CENTERNESS": "distribution"}


def build(options, config=""):
    torch.manual_seed(0)
    opts = [x for item in options.items() for x in item]
    return build_model(make_cfg(*opts, config=config)).train()


def make_batch(hw, *counts):
    """Return an image per count, with that many objects along the diagonal."""
    batch = []
    for count in counts:
        side = torch.linspace(0.0, 0.7, count)[:, None] * torch.tensor([hw[1], hw[0]])
        boxes = torch.cat([side, side + torch.tensor([0.3 * hw[1], 0.2 * hw[0]])], dim=1)
        batch.append(make_input(boxes, [i % 3 for i in range(count)], hw, seed=count))
    return batch


def step(model, batch):
    """Return losses and gradients by name."""
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {k: x.detach() for k, x in losses.items()}, grads


def assert_near(found, expected):
    """Compare losses by relative error, gradients by the norm of their difference."""
    (losses, grads), (plain, plain_grads) = found, expected
    for name, loss in plain.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=0)
    assert grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


@pytest.fixture
def traced(monkeypatch):
    """Yield the graphs that torch.compile captures of the tail; they run uncompiled."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    branch._compile.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record))
    yield graphs
    branch._compile.cache_clear()


def test_tail_is_one_graph_for_all_image_sizes_and_objects(traced):
    model = build({**TINY, "MODEL.ATSS.ASSIGNERS.ATSS.TOP_K": 2})  # halves the time
    for hw, counts in [((96, 128), (4, 0)), ((128, 96), (1, 1)), ((64, 160), (3, 11, 26))]:
        batch = make_batch(hw, *counts)
        model.compile_tail = True  # first, while anchors are new
        losses, grads = step(model, batch)
        model.compile_tail = False
        expected = step(model, batch)
        assert losses == expected[0]
        assert all(torch.equal(grads[k], x) for k, x in expected[1].items())
    assert len(traced) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # The compiled function is not part of the model.
    model.compile_tail = True
    assert step(model, batch)[0] == losses
    assert not any("_orig_mod" in name for name in model.state_dict())
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        clone.compile_tail = False
        assert step(clone, batch)[0] == losses


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ATSS", "TOOD", "DDOD", "PAA", "TAL_dual"])
def test_compiled_tail_gives_equal_losses(row, traced):
    """In bf16, with few objects, branches, phases, and rules with graph breaks."""
    name = "ATSS_R_50_FPN_1x" if row == "ATSS" else f"successors/{row}_R_50_FPN_1x"
    options = {**THIN, "MODEL.FPN.OUT_CHANNELS": 64, "MODEL.ATSS.PRECISION": "bf16"}
    model = build(options, f"{name}.yaml")
    ends = [p.until for b in model.branches.values() for p in b.phases if p.until < float("inf")]
    for model.iteration in (0, *ends):
        for counts in [(0, 0), (0, 1), (3, 9)] if row == "ATSS" else [(0, 0), (3, 9)]:
            batch = make_batch((128, 160), *counts)
            counted = {k: x.clone() for k, x in model.named_buffers()}
            model.compile_tail = False
            expected = step(model, batch)
            for k, x in model.named_buffers():  # level weights count
                x.copy_(counted[k])
            model.compile_tail = True
            losses, grads = step(model, batch)
            assert losses == expected[0]
            assert all(torch.equal(grads[k], x) for k, x in expected[1].items())
    assert len(traced) == 3 or row != "ATSS"
    with torch.no_grad():
        model.eval()(batch)
        assert model.train()(batch).keys() == losses.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "more"),
    [("tail", {}), ("all", {}), ("all", DISTRIBUTIONS)],
    ids=["tail", "deltas", "distributions"],
)
def test_compiled_parts_give_equal_losses_and_gradients(parts, more):
    from torch._inductor import metrics  # takes seconds

    torch._dynamo.reset()
    options = {"MODEL.ATSS.NUM_CONVS": 1, "MODEL.RESNETS.NORM": "GN", **WIDE_FOR_GN, **more}
    batch = make_batch((96, 128), 2)
    expected = step(build(options), batch)
    model = build({**options, "MODEL.ATSS.COMPILE": parts})
    metrics.reset()
    found = step(model, batch)
    assert_near(found, expected)
    if parts == "tail":
        assert 0 < metrics.generated_kernel_count <= 70
    again = step(model, batch)
    assert again[0] == found[0]
    assert all(torch.equal(again[1][k], x) for k, x in found[1].items())


@pytest.mark.parametrize(
    ("value", "tail", "network"),
    [
        (None, False, False),
        ("tail", True, False),
        ("all", True, True),
        (False, False, False),
        (True, True, True),
    ],
)
def test_key_selects_compiled_parts(value, tail, network, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    own = {"MODEL.ATSS.BRANCHES": ["own"], "MODEL.ATSS.BRANCH": {"own": {"OWN_HEAD": True}}}
    cfg = make_cfg(*(x for item in TINY.items() for x in item), "MODEL.ATSS.COMPILE", value)
    cfg.MODEL.ATSS.BRANCHES = own["MODEL.ATSS.BRANCHES"]
    cfg.MODEL.ATSS.BRANCH = type(cfg)(own["MODEL.ATSS.BRANCH"])
    model = build_model(cfg)
    assert model.compile_tail == tail
    for module in (model.backbone, model.head, model.branches["own"].head):
        assert (module._compiled_call_impl is not None) == network


@pytest.mark.parametrize("value", ["head", 2, ["tail"]])
def test_unknown_parts_are_refused(value):
    cfg = make_cfg("MODEL.ATSS.COMPILE", value)
    sentence = r"MODEL\.ATSS\.COMPILE is .*: choose from \[None, 'tail', 'all'\]"
    for check in (lambda: check_model(cfg, training=True), lambda: build_model(cfg)):
        with pytest.raises(ValueError, match=sentence):
            check()


def test_checkpointed_stages_are_refused():
    opts = ("MODEL.ATSS.COMPILE", "all", "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", True)
    with pytest.raises(ValueError, match="cannot compile a backbone with activation checkpointing"):
        check_model(make_cfg(*opts), training=True)


def test_model_runs_uncompiled_without_a_compiler(monkeypatch, caplog):
    def no_compiler(function):
        raise RuntimeError("no working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING, logger="atss"):
        model = build({**TINY, "MODEL.ATSS.COMPILE": "all"})
    assert not model.compile_tail
    assert model.backbone._compiled_call_impl is None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "MODEL.ATSS.COMPILE" in message
    assert message.endswith("running uncompiled: no working C++ compiler found")
