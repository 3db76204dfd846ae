import logging

import pytest
import torch
from conftest import OF_64_CHANNELS, make_cfg, make_input
from detectron2.modeling import build_model
from torch import nn

from atss.config.build import compile_in_place


def test_without_a_compiler_the_modules_run_as_they_are(monkeypatch, caplog):
    def no_compiler(function):
        raise RuntimeError("no working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    module = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, logger="atss"):
        compile_in_place(module)
    assert module._compiled_call_impl is None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "MODEL.ATSS.COMPILE" in message
    assert message.endswith("running uncompiled: no working C++ compiler found")


DISTRIBUTIONS = ("MODEL.ATSS.REGRESSION", "distribution", "MODEL.ATSS.CENTERNESS", "distribution")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), DISTRIBUTIONS], ids=["deltas", "distributions"])
def test_compiled_parts_give_the_same_losses_and_gradients(more):
    options = ("MODEL.ATSS.NUM_CONVS", 1, "MODEL.RESNETS.NORM", "GN", *more)
    options += tuple(x for item in OF_64_CHANNELS.items() for x in item)
    example = make_input([[20, 20, 90, 80]], [1])
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(make_cfg(*options, "MODEL.ATSS.COMPILE", compiled)).train()
        assert (model.head._compiled_call_impl is not None) == compiled
        losses = model([example])
        sum(losses.values()).backward()
        results.append((losses, {k: p.grad for k, p in model.named_parameters()}))
    (plain, plain_grads), (fast, fast_grads) = results
    for name, loss in plain.items():
        torch.testing.assert_close(fast[name], loss, rtol=1e-4, atol=0)
    assert plain_grads.keys() == fast_grads.keys()
    for name, grad in plain_grads.items():
        if grad is not None:
            error = (fast_grads[name] - grad).norm()
            assert error <= 1e-3 * grad.norm() + 1e-6, name
