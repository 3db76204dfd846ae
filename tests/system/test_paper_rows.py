"""What the paper and the authors' yamls state for every config, row by row, and that it acts: what
is compared is what the built parts do, wherever a part does it.

Sources: the tables of arXiv 1912.02424, its section 3.1 for what they share, and for the solver,
the backbones and multi-scale testing the authors' yamls (configs/atss/ of sfzhang15/ATSS).
"""

import bisect
import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, THIN, make_cfg, make_gt
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from torch import nn

from atss import BACKGROUND, IGNORE, Anchors, Assignment, HeadOutput, load_config
from atss.assigners import (
    ATSS,
    DDOD,
    NWD,
    OTA,
    PAA,
    POTO,
    TAL,
    IoU,
    MaxIoU,
    SimD,
    SimOTA,
    SoftLabel,
)
from atss.config import build_tta
from atss.config.checks import flatten
from atss.losses import Focal, QualityFocal, Varifocal, giou_loss, iou_loss, smooth_l1_loss
from atss.modeling import (
    NMS,
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
    root,
    terms,
)
from atss.modeling.backbone import DeformBottleneck
from atss.modeling.deform_conv import DeformConvLayer

STRIDES = (8, 16, 32, 64, 128)
NARROW = ("MODEL.FPN.OUT_CHANNELS", 32, *(x for item in THIN.items() for x in item))
EIGHT = [(8.0, 8.0)]
THREE_SCALES = [(4 * 2 ** (i / 3),) * 2 for i in range(3)]


def shapes(scale: float, ratio: float) -> tuple[float, float]:
    """(width, height) in strides; ratio is height : width, the area the scale's square."""
    return scale / math.sqrt(ratio), scale * math.sqrt(ratio)


STANDARD = {  # section 3.1; Table 3, "RetinaNet (#A=1) + ATSS"
    "rule": ("ATSS", {"candidates per level": 9}),
    "anchors": EIGHT,
    "regression": "box",
    "box loss": "2 x giou",
    "focal loss": (0.25, 2.0),
    "tower": "4 x conv GN",
    "centerness": "box",
    "level scales": True,
    "inference": {"score": 0.05, "per level": 1000, "NMS": 0.6, "per image": 100},
    "optimizer": {(0.01, 0.0001, 0.9), (0.02, 0.0, 0.9)},  # rate, decay, momentum; last: of biases
    "rates": {0: 1 / 3, 499: 1 / 3, 500: 1, 59999: 1, 60000: 0.1, 80000: 0.01},
    "iterations x images": (90000, 16),
    "short sides": (800, 800),
    "test size": (800, 1333),
    "first centre": (4.0, 4.0),
    "levels": "p6 from p5, p7 from relu(p6)",
    "backbone": "50 1x64 stride in 1x1",
    "deformable": "",
    "frozen": "stem res2",
    "weights": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "pixels": ([102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
    "views": None,
}
BY_IOU = {0.39: "background", 0.41: "ignored", 0.49: "ignored", 0.51: "positive"}
MAX_IOU = ("MaxIoU", {"low quality": True, "in box": True, "by IoU": BY_IOU})
NOT_IN_BOX = ("MaxIoU", MAX_IOU[1] | {"in box": False})
RANGES = {64: [0, 1], 128: [1, 2], 256: [2, 3], 512: [3, 4]}  # both ends belong to a level
SSC = ("SpatialScale", {"reach": 3.3, "on a level": 49, "margin": True, "ranges": RANGES})
PLAIN = {  # Table 1's first row, and the authors' RetinaNet for its losses
    "rule": NOT_IN_BOX,
    "tower": "4 x conv",
    "centerness": "",
    "level scales": False,
    "box loss": "1 x smooth_l1",
}
NINE = [shapes(scale[0], ratio) for scale in THREE_SCALES for ratio in (0.5, 1, 2)]
POINT = {"regression": "point"}
TWICE = {  # the authors' *_2x
    "rates": {0: 1 / 3, 499: 1 / 3, 500: 1, 119999: 1, 120000: 0.1, 160000: 0.01},
    "iterations x images": (180000, 16),
    "short sides": (640, 800),
}
R101 = {
    "backbone": "101 1x64 stride in 1x1",
    "weights": "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
}
X32 = {"backbone": "101 32x8", "weights": "catalog://ImageNetPretrained/FAIR/X-101-32x8d"}
X64 = {"backbone": "101 64x4", "weights": "catalog://ImageNetPretrained/FAIR/X-101-64x4d"}
DCN = {"deformable": "res3 res4 res5 tower"}
DCN_X = {"deformable": "res4 res5 tower"}
VIEWS = {  # TEST.BBOX_AUG of the authors' yamls: size -> the sizes of objects that count
    "sizes": {
        **dict.fromkeys((400, 500), (96, 10000)),
        **dict.fromkeys((600, 640, 700), (64, 10000)),
        **dict.fromkeys((900, 1000), (0, 10000)),
        **dict.fromkeys((1100, 1200), (0, 256)),
        **dict.fromkeys((1300, 1400), (0, 192)),
        1800: (0, 96),
    },
    "caps": (1333, 3000),
    "mirrored": (False, True),
    "vote": 0.66,
    "least soft score": 0.05,
    "per image": 1000,
}

ROWS = {
    "ATSS_R_50_FPN_1x": {},
    "ATSS_R_50_torchvision_FPN_1x": {
        "backbone": "50 1x64",
        "weights": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
        "pixels": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    },
    "ATSS_R_101_FPN_1x": R101,
    "ATSS_dcnv2_R_50_FPN_1x": DCN,
    "ATSS_dcnv2_R_101_FPN_1x": R101 | DCN,
    # Table 1
    "tables/retinanet_A1": PLAIN,
    "tables/retinanet_A1_gn": PLAIN | {"tower": "4 x conv GN"},
    "tables/retinanet_A1_gn_giou": PLAIN | {"tower": "4 x conv GN", "box loss": "2 x giou"},
    "tables/retinanet_A1_gn_giou_inbox": {
        **{"rule": MAX_IOU, "centerness": "", "level scales": False},
    },
    "tables/retinanet_A1_gn_giou_inbox_ctr": {"rule": MAX_IOU, "level scales": False},
    "tables/fcos_original": {
        "rule": ("SpatialScale", SSC[1] | {"margin": False}),
        "regression": "log_point",
        "centerness": "cls",
        "box loss": "1 x iou",
    },
    # Tables 2 and 3
    "tables/iou_box": {"rule": MAX_IOU},
    "tables/iou_point": {"rule": MAX_IOU} | POINT,
    "tables/ssc_box": {"rule": SSC},
    "tables/ssc_point": {"rule": SSC} | POINT,
    "tables/ssc_lite_point": {
        "rule": ("SpatialScale", SSC[1] | {"reach": 1.65, "on a level": 9}),
        **POINT,
    },
    "tables/ssc_radius_point": {
        "rule": ("SpatialScale", SSC[1] | {"reach": 1.45, "on a level": 9}),
        **POINT,
    },
    "tables/atss_box": {},
    "tables/atss_point": POINT,
    # Table 4
    **{
        f"tables/atss_k{k}": {"rule": ("ATSS", {"candidates per level": k})}
        for k in (3, 5, 7, 11, 13, 15, 17, 19)
    },
    # Table 5
    **{f"tables/atss_scale{s}": {"anchors": [(float(s), float(s))]} for s in (5, 6, 7, 9)},
    # Table 6
    "tables/atss_ratio1_4": {"anchors": [(16.0, 4.0)]},
    "tables/atss_ratio1_2": {"anchors": [shapes(8, 0.5)]},
    "tables/atss_ratio2_1": {"anchors": [shapes(8, 2)]},
    "tables/atss_ratio4_1": {"anchors": [(4.0, 16.0)]},
    # Table 7; k anchors in all (Algorithm 1, line 4)
    "tables/retinanet_A9": PLAIN | {"anchors": NINE},
    "tables/iou_A9": {"rule": MAX_IOU, "anchors": NINE},
    "tables/atss_A9": {"anchors": NINE},
    "tables/atss_A3_scales": {"anchors": THREE_SCALES},
    "tables/atss_A3_ratios": {"anchors": [shapes(8, ratio) for ratio in (0.5, 1, 2)]},
    "tables/atss_A9_locations": {  # the authors' code since 2020-04-22
        "anchors": NINE,
        "rule": ("ATSS", {"candidates per level": 81}),
    },
    # Table 8
    "ATSS_R_101_FPN_2x": TWICE | R101,
    "ATSS_X_101_32x8d_FPN_2x": TWICE | X32,
    "ATSS_X_101_64x4d_FPN_2x": TWICE | X64,
    "ATSS_dcnv2_R_101_FPN_2x": TWICE | R101 | DCN,
    "ATSS_dcnv2_X_101_32x8d_FPN_2x": TWICE | X32 | DCN_X,
    "ATSS_dcnv2_X_101_64x4d_FPN_2x": TWICE | X64 | DCN_X,
    "ATSS_dcnv2_X_101_32x8d_FPN_2x_tta": TWICE | X32 | DCN_X | {"views": VIEWS},
    "ATSS_dcnv2_X_101_64x4d_FPN_2x_tta": TWICE | X64 | DCN_X | {"views": VIEWS},
}


def test_every_config_of_the_paper_is_here():
    configs = ROOT / "configs"
    files = {str(f.relative_to(configs).with_suffix("")) for f in configs.rglob("*.yaml")}
    ours = {"Base-ATSS", "ATSS_R_18_FPN_small", "demo", "small", "ablation", "digits"}
    ours |= {"ATSS_R_50_FPN_fine_tune", "ATSS_lite0_FPN_fine_tune", "fine_tune"}
    ours |= {"fine_tune_coco"}
    assert set(ROWS) == {x for x in files - ours if not x.startswith("successors/")}


# What later papers train, on ATSS's towers.
GIOU, ONE, SCORE = {"giou": terms.GIoULoss()}, terms.one, terms.score
OF_ATSS = {
    "head": ATSSHead,
    "rule": (ATSS, IoU()),
    "class": (Focal(), ONE),
    "box": (GIOU, None, 1e-6),
    "quality": ("box", terms.central, 1.0),
    "normaliser": terms.positives,
    "code": BoxDeltas,
    "detections": (root, NMS(0.6), 0.05, False, False),
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
    "detections": (root, NMS(0.6), 0.05, True, False),
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
WITHOUT_SUPPRESSION = (root, keep_all, 0.05, False, False)
# What each says otherwise than ATSS, by facts of its paper and code. A phase: (until, the same).
SUCCESSORS = {
    "PAA": {
        "rule": (PAA, IoU()),
        "box": ({"giou": terms.GIoULoss(weight=1.3)}, None, 1e-6),
        "quality": ("box", terms.overlap, 0.5),
        "detections": (root, ScoreVote(0.6), 0.05, True, True),
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


# Whose arguments stand above, with their rules.
OF_SIMILARITIES = ("ATSS_NWD", "ATSS_SimD")
LOOKED_AT = (
    "ASSIGNER|REGRESSION|CENTERNESS|QUALITY|QUALITY_LOSS_WEIGHT|CLS_LOSS|CLS_TARGET|NORMALISER|"
    "BBOX_REG_LOSS_TYPE|BBOX_REG_LOSS_WEIGHT|BOX_WEIGHT|BOX_NORMALISER_MIN|SUPPRESSION|"
    r"THRESHOLD_ON_SCORE|RANK_ANCHORS|PHASES|BRANCHES|BRANCH\..*|HEAD|HEADS\..*|OUTPUT|"
    r"DEFORM_TOWER|INFERENCE|NUM_CONVS|ASSIGNERS\.TAL\.INSIDE"
)


def test_every_successor_is_here():
    names = {path.name for path in ROOT.glob("configs/successors/*")}
    ours = {f"{name}_R_50_FPN_1x.yaml" for name in SUCCESSORS}
    assert names == ours | {"VFNet_dcnv2_R_50_FPN_2x.yaml", "TOOD_dcnv2_R_101_FPN_2x.yaml"}


def values_of(model, phase, own_head=None):
    """What a phase of a branch is made of."""
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
def test_a_successor_is_atss_but_for_its_values(name):
    file = f"successors/{name}_R_50_FPN_1x.yaml"
    model = build_model(make_cfg(*NARROW, config=file))
    stated = dict(SUCCESSORS[name])
    until, first = stated.pop("first", (None, None))
    branches = stated.pop("branches", {})
    main = OF_ATSS | stated
    phases = model.branches["main"].phases
    assert [round(x.until, -1) for x in phases[:-1]] == ([] if until is None else [until])
    assert {*model.branches} == {"main", *branches}
    head = {key: main[key] for key in ("head", "code", "detections")}
    expected = [main] if first is None else [OF_ATSS | head | first, main]
    found = [(x, None) for x in phases]
    found += [(model.branches[x].phases[0], model.branches[x].head) for x in branches]
    expected += [main | x for x in branches.values()]
    for phase, values in zip(found, expected, strict=True):
        for key, value in values_of(model, *phase).items():
            assert value == values[key], key
    base = dict(flatten(make_cfg(config="ATSS_R_50_FPN_1x.yaml")))
    for key, value in flatten(make_cfg(config=file)):
        if isinstance(value, dict) or base.get(key) == value:
            continue
        # Arguments of rules are the defaults, which their tests are of.
        assert re.fullmatch(rf"MODEL\.ATSS\.({LOOKED_AT})", key) or (
            name in OF_SIMILARITIES
            and re.fullmatch(r"MODEL\.ATSS\.(SIMILARITIES|ASSIGNERS\.ATSS\.SIMILARITY).*", key)
        ), key
    lines = [x for x in (ROOT / "configs" / file).read_text().splitlines() if x[:1] not in "#"]
    assert len(lines) <= 12


def test_heads_of_successors():
    """What their configs say of a head beside its name."""
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


def test_the_dynamic_head_is_in_place_of_the_towers():
    head = build_model(make_cfg(config="successors/ATSS_DyHead_R_50_FPN_1x.yaml")).head
    files = ("successors/ATSS_DyHead_R_50_FPN_1x.yaml", "fine_tune.yaml")
    cfg = load_config(*(ROOT / "configs" / x for x in files))
    cfg.MODEL.DEVICE = "cpu"
    small = build_model(cfg).head
    assert [len(x.tower.blocks) for x in (head, small)] == [6, 6]
    assert not len(small.cls_subnet)
    assert not len(head.cls_subnet)
    assert not len(head.bbox_subnet)


def test_many_and_one_under_one_metric():
    """After the warm-up of the many; the one learns so from the beginning, and detects."""
    model = build_model(make_cfg(config="successors/TAL_dual_R_50_FPN_1x.yaml"))
    many, one = (model.branches[x].phases[-1].assigner for x in ("main", "one"))
    assert (many.alpha, many.beta, many.inside) == (one.alpha, one.beta, one.inside)
    assert (many.inside, many.top_k, one.top_k) == ("before", 13, 1)
    assert model.inference == "one"
    assert model.branches["one"].detached


def test_successors_with_deformable_convolutions():
    """As mmdet's configs of the same names have them."""
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


@pytest.mark.parametrize("row", ROWS)
def test_does_what_its_source_states(row):
    cfg = make_cfg(config=f"{row}.yaml")
    narrow = cfg.clone()
    narrow.merge_from_list([*NARROW, "MODEL.RESNETS.NUM_GROUPS", 1])
    narrow.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    model = build_model(narrow)
    sides = [1024 // stride for stride in STRIDES]
    anchors = model.anchor_generator.grid([torch.zeros(1, 1, side, side) for side in sides])
    seen = {
        "rule": rule(model.branches["main"].at(0).assigner, anchors),
        "anchors": anchor_shapes(anchors),
        "first centre": tuple(((anchors.boxes[0, :2] + anchors.boxes[0, 2:]) / 2).tolist()),
        "test size": size_in_test(cfg),
        "levels": levels(model.backbone),
        "regression": regression(model.box_coder, anchors),
        **losses(model),
        **head(model.head),
        "inference": inference(model.postprocess),
        **solver(cfg, model),
        "short sides": short_sides(cfg),
        **backbone(cfg, model.head),
        "pixels": (model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()),
        "weights": load_config(ROOT / "configs" / f"{row}.yaml").MODEL.WEIGHTS,
        "views": views(cfg) if cfg.TEST.AUG.ENABLED else None,
    }
    for name, expected in (STANDARD | ROWS[row]).items():
        assert seen[name] == approx(expected), name
    assert seen.keys() == STANDARD.keys()


def approx(value):
    if isinstance(value, dict):
        return {key: approx(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(approx(x) for x in value)
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


def anchor_shapes(anchors: Anchors) -> list[tuple[float, float]]:
    """(width, height) of one location's anchors, in strides."""
    size = anchors.boxes[: anchors.num_anchors, 2:] - anchors.boxes[: anchors.num_anchors, :2]
    return [(w / 8, h / 8) for w, h in size.tolist()]


def state(rule, anchors: Anchors, box, point, level: int = 0) -> str:
    """What the rule makes of the first anchor at a point of a level, under one object."""
    stride, (_, width) = anchors.strides[level], anchors.sizes[level]
    column, row = (int(x / stride - anchors.offset) for x in point)
    first = sum(anchors.per_level[:level]) + (row * width + column) * anchors.num_anchors
    value = rule(anchors, make_gt([box])).gt_index[0, first].item()
    return {BACKGROUND: "background", IGNORE: "ignored"}.get(value, "positive")


def rule(rule, anchors: Anchors) -> tuple[str, dict]:
    """The rule's name, and what it does with objects made to tell."""
    if isinstance(rule, ATSS):
        index, _ = rule.candidates(anchors, torch.tensor([[400.0, 400, 600, 600]]))
        return "ATSS", {"candidates per level": len(index) // len(STRIDES)}
    if isinstance(rule, MaxIoU):
        # Two anchors of 16 px, 8 px apart, and objects of that size nearer to the second: the first
        # is not the best of any.
        two = Anchors.grid((8, 16), strides=(8,), scales=(2.0,))
        left = {iou: (12 - 20 * iou) / (1 + iou) for iou in BY_IOU}
        small = {"on a centre": [515, 515, 517, 517], "between": [513, 513, 515, 515]}
        found = {k: rule(anchors, make_gt([box])).gt_index for k, box in small.items()}
        return "MaxIoU", {
            "low quality": bool((found["on a centre"] >= 0).any()),
            "in box": not (found["between"] >= 0).any(),
            "by IoU": {q: state(rule, two, [x, -4, x + 16, 12], (4, 4)) for q, x in left.items()},
        }
    # An object of 300 px moves away from P5's location (528, 528), by twentieths of a stride.
    around = [528 - 150, 528 - 150, 528 + 150, 528 + 150]

    def lost(twentieths: int) -> bool:
        x = twentieths * 1.6
        box = [around[0] + x, around[1], around[2] + x, around[3]]
        return state(rule, anchors, box, (528, 528), 2) == "background"

    reach = bisect.bisect_left(range(100), True, key=lost) - 1
    gt_index = rule(anchors, make_gt([around])).gt_index[0]
    ranges = {}
    for side in RANGES:  # the farthest side of a point in the middle of a square
        points = [512 + stride / 2 for stride in STRIDES]
        ranges[side] = [
            level
            for level, x in enumerate(points)
            if state(rule, anchors, [x - side] * 2 + [x + side] * 2, (x, x), level) == "positive"
        ]
    inside = state(rule, anchors, [516 - 0.005, 500, 560, 532], (516, 516))
    return "SpatialScale", {
        "reach": reach / 20,
        "on a level": max(int((x >= 0).sum()) for x in gt_index.split(anchors.per_level)),
        "margin": inside == "background",
        "ranges": ranges,
    }


def regression(coder, anchors: Anchors) -> str:
    """By what four ones decode to."""
    x1, y1, x2, y2 = anchors.boxes[0].tolist()
    x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    grown = math.exp(0.2) / 2
    box = [x + w / 10 - w * grown, y + h / 10 - h * grown, x + w / 10 + w * grown]
    known = {
        "box": [*box, y + h / 10 + h * grown],
        "point": [x - 8, y - 8, x + 8, y + 8],
        "log_point": [x - math.e, y - math.e, x + math.e, y + math.e],
    }
    found = coder.decode(torch.ones(4), anchors.boxes[0], anchors.stride[0]).tolist()
    return next((name for name, box in known.items() if found == pytest.approx(box)), str(found))


def losses(model) -> dict:
    """Of one anchor with an object and one without, by their formulas."""
    anchors = Anchors.on_levels([(1, 2)], [8])
    gt, box = make_gt([[-20, -20, 40, 30]], classes=[1]), torch.tensor([[-28.0, -30, 30, 30]])
    logits = torch.tensor([[[-30.0, 1.2, -30], [0.3, -30, -30]]])
    quality = torch.zeros(1, 2) if model.head.centerness else None
    output = HeadOutput(logits, torch.ones(1, 2, 4), quality)
    assignment = Assignment(torch.tensor([[0, BACKGROUND]]))
    found = (
        model.branches["main"].at(0).criterion(output, box.expand(1, 2, 4), anchors, gt, assignment)
    )
    p, q = torch.tensor([1.2, 0.3]).sigmoid().tolist()
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) + 0.75 * q**2 * -math.log(1 - q)
    deltas = model.box_coder.encode(gt.boxes, anchors.boxes[:1], anchors.stride[:1])
    known = {
        "2 x giou": 2 * giou_loss(box, gt.boxes),
        "1 x iou": iou_loss(box, gt.boxes),
        "1 x smooth_l1": smooth_l1_loss(torch.ones(1, 4), deltas, beta=0.11).mean(),
    }
    box_loss, cls_loss = found["loss_box_reg"].item(), found["loss_cls"].item()
    names = [name for name, value in known.items() if box_loss == pytest.approx(value.item())]
    return {
        "box loss": names[0] if names else box_loss,
        "focal loss": (0.25, 2.0) if cls_loss == pytest.approx(focal) else cls_loss,
    }


def head(head) -> dict:
    convs = [m for m in head.cls_subnet if isinstance(m, nn.Conv2d | DeformConvLayer)]
    norms = {type(m).__name__ for m in head.bbox_subnet if isinstance(m, nn.GroupNorm)}
    return {
        "tower": f"{len(convs)} x conv" + (" GN" if norms else ""),
        "centerness": head.centerness,
        "level scales": bool(list(head.scales.parameters())),
    }


def inference(postprocess) -> dict:
    anchors = Anchors.grid((320, 320), strides=(8,))  # 1,600 of them

    def found(probability: float, boxes: torch.Tensor, detector=postprocess) -> int:
        logits = torch.full((1, len(anchors.boxes), 1), -30.0)
        logits[0, : len(boxes)] = math.log(probability / (1 - probability))
        output = HeadOutput(logits, torch.zeros(1, len(anchors.boxes), 4), None)
        code = SimpleNamespace(decode=lambda _, a, stride: boxes[: len(a)])
        return len(detector(output, anchors, code, [(20000, 20000)])[0])

    apart = torch.arange(1200.0)[:, None] * 8 + torch.tensor([0.0, 0, 4, 4])
    everything = copy.copy(postprocess)
    everything.max_detections = 5000
    thresholds = [t for t in (0.03, 0.05, 0.07, 0.1) if found(t - 0.001, apart[:1]) == 0]
    overlapping = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10 * q]]) for q in (0.595, 0.605)]
    kept = [found(0.9, boxes) for boxes in overlapping]
    return {
        "score": next(t for t in thresholds if found(t + 0.001, apart[:1]) == 1),
        "per level": found(0.9, apart, everything),
        "NMS": 0.6 if kept == [2, 1] else kept,
        "per image": found(0.9, apart),
    }


def solver(cfg, model) -> dict:
    optimizer = build_optimizer(cfg, model)
    keys = ("lr", "weight_decay", "momentum")
    groups = {tuple(group[key] for key in keys) for group in optimizer.param_groups}
    scheduler = build_lr_scheduler(cfg, optimizer)
    total = cfg.SOLVER.MAX_ITER
    steps = STANDARD["rates"] if total == 90000 else TWICE["rates"]
    return {
        "optimizer": groups,
        "rates": {i: scheduler._multiplier(i / total) for i in steps},
        "iterations x images": (total, cfg.SOLVER.IMS_PER_BATCH),
    }


def short_sides(cfg) -> tuple[int, int]:
    resize = build_augmentation(cfg, is_train=True)[0]
    image = np.zeros((600, 700, 3), np.uint8)
    drawn = [resize.get_transform(image).new_h for _ in range(50)]
    low, high = min(resize.short_edge_length), max(resize.short_edge_length)
    assert low <= min(drawn) <= max(drawn) <= high
    assert (len(set(drawn)) > 5) == (low < high)
    capped = resize.get_transform(np.zeros((300, 900, 3), np.uint8))
    assert capped.new_w == 1333
    return low, high


def size_in_test(cfg) -> tuple[int, int]:
    """Short side of a square image, long side of a very long one."""
    (resize,) = build_augmentation(cfg, is_train=False)
    square, long = (np.zeros((300, width, 3), np.uint8) for width in (300, 1500))
    return resize.get_transform(square).new_h, resize.get_transform(long).new_w


def levels(backbone) -> str:
    """Of what the two highest are made."""
    p5 = torch.randn(1, 32, 8, 8)
    p6, p7 = backbone.top_block(p5)
    plain = torch.equal(p6, backbone.top_block.p6(p5)) and backbone.top_block.in_feature == "p5"
    rectified = torch.equal(p7, backbone.top_block.p7(p6.relu()))
    return "p6 from p5, p7 from relu(p6)" if plain and rectified else "others"


def backbone(cfg, head) -> dict:
    with torch.device("meta"):
        bottom_up = build_backbone(cfg).bottom_up
    stages = {name: getattr(bottom_up, name) for name in ("res2", "res3", "res4", "res5")}
    depth = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101}[tuple(map(len, stages.values()))]
    conv1, conv2 = stages["res2"][0].conv1, stages["res2"][0].conv2
    width = conv2.weight.shape[1]
    in_1x1 = " stride in 1x1" if bottom_up.res3[0].conv1.stride == (2, 2) else ""
    deformable = [
        name
        for name, stage in stages.items()
        if all(isinstance(b, DeformBottleneck) and b.modulated for b in stage)
    ]
    towers = (head.cls_subnet, head.bbox_subnet)
    last = [[m for m in tower if isinstance(m, DeformConvLayer)] for tower in towers]
    if all(len(some) == 1 and some[0].modulated for some in last):
        deformable.append("tower")
    frozen = [
        name
        for name, part in {"stem": bottom_up.stem, **stages}.items()
        if not any(p.requires_grad for p in part.parameters())
    ]
    return {
        "backbone": f"{depth} {conv1.weight.shape[0] // width}x{width}{in_1x1}",
        "deformable": " ".join(deformable),
        "frozen": " ".join(frozen),
    }


class Squares(nn.Module):
    """Finds squares of given sides, in pixels of the view, and remembers the view."""

    def __init__(self, sides):
        super().__init__()
        self.sides = torch.tensor(sides)

    def forward(self, batched_inputs):
        (example,) = batched_inputs
        self.view = tuple(example["image"].shape[1:])
        zoom = torch.tensor([example["width"] / self.view[1], example["height"] / self.view[0]])
        found = Instances((example["height"], example["width"]))
        found.pred_boxes = Boxes(
            torch.cat([self.sides[:, None].expand(-1, 2) * 0, self.sides[:, None] * zoom], 1)
        )
        found.scores = torch.ones(len(self.sides))
        found.pred_classes = torch.arange(len(self.sides))
        return [{"instances": found}]


def views(cfg) -> dict:
    """Of an image six times as wide as high, so that the cap decides the view's size."""
    ends = (64, 96, 192, 256)
    model = Squares([float(x) for end in ends for x in (end - 1, end + 1)])
    tta = build_tta(cfg, model)
    image = np.zeros((100, 600, 3), np.uint8)
    sizes, caps = {}, set()
    for short, longest, least, greatest in tta.views[1:]:
        _, _, classes = tta._view(image, short, longest, least, greatest, False)
        caps.add((short < 800, max(model.view)))
        counts = {side: i in classes for i, side in enumerate(model.sides.int().tolist())}
        low = [end for end in ends if not counts[end - 1] and counts[end + 1]]
        high = [end for end in ends if counts[end - 1] and not counts[end + 1]]
        sizes[short] = (max(low, default=0), min(high, default=10000))
    assert tta.views[0][:2] == (800, 1333)
    assert caps == {(True, 1333), (False, 3000)}

    def merge(iou: float, lower: float) -> tuple[list, list]:
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10 * iou]])
        classes = torch.zeros(2, dtype=torch.long)
        found = tta.merge(boxes, torch.tensor([0.9, lower]), classes, 100)
        return found[0].tolist(), found[1].tolist()

    voted = [merge(iou, 0.5)[0][0] != [0, 0, 10, 10] for iou in (0.655, 0.665)]
    stayed = [len(merge(0.7, lowered / 0.3)[1]) for lowered in (0.0495, 0.0505)]
    return {
        "sizes": sizes,
        "caps": tuple(sorted(cap for _, cap in caps)),
        "vote": 0.66 if voted == [False, True] else voted,
        "least soft score": 0.05 if stayed == [1, 2] else stayed,
        "mirrored": tta.flips,
        "per image": tta.max_detections,
    }
