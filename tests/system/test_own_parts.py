"""Seven small additions, each as somebody would make it: what it takes, and that it acts."""

from dataclasses import dataclass

import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_model

from atss import Assignment, modeling
from atss.assigners import ASSIGNER_REGISTRY, ATSS
from atss.config import build_assigner
from atss.modeling.box_coding import BoxCode

TINY = ("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ATSS.NUM_CONVS", 0)
EXAMPLE = make_input([[20, 20, 90, 80], [4, 4, 30, 40]], [0, 2])


@pytest.fixture
def register():
    """Registers parts of a kind for the time of a test."""
    added = []

    def add(kind, target, **options):
        kind.register(target, **options)
        added.append((kind, options.get("name") or target.__name__))

    yield add
    for kind, name in added:
        del kind.entries[name]


def train(*opts, **nested):
    """Losses and model of one step; ``nested`` are groups of MODEL.ATSS."""
    cfg = make_cfg(*TINY)
    cfg.MODEL.ATSS.merge_from_other_cfg(type(cfg)(nested))
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    losses = model([EXAMPLE])
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    return {name: x.item() for name, x in losses.items()}, model


def test_a_rule_with_soft_scores(register):
    class Soft(ATSS):
        """ATSS whose positives are worth a share."""

        def __init__(self, share: float = 0.5):
            super().__init__()
            self.share = share

        def __call__(self, anchors, gt, predictions=None):
            hard = super().__call__(anchors, gt, predictions)
            return Assignment(hard.gt_index, hard.positive * self.share)

    register(ASSIGNER_REGISTRY, Soft)
    plain, _ = train("MODEL.ATSS.BOX_WEIGHT", "one")
    soft, model = train(ASSIGNER="Soft", ASSIGNERS={"Soft": {"SHARE": 0.25}}, BOX_WEIGHT="score")
    # A mean weighted by what is the same everywhere.
    assert soft == pytest.approx(plain)
    assert model.branches["main"].at(0).assigner.share == 0.25


def test_a_class_loss(register):
    @dataclass(frozen=True)
    class Poly:
        """Cross entropy + epsilon (1 - p) (arXiv 2204.12511), for targets of 0 and 1."""

        epsilon: float = 1.0

        def __call__(self, probability, entropy, targets):
            of_target = probability * targets + (1 - probability) * (1 - targets)
            return entropy + self.epsilon * (1 - of_target)

    register(modeling.CLS_LOSSES, Poly, name="poly")
    one, _ = train("MODEL.ATSS.CLS_LOSS", "poly")
    none, _ = train(CLS_LOSS="poly", CLS_LOSSES={"poly": {"EPSILON": 0.0}})
    focal, _ = train()
    assert one["loss_cls"] > none["loss_cls"] > focal["loss_cls"]
    assert one["loss_box_reg"] == focal["loss_box_reg"]


def test_a_box_code_of_eight_channels(register):
    class Pairs(BoxCode):
        """Each side is the mean of two numbers: distances in strides, rectified."""

        channels = 8
        initial = 4.0

        def encode(self, boxes, anchors, stride):
            return modeling.PointDistances().encode(boxes, anchors, stride)

        def decode(self, numbers, anchors, stride):
            mean = numbers.unflatten(-1, (4, 2)).mean(-1)
            return modeling.PointDistances().decode(mean, anchors, stride)

    register(modeling.BOX_CODES, Pairs, name="pairs")
    losses, model = train("MODEL.ATSS.REGRESSION", "pairs")
    assert model.head.bbox_pred.out_channels == 8
    assert losses["loss_box_reg"] > 0
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.eval()([EXAMPLE])


def test_a_score(register):
    def harmonic(probability, quality):
        return 2 * probability * quality / (probability + quality)

    register(modeling.SCORES, harmonic)
    opts = ("MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    _, model = train("MODEL.ATSS.SCORE", "harmonic", *opts)
    _, plain = train("MODEL.ATSS.SCORE", "product", *opts)
    with torch.no_grad():
        found, others = (m.eval()([EXAMPLE])[0]["instances"].scores[0] for m in (model, plain))
    assert found > 2 * others  # where p + q is less than 1


def test_a_suppression(register):
    @dataclass(frozen=True)
    class Best:
        """The best boxes, however they overlap."""

        count: int = 3

        def __call__(self, boxes, scores, classes, limit):
            return modeling.keep_all(boxes, scores, classes, min(self.count, limit))

    register(modeling.SUPPRESSIONS, Best, name="best")
    opts = ("MODEL.ATSS.SCORE_THRESH_TEST", 0.0, "MODEL.ATSS.SUPPRESSION", "best")
    _, model = train(*opts)
    with torch.no_grad():
        assert len(model.eval()([EXAMPLE])[0]["instances"]) == 3


def test_a_second_branch_with_another_k():
    wide = {"wide": {"ASSIGNERS": {"ATSS": {"TOP_K": 17}}, "QUALITY": ""}}
    losses, model = train("MODEL.ATSS.BRANCHES", ["wide"], BRANCH=wide)
    assert {name: branch.at(0).assigner.top_k for name, branch in model.branches.items()} == {
        "main": 9,
        "wide": 17,
    }
    plain, _ = train()
    assert losses.keys() == {*plain, "wide/loss_cls", "wide/loss_box_reg"}
    assert {name: losses[name] for name in plain} == plain
    assert losses["wide/loss_cls"] != losses["loss_cls"]


def test_two_phases():
    """A rule for a third of the training, then another."""
    first = {"first": {"ASSIGNER": "SimOTA", "ASSIGNERS": {"SimOTA": {"TOP_K": 5}}}}
    opts = ("SOLVER.MAX_ITER", 90, "MODEL.ATSS.PHASES", [["first", 1 / 3]])
    losses, model = train(*opts, BRANCH=first)
    model.iteration = 30
    later = {name: x.item() for name, x in model([EXAMPLE]).items()}
    assert later == train()[0]
    opts = ("MODEL.ATSS.ASSIGNER", "SimOTA", "MODEL.ATSS.ASSIGNERS.SimOTA.TOP_K", 5)
    assert losses == train(*opts)[0]


def test_a_rule_made_of_rules(register):
    @dataclass(frozen=True)
    class Union:
        """What one of two rules chooses; the first says for which object."""

        first: object = "ATSS"
        second: object = "MaxIoU"

        def __call__(self, anchors, gt, predictions=None):
            a, b = (rule(anchors, gt, predictions) for rule in (self.first, self.second))
            return Assignment(torch.where(a.positive, a.gt_index, b.gt_index))

    both = {"first": ASSIGNER_REGISTRY, "second": ASSIGNER_REGISTRY}
    register(ASSIGNER_REGISTRY, Union, parts=both)
    cfg = make_cfg("MODEL.ATSS.ASSIGNER", "Union")
    cfg.MODEL.ATSS.BRANCH.wide = type(cfg)({"ASSIGNERS": {"ATSS": {"TOP_K": 17}}})
    cfg.MODEL.ATSS.ASSIGNERS.Union = type(cfg)({"FIRST": "ATSS", "SECOND": "wide"})
    with pytest.raises(ValueError, match=r"BRANCH\.wide sets no ASSIGNER"):
        build_assigner(cfg)  # it would be Union again
    cfg.MODEL.ATSS.BRANCH.wide.ASSIGNER = "ATSS"
    rule = build_assigner(cfg)
    assert (rule.first.top_k, rule.second.top_k) == (9, 17)


def test_a_head_with_an_inner_box_code(register):
    """Its numbers are boxes in strides: what it moves after decoding is moved."""

    class Decoding(modeling.ATSSHead):
        def __init__(self, anchor_generator, inner_code=modeling.BoxDeltas, **arguments):
            super().__init__(**arguments)
            self.anchor_generator, self.inner_code = anchor_generator, inner_code

        def forward(self, features):
            output, anchors = super().forward(features), self.anchor_generator.grid(features)
            boxes = self.inner_code.decode(output.box_regression, anchors.boxes, anchors.stride)
            return output._replace(box_regression=boxes / anchors.stride[:, None])

    keys = {"num_convs": "NUM_CONVS"}
    register(modeling.HEAD_REGISTRY, Decoding, keys=keys, parts={"inner_code": modeling.BOX_CODES})
    heads = {"Decoding": {"INNER_CODE": "box"}}
    moved, model = train("MODEL.ATSS.REGRESSION", "corners", HEAD="Decoding", HEADS=heads)
    assert isinstance(model.head.inner_code, modeling.BoxDeltas)
    plain, _ = train()
    assert moved == pytest.approx(plain, rel=1e-4)
