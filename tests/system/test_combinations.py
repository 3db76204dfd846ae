"""Every rule with every class loss, class target, box loss, box weight, quality, normaliser and
box code that there is, on logits and on probabilities: it trains a step, or a sentence refuses it.

All pairs of values are tried; of what losses are made of, `make test-full` tries all combinations.
"""

import random
import re
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from benchmarks.operators import registered_rules
from benchmarks.scenes import random_scene
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
# Keys and values; other arguments of box losses and codes have their own tests.
WITH_SCORE = ("OTA", "POTO", "SimOTA", "SoftLabel", "TAL")
KINDS = (
    *(modeling.CLS_LOSSES, modeling.CLS_TARGETS, modeling.BOX_LOSSES),
    *(modeling.BOX_WEIGHTS, modeling.BOX_CODES, modeling.NORMALISERS, modeling.QUALITIES),
)
AXES = {x.key: [*x.entries, *([""] if x.optional else [])] for x in KINDS}
AXES["BBOX_REG_LOSS_TYPE"].append("giou + dfl")
AXES["probabilities"] = [False, True]
# Keys that interact in the targets of a positive.
LOSSES = {key: AXES[key] for key in list(AXES)[:5]}
WHY = (
    "needs an assigner with scores",
    "but the class loss takes only targets 0 and 1",
    "cannot be compared with encoded boxes",
    "the box regression of .* is no distribution",
    "a branch has no loss",
)


def all_pairs(axes, seed=0):
    """Few combinations, in which every two values of two axes meet."""
    shuffle, values = random.Random(seed), [*axes.values()]
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(values)), 2)
        for a, b in product(values[i], values[j])
    }
    while missing:
        fixed = dict(min(missing, key=str))
        rows = [[fixed.get(i, shuffle.choice(x)) for i, x in enumerate(values)] for _ in range(50)]
        met = [{*combinations(enumerate(row), 2)} & missing for row in rows]
        best = max(range(len(rows)), key=lambda i: len(met[i]))
        missing -= met[best]
        yield rows[best]


def step(cfg, probabilities=False) -> float:
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
    classes = logits.sigmoid() if probabilities else logits
    quality = torch.randn(shape, generator=generator)
    output = HeadOutput(classes, numbers, quality, probabilities)
    leaves = [x.requires_grad_() for x in output[:3]]
    features = [torch.zeros(GT.num_images, 1, *size) for size in SIZES]
    losses = detector.forward_training(SimpleNamespace(), features, {"main": output}, GT)
    total = sum(losses.values())
    total.backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    return total.item()


def try_all(rule, opts, axes, combinations_of_values):
    """How many were trained, and which sentences refused the others."""
    cfg = make_cfg("MODEL.ATSS.ASSIGNER", rule, *opts)
    trained, refused = 0, set()
    for combination in combinations_of_values:
        values = dict(zip(axes, combination, strict=True))
        probabilities = values.pop("probabilities", False)
        for key, value in values.items():
            cfg.MODEL.ATSS[key] = value
        cfg.MODEL.ATSS.CENTERNESS = "box" if cfg.MODEL.ATSS.QUALITY else ""
        try:
            assert 0 <= step(cfg, probabilities) < float("inf"), combination
            trained += 1
        except ValueError as error:
            (why,) = [x for x in WHY if re.search(x, str(error))]
            refused.add(why)
    return trained, refused


def has_score(name):
    rule = dict(registered_rules())[name]
    return rule(*random_scene(3)).score is not None


@pytest.mark.parametrize(("rule", "opts"), RULES)
def test_each_combination_trains_or_is_refused(rule, opts):
    trained, refused = try_all(rule, opts, AXES, all_pairs(AXES))
    assert trained > 15
    assert refused >= {*WHY[1:-1]}
    assert (WHY[0] in refused) == (not has_score(rule))


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "opts"), RULES)
def test_all_combinations_of_losses(rule, opts):
    trained, refused = try_all(rule, opts, LOSSES, product(*LOSSES.values()))
    assert trained > 500
    # The loss for targets 0 and 1 is not for overlaps either.
    assert refused == {*WHY[:-1]} - ({WHY[0]} if has_score(rule) else set())
