"""The configs of ATSS's successors: ATSS but for the values of each paper and its code."""

import re

import pytest
from conftest import NARROW, ROOT, make_cfg
from detectron2.modeling import build_model

from atss import load_config
from atss.assigners import (
    ATSS,
    DDOD,
    NWD,
    OTA,
    PAA,
    POTO,
    TAL,
    IoU,
    SimD,
    SimOTA,
    SoftLabel,
)
from atss.config.checks import flatten
from atss.losses import Focal, QualityFocal, Varifocal
from atss.modeling import (
    NMS,
    SCORES,
    ATSSHead,
    BoxDeltas,
    Corners,
    Distribution,
    LogDistances,
    PointDistances,
    ScoreVote,
    TOODHead,
    VFNetHead,
    keep_all,
    terms,
)
from atss.modeling.deform_conv import DeformConvLayer

sqrt = SCORES.get("sqrt")
# Targets, losses and detections of ATSS, on which the others build.
GIOU, ONE, SCORE = {"giou": terms.GIoULoss()}, terms.one, terms.score
ATSS_VALUES = {
    "head": ATSSHead,
    "rule": (ATSS, IoU()),
    "class": (Focal(), ONE),
    "box": (GIOU, None, 1e-6),
    "quality": ("box", terms.central, 1.0),
    "normaliser": terms.positives,
    "code": BoxDeltas,
    "detections": (sqrt, NMS(0.6), 0.05, False, False),
}
BY_SCORE = {
    "class": (QualityFocal(2.0), SCORE),
    "box": (GIOU, SCORE, 1.0),
    "quality": ("", None, 1.0),
    "normaliser": terms.targets,
}
BY_TRANSPORT = {
    "rule": (OTA, IoU()),
    "code": PointDistances,
    "box": (GIOU, None, 1.0),
    "quality": ("box", terms.overlap, 0.5),
    "detections": (sqrt, NMS(0.6), 0.05, True, False),
}
BY_DISTRIBUTION = {
    "class": (QualityFocal(2.0), terms.overlap),
    "box": (GIOU | {"dfl": 0.25}, terms.confidence, 1.0),
    "quality": ("", None, 1.0),
    "code": Distribution,
}
BY_ALIGNMENT = BY_SCORE | {
    "rule": (TAL, IoU()),
    "first": (30000, {"box": (GIOU, terms.central, 1.0), "quality": ("", None, 1.0)}),
}
WITHOUT_SUPPRESSION = (sqrt, keep_all, 0.05, False, False)
# Values that differ from ATSS_VALUES, by each paper and its code. "first": (until, values of the
# phase before).
SUCCESSORS = {
    "PAA": {
        "rule": (PAA, IoU()),
        "box": ({"giou": terms.GIoULoss(weight=1.3)}, None, 1e-6),
        "quality": ("box", terms.overlap, 0.5),
        "detections": (sqrt, ScoreVote(0.6), 0.05, True, True),
    },
    "GFL": BY_DISTRIBUTION,
    "GFLv2": BY_DISTRIBUTION
    | {
        "quality": ("distribution", None, 1.0),
        "box": (BY_DISTRIBUTION["box"][0], terms.confidence, 1e-6),
    },
    "VFL": {
        "class": (Varifocal(0.75, 2.0), terms.overlap),
        "box": (GIOU, terms.overlap, 1.0),
        "quality": ("", None, 1.0),
    },
    "OTA": BY_TRANSPORT,
    "SimOTA": BY_TRANSPORT | {"rule": (SimOTA, IoU())},
    "RTMDet_SoftLabel": BY_SCORE | {"rule": (SoftLabel, IoU())},
    "TAL": BY_ALIGNMENT,
    "ATSS_NWD": {"rule": (ATSS, NWD(12.8))},
    "ATSS_SimD": {"rule": (ATSS, SimD(6.13, 4.59))},
    "ATSS_DyHead": {},
    "POTO": {
        "rule": (POTO, IoU()),
        "code": PointDistances,
        "box": (GIOU, None, 1.0),
        "quality": ("", None, 1.0),
        "detections": WITHOUT_SUPPRESSION,
    },
    "TAL_dual": BY_ALIGNMENT
    | {
        "detections": WITHOUT_SUPPRESSION,
        "branches": {"one": {}},
    },
    "VFNet": {
        "head": VFNetHead,
        "class": (Varifocal(0.75, 2.0), terms.overlap),
        "box": (GIOU, terms.overlap, 1.0),
        "quality": ("", None, 1.0),
        "code": LogDistances,
        "branches": {
            "coarse": {
                "rule": "main",
                "class": (None, terms.overlap),
                "box": ({"giou": terms.GIoULoss(weight=1.5)}, terms.overlap, 1.0),
            }
        },
    },
    "TOOD": BY_ALIGNMENT | {"head": TOODHead, "code": Corners},
    "TOOD_anchor": BY_ALIGNMENT | {"head": TOODHead, "code": Corners},
    "DDOD": {
        "rule": (DDOD, IoU(), 0.8),
        "box": ({}, None, 1e-6),
        "quality": ("box", None, 1.0),
        "branches": {
            "box": {
                "rule": (DDOD, IoU(), 0.5),
                "class": (None, ONE),
                "box": (GIOU, ONE, 1.0),
                "quality": ("box", terms.overlap, 1.0),
            }
        },
    },
}


# Rows whose similarity has arguments of its own, which "rule" above contains.
WITH_SIMILARITY = ("ATSS_NWD", "ATSS_SimD")
# Keys below MODEL.ATSS that SUCCESSORS or a test below covers.
COVERED = (
    "ASSIGNER|REGRESSION|CENTERNESS|QUALITY|QUALITY_LOSS_WEIGHT|CLS_LOSS|CLS_TARGET|NORMALISER|"
    "BBOX_REG_LOSS_TYPE|BBOX_REG_LOSS_WEIGHT|BOX_WEIGHT|BOX_NORMALISER_MIN|SUPPRESSION|"
    r"THRESHOLD_ON_SCORE|RANK_ANCHORS|PHASES|BRANCHES|BRANCH\..*|HEAD|HEADS\..*|OUTPUT|"
    r"DEFORM_TOWER|INFERENCE|NUM_CONVS|ASSIGNERS\.TAL\.INSIDE"
)


def test_every_1x_config_of_a_successor_is_listed():
    files = {path.name for path in ROOT.glob("configs/successors/*_R_50_FPN_1x.yaml")}
    assert files == {f"{name}_R_50_FPN_1x.yaml" for name in SUCCESSORS}


def describe_phase(model, phase, own_head=None):
    """Return the parts of one phase of a branch, under the names of ATSS_VALUES."""
    head = own_head or model.head
    criterion, post, rule = phase.criterion, model.postprocess, phase.assigner
    box_terms = {
        name: getattr(term, "weight", 0) if name == "dfl" else term
        for name, term in criterion.box_terms.items()
    }
    alpha = getattr(rule, "alpha", None)
    powers = () if alpha is None or type(rule) is not DDOD else (alpha,)
    return {
        "head": type(head),
        "rule": phase.assignment_of or (type(rule), rule.similarity, *powers),
        "class": (criterion.cls_loss, criterion.cls_target),
        "box": (box_terms, criterion.box_weight, criterion.box_least),
        "quality": (
            getattr(head, "centerness", ""),
            criterion.quality if getattr(head, "ctrness", None) is not None else None,
            criterion.quality_weight,
        ),
        "normaliser": criterion.normaliser,
        "code": type(model.box_coder),
        "detections": (
            *(post.score, post.suppression, post.score_thresh),
            *(post.threshold_on_score, post.rank_anchors),
        ),
    }


@pytest.mark.parametrize("name", SUCCESSORS)
def test_successor_is_atss_with_its_own_values(name):
    file = f"successors/{name}_R_50_FPN_1x.yaml"
    model = build_model(make_cfg(*NARROW, config=file))
    values = dict(SUCCESSORS[name])
    until, first = values.pop("first", (None, None))
    branches = values.pop("branches", {})
    main = ATSS_VALUES | values
    phases = model.branches["main"].phases
    assert [round(x.until, -1) for x in phases[:-1]] == ([] if until is None else [until])
    assert {*model.branches} == {"main", *branches}
    head = {key: main[key] for key in ("head", "code", "detections")}
    expected = [main] if first is None else [ATSS_VALUES | head | first, main]
    built = [(x, None) for x in phases]
    built += [(model.branches[x].phases[0], model.branches[x].head) for x in branches]
    expected += [main | x for x in branches.values()]
    for phase, row in zip(built, expected, strict=True):
        for key, value in describe_phase(model, *phase).items():
            assert value == row[key], key
    base = dict(flatten(make_cfg(config="ATSS_R_50_FPN_1x.yaml")))
    for key, value in flatten(make_cfg(config=file)):
        if isinstance(value, dict) or base.get(key) == value:
            continue
        # Rules have their default arguments, which the tests of the rules cover.
        assert re.fullmatch(rf"MODEL\.ATSS\.({COVERED})", key) or (
            name in WITH_SIMILARITY
            and re.fullmatch(r"MODEL\.ATSS\.(SIMILARITIES|ASSIGNERS\.ATSS\.SIMILARITY).*", key)
        ), key


def test_configs_set_arguments_of_heads():
    point, anchor = (
        build_model(make_cfg(config=f"successors/{x}_R_50_FPN_1x.yaml")).head
        for x in ("TOOD", "TOOD_anchor")
    )
    assert (type(point.inner), point.exponential) == (PointDistances, True)
    assert (type(anchor.inner), anchor.exponential) == (BoxDeltas, False)
    tower = build_model(make_cfg(config="successors/DDOD_R_50_FPN_1x.yaml")).head.cls_subnet
    deformable = [i for i, layer in enumerate(tower) if isinstance(layer, DeformConvLayer)]
    assert deformable == [0]
    assert not tower[0].modulated


def test_dynamic_head_replaces_the_towers():
    head = build_model(make_cfg(config="successors/ATSS_DyHead_R_50_FPN_1x.yaml")).head
    files = ("successors/ATSS_DyHead_R_50_FPN_1x.yaml", "fine_tune.yaml")
    cfg = load_config(*(ROOT / "configs" / x for x in files))
    cfg.MODEL.DEVICE = "cpu"
    small = build_model(cfg).head
    assert [len(x.tower.blocks) for x in (head, small)] == [6, 6]
    assert not len(small.cls_subnet)
    assert not len(head.cls_subnet)
    assert not len(head.bbox_subnet)


def test_dual_assignment_uses_one_metric():
    """The one-to-many branch after its warm-up, and the one-to-one branch, which detects."""
    model = build_model(make_cfg(config="successors/TAL_dual_R_50_FPN_1x.yaml"))
    many, one = (model.branches[x].phases[-1].assigner for x in ("main", "one"))
    assert (many.alpha, many.beta, many.inside) == (one.alpha, one.beta, one.inside)
    assert (many.inside, many.top_k, one.top_k) == ("before", 13, 1)
    assert model.inference == "one"
    assert model.branches["one"].detached


def test_deformable_configs_equal_mmdets():
    """Sizes, schedule and layers of mmdet's configs of the same names."""
    vfnet, tood = (
        make_cfg(config=f"successors/{x}_2x.yaml")
        for x in ("VFNet_dcnv2_R_50_FPN", "TOOD_dcnv2_R_101_FPN")
    )
    for cfg, sizes, depth in ((vfnet, (480, 960), 50), (tood, (480, 800), 101)):
        assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((120000, 165000), 180000)
        assert (sizes, "range") == (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
        assert depth == cfg.MODEL.RESNETS.DEPTH
        assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [False, True, True, True]
    model = build_model(vfnet)
    for tower in (model.head.cls_subnet, model.head.bbox_subnet):
        layers = [i for i, x in enumerate(tower) if isinstance(x, DeformConvLayer)]
        assert layers == [6]
        assert tower[6].modulated
    tood.MODEL.RESNETS.DEPTH = 50
    head = build_model(tood).head
    layers = [i for i, x in enumerate(head.stack) if isinstance(x[0], DeformConvLayer)]
    assert layers == [0, 1]
    assert head.stack[0][0].offset.out_channels == 4 * 27
    first, last = build_model(tood).branches["main"].phases
    assert (type(first.assigner), round(first.until, -1), type(last.assigner)) == (
        *(ATSS, 30000, TAL),
    )
