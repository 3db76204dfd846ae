"""Every rule with every class loss, class target, box loss, box weight and box code that there is:
it trains a step, or it is refused by a sentence."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import make_cfg, make_gt

from atss import ATSSDetector, modeling
from atss.anchors import GridAnchorGenerator
from atss.assigners import ASSIGNER_REGISTRY
from atss.config.branches import build_branches
from atss.modeling.postprocess import PostProcessor
from atss.structures import HeadOutput

K, SIZES, STRIDES = 3, [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)], (8, 16, 32, 64, 128)
GT = make_gt([[20, 20, 90, 80], [4, 4, 30, 40], [0, 0, 128, 96]], [0, 0, 1], 3, [0, 2, 1])
RULES = [(name, ()) for name, _ in ASSIGNER_REGISTRY]
RULES.append(("ATSS", ("MODEL.ATSS.ASSIGNERS.ATSS.ALPHA", 0.8)))
# Keys and values; what else a box loss or code is made of has its own tests.
WITH_SCORE = ("OTA", "SimOTA", "SoftLabel", "TAL")
AXES = {
    kind.key: [*kind.entries, *([""] if kind.optional else [])]
    for kind in (
        *(modeling.CLS_LOSSES, modeling.CLS_TARGETS, modeling.BOX_LOSSES),
        *(modeling.BOX_WEIGHTS, modeling.BOX_CODES),
    )
}
WHY = (
    "score of a rule that gives none",
    "but the class loss is for targets 0 and 1",
    "for which .* is not made",
)


def step(cfg) -> float:
    """Sum of the losses of a step, whose gradients are finite."""
    code = modeling.BOX_CODES.build(cfg.MODEL.ATSS)
    known = {"num_levels": len(SIZES), "num_classes": K, "code": code}
    detector = ATSSDetector(
        backbone=torch.nn.Identity(),
        head=torch.nn.Identity(),
        head_in_features=["p"] * len(SIZES),
        anchor_generator=GridAnchorGenerator(strides=STRIDES),
        branches=build_branches(cfg, known),
        box_coder=code,
        postprocess=PostProcessor(),
        num_classes=K,
        pixel_mean=[0.0],
        pixel_std=[1.0],
    ).train()
    generator = torch.Generator().manual_seed(0)
    shape = (GT.num_images, sum(h * w for h, w in SIZES))
    logits = torch.randn(*shape, K, generator=generator) - 2
    numbers = code.initial + 0.1 * torch.randn(*shape, code.channels, generator=generator)
    output = HeadOutput(logits, numbers, torch.randn(shape, generator=generator))
    leaves = [x.requires_grad_() for x in output[:3]]
    features = [torch.zeros(GT.num_images, 1, *size) for size in SIZES]
    losses = detector.forward_training(SimpleNamespace(), features, {"main": output}, GT)
    total = sum(losses.values())
    total.backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    return total.item()


@pytest.mark.parametrize(("rule", "opts"), RULES)
def test_trains_or_says_why_not(rule, opts):
    cfg = make_cfg("MODEL.ATSS.ASSIGNER", rule, *opts)
    trained, refused = 0, set()
    for combination in product(*AXES.values()):
        for key, value in zip(AXES, combination, strict=True):
            cfg.MODEL.ATSS[key] = value
        try:
            assert 0 <= step(cfg) < float("inf"), combination
            trained += 1
        except ValueError as error:
            (why,) = [x for x in WHY if re.search(x, str(error))]
            refused.add(why)
    assert trained > 50
    assert refused == {*WHY} - {WHY[0] if rule in WITH_SCORE else WHY[1]}
