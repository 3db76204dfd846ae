import pickle

import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from atss import modeling
from atss.assigners import ATSS, MaxIoU
from atss.modeling import Branch, Criterion, Phase
from atss.modeling.branch import Branches
from atss.structures import HeadOutput

TINY = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1)
EXAMPLE = make_input([[20, 20, 90, 80], [4, 4, 30, 40]], [0, 2])


def build(*opts, **nested):
    cfg = make_cfg(*TINY)
    cfg.MODEL.ATSS.merge_from_other_cfg(type(cfg)(nested))
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_model(cfg).train()


def test_own_head_with_detached_features():
    opts = ("MODEL.ATSS.BRANCHES", ["extra"])
    own = {"extra": {"OWN_HEAD": True, "DETACHED": True, "HEAD": "ATSSHead"}}
    model = build(*opts, BRANCH=own)
    losses = model([EXAMPLE])
    extra = sum(x for name, x in losses.items() if name.startswith("extra/"))
    extra.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(name.startswith("branches.extra.head.") for name in touched)


def test_own_head_shares_features():
    model = build("MODEL.ATSS.BRANCHES", ["extra"], BRANCH={"extra": {"OWN_HEAD": True}})
    losses = model([EXAMPLE])
    sum(x for name, x in losses.items() if name.startswith("extra/")).backward()
    assert model.backbone.get_parameter("fpn_lateral3.weight").grad.abs().sum() > 0
    assert model.head.cls_score.weight.grad is None


def test_the_branch_for_inference_detects():
    """Its losses keep their names, and the detector's head is not run."""
    one = {"one": {"OWN_HEAD": True}}
    model = build("MODEL.ATSS.BRANCHES", ["one"], "MODEL.ATSS.INFERENCE", "one", BRANCH=one)
    assert "main/loss_cls" in model([EXAMPLE])
    nn.init.constant_(model.branches["one"].head.cls_score.bias, 3.0)
    model.head.forward = None
    with torch.no_grad():
        found = model.eval()([EXAMPLE])[0]["instances"]
    assert len(found) > 50


def test_two_branches_read_two_outputs_of_a_head():
    class Two(nn.Module):
        """A coarse output without classes, and a fine one."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, features):
            fine = self.head(features)
            coarse = HeadOutput(None, fine.box_regression * 0.5, None)
            return {"coarse": coarse, "fine": fine}

    model = build()
    model.head = Two(model.head)
    model.branches = Branches(
        {
            "main": Branch(Phase(ATSS(), Criterion()), output="fine"),
            "coarse": Branch(
                Phase(None, Criterion(cls_loss=None), assignment_of="main"), output="coarse"
            ),
        }
    )
    losses = model([EXAMPLE])
    assert losses.keys() == {
        *("loss_cls", "loss_box_reg", "loss_centerness"),
        "coarse/loss_box_reg",
    }
    assert losses["coarse/loss_box_reg"] != losses["loss_box_reg"]
    with torch.no_grad():
        model.eval()([EXAMPLE])
    model.branches["main"].output = "finest"
    with pytest.raises(ValueError, match=r"OUTPUT 'finest': choose from \['coarse', 'fine'\]"):
        model([EXAMPLE])


def test_a_branch_uses_the_assignment_of_another():
    asked = []

    class Rule(ATSS):
        def __call__(self, *args):
            asked.append(1)
            return super().__call__(*args)

    model = build()
    model.branches = Branches(
        {
            "boxes": Branch(
                Phase(None, Criterion(cls_loss=None, quality=None), assignment_of="main")
            ),
            "main": Branch(Phase(Rule(), Criterion(box_terms={}))),
        }
    )
    plain = build()([EXAMPLE])
    losses = model([EXAMPLE])
    assert len(asked) == 1
    assert losses["loss_cls"] == plain["loss_cls"]
    assert losses["boxes/loss_box_reg"] > 0


def test_phases_end_at_their_iterations():
    """By the event storage, which resumes; without one by the attribute."""
    first, last = MaxIoU(), ATSS()
    criteria = Criterion(quality_weight=2.0), Criterion()
    model = build()
    phases = Phase(first, criteria[0], until=5), Phase(last, criteria[1])
    branch = Branch(*phases)
    model.branches = Branches({"main": branch})
    assert branch.at(4) is phases[0]
    assert branch.at(5) is phases[1]
    plain = build()([EXAMPLE])["loss_centerness"].item()
    for iteration in (4, 5):
        model.iteration = iteration
        alone = model([EXAMPLE])
        model.iteration = 0
        with EventStorage(iteration):
            stored = model([EXAMPLE])
        assert alone == stored
        assert (stored["loss_centerness"].item() == plain) == (iteration == 5)


class Counter(nn.Module):
    """Weighs levels by how many positives they had."""

    def __init__(self, num_levels: int = 5):
        super().__init__()
        self.register_buffer("positives", torch.zeros(num_levels))

    def forward(self, matched):
        per_level = matched.positive.sum(0).split(matched.anchors.per_level)
        self.positives += torch.stack([x.sum() for x in per_level])
        weight = 2 - self.positives / self.positives.max().clamp(min=1)
        counts = torch.tensor(matched.anchors.per_level)
        return weight.repeat_interleave(counts)


def test_buffers_are_saved_and_shared():
    assert not [x for x in build().state_dict() if x.startswith("branches")]
    counter, model = Counter(), build()
    branches = {
        "main": Branch(Phase(ATSS(), Criterion(level_weight=counter))),
        "other": Branch(Phase(ATSS(), Criterion(level_weight=counter))),
    }
    model.branches = Branches(branches)
    plain = build()([EXAMPLE])
    losses = model([EXAMPLE])
    assert losses["loss_cls"] > plain["loss_cls"]
    saved = {k: v for k, v in model.state_dict().items() if "positives" in k}
    assert len(saved) == 2
    first, second = saved.values()
    assert torch.equal(first, second)
    assert first.sum() == 2 * (ATSS()(*seen(model)).gt_index >= 0).sum()


def seen(model):
    from atss import GroundTruth

    features = [torch.zeros(1, 1, 96 // s, 128 // s) for s in (8, 16, 32, 64)]
    features.append(torch.zeros(1, 1, 1, 1))
    anchors = model.anchor_generator.grid(features)
    return anchors, GroundTruth.from_instances([EXAMPLE["instances"]])


@pytest.mark.parametrize(
    ("opts", "nested", "sentence"),
    [
        (("MODEL.ATSS.BRANCHES", ["x"]), {}, r"unknown MODEL.ATSS.BRANCH 'x': choose from \[\]"),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": {"ASIGNER": "ATSS"}}},
            r"unknown key MODEL.ATSS.BRANCH.x.ASIGNER: MODEL.ATSS has no ASIGNER",
        ),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": {"ASSIGNERS": {"ATSS": {"TOPK": 3}}}}},
            "ASSIGNERS.ATSS.TOPK is no argument of ATSS",
        ),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": {"ASSIGNMENT_OF": "y"}}},
            r"branch x: unknown MODEL.ATSS.ASSIGNMENT_OF 'y': choose from \['main'\]",
        ),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": {"REGRESSION": "point"}}},
            "BRANCH.x.REGRESSION cannot be set for a branch: choose from",
        ),
        (
            ("MODEL.ATSS.PHASES", [["x", 3]]),
            {"BRANCH": {"x": {"OWN_HEAD": True}}},
            "BRANCH.x.OWN_HEAD cannot be set for a phase",
        ),
        (
            ("MODEL.ATSS.PHASES", [["x", 1.0]]),
            {},
            r"PHASES must contain pairs .*, got \['x', 1.0\]",
        ),
        (("MODEL.ATSS.PHASES", ["x", 9]), {}, "PHASES must contain pairs .*, got 'x'"),
        (
            ("MODEL.ATSS.PHASES", [["x", "9"]]),
            {},
            r"PHASES must contain pairs .*, got \['x', '9'\]",
        ),
        (("MODEL.ATSS.BRANCHES", ["update"]), {}, "BRANCHES: 'update' is not a name, or already"),
        (("MODEL.ATSS.BRANCHES", ["inference"]), {}, "BRANCHES: .inference. is not a name, or"),
        (("MODEL.ATSS.BRANCHES", [3]), {}, "BRANCHES: 3 is not a name"),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": 3}},
            "MODEL.ATSS.BRANCH.x must contain keys of MODEL.ATSS, got 3",
        ),
        (
            ("MODEL.ATSS.BRANCHES", ["x"]),
            {"BRANCH": {"x": {"ASSIGNERS": 3}}},
            "BRANCH.x.ASSIGNERS must be as MODEL.ATSS.ASSIGNERS, got 3",
        ),
        (("MODEL.ATSS.BRANCHES", ["main"]), {}, "BRANCHES: 'main' is not a name, or already"),
        (
            ("MODEL.ATSS.INFERENCE", "x"),
            {},
            r"unknown MODEL.ATSS.INFERENCE 'x': choose from \['main'\]",
        ),
        (("MODEL.ATSS.DETACHED", True), {}, "detached features need a branch with a head"),
        (("MODEL.ATSS.OWN_HEAD", True), {}, "OWN_HEAD is for branches of MODEL.ATSS.BRANCHES"),
        (
            ("MODEL.ATSS.PHASES", [["x", 9], ["x", 3]]),
            {"BRANCH": {"x": {"ASSIGNER": "MaxIoU"}}},
            r"phases must end at rising iterations, the last at none, got \[9, 3, inf\]",
        ),
    ],
)
def test_invalid_branches_are_refused(opts, nested, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(*opts, **nested)


def test_branches_do_not_inherit_branch_keys():
    """Phases of main, and whose assignment it takes, are main's; its parts are those of all."""
    wide = {"ASSIGNERS": {"ATSS": {"TOP_K": 17}}}
    nested = {"wide": wide, "first": {"ASSIGNER": "MaxIoU"}}
    opts = ("MODEL.ATSS.BRANCHES", ["wide"], "MODEL.ATSS.PHASES", [["first", 9]])
    model = build(*opts, "MODEL.ATSS.QUALITY_LOSS_WEIGHT", 2.0, BRANCH=nested)
    main, other = model.branches["main"], model.branches["wide"]
    assert isinstance(main.at(0).assigner, MaxIoU)
    assert other.at(0).assigner.top_k == 17
    assert other.at(0).criterion.quality_weight == main.at(0).criterion.quality_weight == 2.0


@pytest.mark.parametrize(
    "nested",
    [
        {"extra": {"OWN_HEAD": True, "CLS_LOSS": ""}},
        {"extra": {"OWN_HEAD": True, "BBOX_REG_LOSS_TYPE": "", "QUALITY": ""}},
    ],
)
def test_every_parameter_has_a_gradient(nested):
    """DDP on GPUs waits for all of them."""
    model = build("MODEL.ATSS.BRANCHES", ["extra"], BRANCH=nested)
    sum(model([EXAMPLE]).values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_assigners_see_predictions_of_their_branch():
    seen = {}
    model = build("MODEL.ATSS.BRANCHES", ["own"], BRANCH={"own": {"OWN_HEAD": True}})
    # Its boxes begin twice as large as those of main.
    nn.init.constant_(model.branches["own"].head.bbox_pred.bias, 3.4)
    for name, branch in model.branches.items():
        rule = branch.at(0).assigner
        branch.at(0).assigner = lambda *x, name=name, rule=rule: (
            seen.update({name: x[2]}) or rule(*x)
        )
    model([EXAMPLE])
    sizes = {name: (x.boxes[..., 2:] - x.boxes[..., :2]).mean() for name, x in seen.items()}
    assert sizes["own"] > 1.5 * sizes["main"]
    assert seen["own"].output.box_regression.mean() > seen["main"].output.box_regression.mean() + 3


def test_branches_of_one_output_share_decoded_boxes(monkeypatch):
    model, decoded = build("MODEL.ATSS.BRANCHES", ["x"], BRANCH={"x": {"QUALITY": ""}}), []
    decode = model.box_coder.decode
    monkeypatch.setattr(model.box_coder, "decode", lambda *x: decoded.append(1) or decode(*x))
    model([EXAMPLE])
    assert len(decoded) == 1


def test_level_weights_are_shared_by_default():
    modeling.LEVEL_WEIGHTS.register(Counter, name="counter")
    try:
        nested = {"same": {"QUALITY": ""}, "own": {"LEVEL_WEIGHT": "counter"}}
        opts = ("MODEL.ATSS.LEVEL_WEIGHT", "counter", "MODEL.ATSS.BRANCHES", ["same", "own"])
        model = build(*opts, "MODEL.ATSS.PHASES", [["same", 5]], BRANCH=nested)
    finally:
        del modeling.LEVEL_WEIGHTS.entries["counter"]
    weights = {n: b.at(9).criterion.level_weight for n, b in model.branches.items()}
    assert weights["main"] is weights["same"]
    assert weights["main"] is model.branches["main"].at(0).criterion.level_weight
    assert weights["main"] is not weights["own"]


def test_shared_level_weight_is_of_mains_last_phase():
    """The first may have none, as a warm-up does."""
    nested = {"early": {"LEVEL_WEIGHT": ""}, "same": {"QUALITY": ""}}
    opts = ("MODEL.ATSS.LEVEL_WEIGHT", "balance", "MODEL.ATSS.BRANCHES", ["same"])
    model = build(*opts, "MODEL.ATSS.PHASES", [["early", 5]], BRANCH=nested)
    main, same = (model.branches[x] for x in ("main", "same"))
    assert main.at(0).criterion.level_weight is None
    assert isinstance(main.at(5).criterion.level_weight, modeling.terms.Balance)
    assert same.at(0).criterion.level_weight is main.at(5).criterion.level_weight


def test_detectors_with_branches_can_be_pickled():
    wide = {"wide": {"ASSIGNERS": {"ATSS": {"TOP_K": 17}}}}
    model = build("MODEL.ATSS.BRANCHES", ["wide"], BRANCH=wide)
    copy = pickle.loads(pickle.dumps(model))
    assert copy([EXAMPLE]) == model([EXAMPLE])


def test_a_registry_returns_its_parts_by_name():
    assert modeling.HEAD_REGISTRY.get("ATSSHead") is modeling.ATSSHead
