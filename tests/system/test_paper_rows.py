"""The configs of the paper against its tables and the authors' yamls, row by row.

Compared is the behaviour of the parts that a config builds, for example the number of candidates
that its rule selects, not the text of its keys.

Sources: the tables of arXiv 1912.02424, its section 3.1 for the values that all rows share, and
for solver, backbones and multi-scale testing the authors' yamls (configs/atss/ of
sfzhang15/ATSS).
"""

import bisect
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NARROW, ROOT, make_cfg, make_gt
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from torch import nn

from atss import BACKGROUND, IGNORE, Anchors, Assignment, HeadOutput, load_config
from atss.assigners import ATSS, MaxIoU
from atss.config import build_tta
from atss.losses import giou_loss, iou_loss, smooth_l1_loss
from atss.modeling.backbone import DeformBottleneck
from atss.modeling.deform_conv import DeformConvLayer

STRIDES = (8, 16, 32, 64, 128)
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
VIEWS = {  # TEST.BBOX_AUG of the authors' yamls: size -> range of objects that are kept
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


def test_every_table_row_of_the_paper_is_listed():
    files = {f"tables/{path.stem}" for path in ROOT.glob("configs/tables/*.yaml")}
    assert {row for row in ROWS if row.startswith("tables/")} == files


@pytest.mark.parametrize("row", ROWS)
def test_row_behaves_as_its_source_states(row):
    cfg = make_cfg(config=f"{row}.yaml")
    narrow = cfg.clone()
    narrow.merge_from_list([*NARROW, "MODEL.RESNETS.NUM_GROUPS", 1])
    narrow.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    model = build_model(narrow)
    sides = [1024 // stride for stride in STRIDES]
    anchors = model.anchor_generator.grid([torch.zeros(1, 1, side, side) for side in sides])
    observed = {
        "rule": describe_rule(model.branches["main"].at(0).assigner, anchors),
        "anchors": describe_anchors(anchors),
        "first centre": tuple(((anchors.boxes[0, :2] + anchors.boxes[0, 2:]) / 2).tolist()),
        "test size": describe_test_size(cfg),
        "levels": describe_levels(model.backbone),
        "regression": describe_regression(model.box_coder, anchors),
        **describe_losses(model),
        **describe_head(model.head),
        "inference": describe_inference(model.postprocess),
        **describe_solver(cfg, model),
        "short sides": describe_short_sides(cfg),
        **describe_backbone(cfg, model.head),
        "pixels": (model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()),
        "weights": load_config(ROOT / "configs" / f"{row}.yaml").MODEL.WEIGHTS,
        "views": describe_views(cfg) if cfg.TEST.AUG.ENABLED else None,
    }
    for name, expected in (STANDARD | ROWS[row]).items():
        assert observed[name] == approx(expected), name
    assert observed.keys() == STANDARD.keys()


def approx(value):
    if isinstance(value, dict):
        return {key: approx(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(approx(x) for x in value)
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


def describe_anchors(anchors: Anchors) -> list[tuple[float, float]]:
    """(width, height) of one location's anchors, in strides."""
    size = anchors.boxes[: anchors.num_anchors, 2:] - anchors.boxes[: anchors.num_anchors, :2]
    return [(w / 8, h / 8) for w, h in size.tolist()]


def state_of(rule, anchors: Anchors, box, point, level: int = 0) -> str:
    """Return the state of the first anchor at a point of a level, as a rule assigns it to a box."""
    stride, (_, width) = anchors.strides[level], anchors.sizes[level]
    column, row = (int(x / stride - anchors.offset) for x in point)
    first = sum(anchors.per_level[:level]) + (row * width + column) * anchors.num_anchors
    value = rule(anchors, make_gt([box])).gt_index[0, first].item()
    return {BACKGROUND: "background", IGNORE: "ignored"}.get(value, "positive")


def describe_rule(rule, anchors: Anchors) -> tuple[str, dict]:
    """Name a rule and measure its arguments by objects placed around their bounds."""
    if isinstance(rule, ATSS):
        index, _ = rule.candidates(anchors, torch.tensor([[400.0, 400, 600, 600]]))
        return "ATSS", {"candidates per level": len(index) // len(STRIDES)}
    if isinstance(rule, MaxIoU):
        # Two anchors of 16 px, 8 px apart, and objects of that size nearer to the second, so that
        # the first is the best anchor of no object.
        two = Anchors.grid((8, 16), strides=(8,), scales=(2.0,))
        left = {iou: (12 - 20 * iou) / (1 + iou) for iou in BY_IOU}
        small = {"on a centre": [515, 515, 517, 517], "between": [513, 513, 515, 515]}
        found = {k: rule(anchors, make_gt([box])).gt_index for k, box in small.items()}
        return "MaxIoU", {
            "low quality": bool((found["on a centre"] >= 0).any()),
            "in box": not (found["between"] >= 0).any(),
            "by IoU": {
                q: state_of(rule, two, [x, -4, x + 16, 12], (4, 4)) for q, x in left.items()
            },
        }
    # A box of 300 px moves away from P5's location (528, 528), by twentieths of a stride.
    around = [528 - 150, 528 - 150, 528 + 150, 528 + 150]

    def is_background(twentieths: int) -> bool:
        x = twentieths * 1.6
        box = [around[0] + x, around[1], around[2] + x, around[3]]
        return state_of(rule, anchors, box, (528, 528), 2) == "background"

    reach = bisect.bisect_left(range(100), True, key=is_background) - 1
    gt_index = rule(anchors, make_gt([around])).gt_index[0]
    ranges = {}
    for side in RANGES:  # the distance from a point in the middle of a square to its sides
        points = [512 + stride / 2 for stride in STRIDES]
        ranges[side] = [
            level
            for level, x in enumerate(points)
            if state_of(rule, anchors, [x - side] * 2 + [x + side] * 2, (x, x), level) == "positive"
        ]
    inside = state_of(rule, anchors, [516 - 0.005, 500, 560, 532], (516, 516))
    return "SpatialScale", {
        "reach": reach / 20,
        "on a level": max(int((x >= 0).sum()) for x in gt_index.split(anchors.per_level)),
        "margin": inside == "background",
        "ranges": ranges,
    }


def describe_regression(coder, anchors: Anchors) -> str:
    """Name a box code by the box that four ones decode to."""
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


def describe_losses(model) -> dict:
    """Name the losses by their formulas, for one anchor with an object and one without."""
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


def describe_head(head) -> dict:
    convs = [m for m in head.cls_subnet if isinstance(m, nn.Conv2d | DeformConvLayer)]
    norms = {type(m).__name__ for m in head.bbox_subnet if isinstance(m, nn.GroupNorm)}
    return {
        "tower": f"{len(convs)} x conv" + (" GN" if norms else ""),
        "centerness": head.centerness,
        "level scales": bool(list(head.scales.parameters())),
    }


def describe_inference(postprocess) -> dict:
    anchors = Anchors.grid((320, 320), strides=(8,))  # 1,600 of them

    def count(probability: float, boxes: torch.Tensor, detector=postprocess) -> int:
        logits = torch.full((1, len(anchors.boxes), 1), -30.0)
        logits[0, : len(boxes)] = math.log(probability / (1 - probability))
        output = HeadOutput(logits, torch.zeros(1, len(anchors.boxes), 4), None)
        code = SimpleNamespace(decode=lambda _, a, stride: boxes[: len(a)])
        return len(detector(output, anchors, code, [(20000, 20000)])[0])

    apart = torch.arange(1200.0)[:, None] * 8 + torch.tensor([0.0, 0, 4, 4])
    everything = copy.copy(postprocess)
    everything.max_detections = 5000
    thresholds = [t for t in (0.03, 0.05, 0.07, 0.1) if count(t - 0.001, apart[:1]) == 0]
    overlapping = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10 * q]]) for q in (0.595, 0.605)]
    kept = [count(0.9, boxes) for boxes in overlapping]
    return {
        "score": next(t for t in thresholds if count(t + 0.001, apart[:1]) == 1),
        "per level": count(0.9, apart, everything),
        "NMS": 0.6 if kept == [2, 1] else kept,
        "per image": count(0.9, apart),
    }


def describe_solver(cfg, model) -> dict:
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


def describe_short_sides(cfg) -> tuple[int, int]:
    resize = build_augmentation(cfg, is_train=True)[0]
    image = np.zeros((600, 700, 3), np.uint8)
    drawn = [resize.get_transform(image).new_h for _ in range(50)]
    low, high = min(resize.short_edge_length), max(resize.short_edge_length)
    assert low <= min(drawn) <= max(drawn) <= high
    assert (len(set(drawn)) > 5) == (low < high)
    capped = resize.get_transform(np.zeros((300, 900, 3), np.uint8))
    assert capped.new_w == 1333
    return low, high


def describe_test_size(cfg) -> tuple[int, int]:
    """Return the short side of a square test image and the long side of a very long one."""
    (resize,) = build_augmentation(cfg, is_train=False)
    square, long = (np.zeros((300, width, 3), np.uint8) for width in (300, 1500))
    return resize.get_transform(square).new_h, resize.get_transform(long).new_w


def describe_levels(backbone) -> str:
    """Name the inputs of the two highest levels."""
    p5 = torch.randn(1, 32, 8, 8)
    p6, p7 = backbone.top_block(p5)
    plain = torch.equal(p6, backbone.top_block.p6(p5)) and backbone.top_block.in_feature == "p5"
    rectified = torch.equal(p7, backbone.top_block.p7(p6.relu()))
    return "p6 from p5, p7 from relu(p6)" if plain and rectified else "other"


def describe_backbone(cfg, head) -> dict:
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
    if all(len(layers) == 1 and layers[0].modulated for layers in last):
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
    """A model that detects squares of given sides in pixels of the view, whose size it stores."""

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


def describe_views(cfg) -> dict:
    """Measure the views of an image six times as wide as high, whose size the cap sets."""
    ends = (64, 96, 192, 256)
    model = Squares([float(x) for end in ends for x in (end - 1, end + 1)])
    tta = build_tta(cfg, model)
    image = np.zeros((100, 600, 3), np.uint8)
    sizes, caps = {}, set()
    for short, longest, least, greatest in tta.views[1:]:
        _, _, classes = tta._detect(image, short, longest, least, greatest, False)
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
