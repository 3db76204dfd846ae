"""Detection without suppression: one positive for each object, under every head."""

import pytest
import torch
from conftest import ROOT, THIN, make_cfg, make_input
from detectron2.modeling import build_model

from atss.config import check_model, for_inference
from atss.modeling import keep_all

NARROW = ("MODEL.FPN.OUT_CHANNELS", 32, *(x for item in THIN.items() for x in item))
EXAMPLES = [
    make_input([[20, 20, 90, 80], [4, 4, 30, 40], [22, 18, 92, 84]], [0, 2, 0]),
    make_input([], [], seed=1),
]
# One of each head, and of each way of saying classes and boxes.
HEADS = (
    "ATSS_R_50_FPN_1x",
    *(f"successors/{x}_R_50_FPN_1x" for x in ("ATSS_DyHead", "GFLv2", "TOOD", "VFNet", "DDOD")),
)
ALONE = {"ASSIGNER": "POTO", "BOX_NORMALISER_MIN": 1.0}
DUAL = {"OWN_HEAD": True, "DETACHED": True, "ASSIGNER": "TAL"}
ONE_OF_TAL = {"ASSIGNERS": {"TAL": {"TOP_K": 1, "INSIDE": "before"}}}
# A head of two outputs wants two branches once more.
COARSE = {"HEAD_OF": "one", "OUTPUT": "coarse", "ASSIGNMENT_OF": "one"}


def test_every_config_is_covered():
    heads = {make_cfg(config=f"{x}.yaml").MODEL.ATSS.HEAD for x in HEADS}
    files = [x.relative_to(ROOT / "configs") for x in ROOT.glob("configs/successors/*.yaml")]
    assert heads == {make_cfg(config=str(x)).MODEL.ATSS.HEAD for x in files}


def config(name, **nested):
    cfg = make_cfg(*NARROW, "MODEL.ATSS.PHASES", [], config=f"{name}.yaml")
    if cfg.MODEL.ATSS.HEAD == "TOODHead":
        cfg.MODEL.ATSS.HEADS.TOODHead.NUM_CONVS = 2
    cfg.MODEL.ATSS.merge_from_other_cfg(type(cfg)(nested))
    return cfg


def build(name, **nested):
    torch.manual_seed(0)
    return build_model(config(name, **nested)).train()


def of_one(name):
    """A second head, taught by the best anchor of each object alone."""
    node, also = make_cfg(config=f"{name}.yaml").MODEL.ATSS, {}
    one = DUAL | ONE_OF_TAL | {"OUTPUT": node.OUTPUT}
    if "coarse" in node.BRANCHES:
        also["coarse_one"] = {**node.BRANCH.coarse, **COARSE}
    if "box" in node.BRANCHES:  # whose boxes and quality another branch teaches
        one |= {"BBOX_REG_LOSS_TYPE": "giou", "QUALITY": "overlap"}
    branches = {**{x: node.BRANCH[x] for x in node.BRANCHES}, "one": one, **also}
    return {"BRANCHES": [*branches], "BRANCH": branches, "INFERENCE": "one"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("way", ["alone", "dual"])
def test_a_step_and_detections_without_suppression(name, way):
    nested = {"SUPPRESSION": "none"} | (ALONE if way == "alone" else of_one(name))
    model = build(name, **nested)
    chosen = {}
    branch = model.branches[model.inference]
    rule = branch.phases[0].assigner
    branch.phases[0].assigner = lambda *args: chosen.setdefault("one", rule(*args))
    losses = model(EXAMPLES)
    assert all(x.isfinite() for x in losses.values())
    counts = chosen["one"].positives_per_object(3)
    assert counts.max() == 1
    assert counts.sum() >= 2
    sum(losses.values()).backward()
    missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missed
    with torch.no_grad():
        model.postprocess.score_thresh = 0.0
        found = model.eval()(EXAMPLES)[0]["instances"]
    assert len(found) == 100
    assert model.postprocess.suppression is keep_all


@pytest.mark.parametrize("name", HEADS)
def test_detached_branch_gives_features_no_gradient(name):
    model = build(name, **of_one(name))
    losses = model(EXAMPLES)
    own = [x for n, x in losses.items() if "/" not in n or n.startswith("coarse_one")]
    sum(own).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(n.startswith("branches.one.head.") for n in touched)


def test_two_branches_share_an_own_head():
    """Which is run once."""
    model = build(HEADS[4], **of_one(HEADS[4]))
    calls = []
    model.branches["one"].head.register_forward_hook(lambda *_: calls.append(1))
    losses = model(EXAMPLES)
    assert len(calls) == 1
    assert {"loss_cls", "loss_box_reg", "coarse_one/loss_box_reg"} < {*losses}


def test_head_of_an_unknown_branch_is_refused():
    for wrong in ("main", "two"):
        nested = of_one(HEADS[4])
        nested["BRANCH"]["coarse_one"]["HEAD_OF"] = wrong
        with pytest.raises(
            ValueError, match=rf"coarse_one: unknown MODEL.ATSS.HEAD_OF '{wrong}': .*, \['one'\]"
        ):
            build(HEADS[4], **nested)
    nested = of_one(HEADS[4])
    nested["BRANCH"]["coarse_one"]["OWN_HEAD"] = True
    with pytest.raises(ValueError, match="coarse_one: a branch with a head of its own cannot use"):
        build(HEADS[4], **nested)
    with pytest.raises(ValueError, match=r"MODEL.ATSS.HEAD_OF is for branches of .*BRANCHES"):
        build(HEADS[4], **of_one(HEADS[4]), HEAD_OF="one")


def test_a_branch_with_anothers_head_detects_alone():
    nested = of_one(HEADS[4])
    nested["BRANCH"]["fine_one"] = {"HEAD_OF": "one", "OUTPUT": "fine"}
    nested |= {"BRANCHES": [*nested["BRANCHES"], "fine_one"], "INFERENCE": "fine_one"}
    model, cfg = build(HEADS[4], **nested), config(HEADS[4], **nested)
    reduced = for_inference(cfg)
    assert reduced.MODEL.ATSS.BRANCHES == ["one", "fine_one"]
    alone = build_model(reduced)
    alone.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = (
            x.eval()(EXAMPLES)[0]["instances"].pred_boxes.tensor for x in (alone, model)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "file", sorted(x.name for x in (ROOT / "configs" / "successors").glob("*.yaml"))
)
def test_check_model_before_building(file):
    """Without any head, for training and for inference."""
    cfg = make_cfg(config=f"successors/{file}")
    check_model(cfg, training=True)
    check_model(for_inference(cfg), training=False)
