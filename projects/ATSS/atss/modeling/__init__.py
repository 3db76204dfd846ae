"""The detector and its parts, each in a file of its own; what configs can name of them.

Keys that are older than their parts, or that parts share, stand beside them.
"""

from ..losses import Focal
from ..parts import Parts
from . import terms
from .backbone import P6P7FromP5, build_fpn, make_deformable
from .box_coding import BoxDeltas, Corners, LegacyPixels, LogDistances, PointDistances
from .branch import Branch, Phase
from .criterion import Criterion
from .detector import ATSSDetector
from .head import ATSSHead
from .postprocess import PostProcessor, product, root
from .suppression import NMS, SoftVote, Vote, keep_all
from .terms import GIoU, IoU, OnBoxes, SmoothL1
from .tta import ATSSWithTTA

# A head is a module: list of (N, C, H_l, W_l) features -> HeadOutput, or several by name.
HEAD_REGISTRY = Parts(
    "HEAD",
    known=(
        "cfg",
        "input_shape",
        "in_channels",
        "num_levels",
        "num_classes",
        "num_anchors",
        "anchor_generator",
        "box_bias",
        "box_channels",
    ),
)
HEAD_REGISTRY.register(
    ATSSHead,
    keys={
        "num_convs": "NUM_CONVS",
        "norm": "NORM",
        "tower_bias": "TOWER_BIAS",
        "prior_prob": "PRIOR_PROB",
        "centerness": "CENTERNESS",
        "level_scale": "LEVEL_SCALE",
        "deform": "DEFORM_TOWER",
    },
)

BOX_CODES = Parts("REGRESSION")
BOX_CODES.register(BoxDeltas, name="box", keys={"weights": "BBOX_REG_WEIGHTS"})
BOX_CODES.register(PointDistances, name="point")
BOX_CODES.register(LogDistances, name="log_point")
BOX_CODES.register(Corners, name="corners")

CLS_LOSSES = Parts("CLS_LOSS", group="CLS_LOSSES", optional=True)
CLS_LOSSES.register(
    Focal, name="focal", keys={"alpha": "FOCAL_LOSS_ALPHA", "gamma": "FOCAL_LOSS_GAMMA"}
)

CLS_TARGETS = Parts("CLS_TARGET")
CLS_TARGETS.register(terms.one)
CLS_TARGETS.register(terms.score)

BOX_LOSSES = Parts(
    "BBOX_REG_LOSS_TYPE", known=("code",), group="BBOX_REG_LOSSES", optional=True, several=True
)
WEIGHT = {"weight": "BBOX_REG_LOSS_WEIGHT"}
BOX_LOSSES.register(GIoU, name="giou", keys=WEIGHT)
BOX_LOSSES.register(IoU, name="iou", keys=WEIGHT)
BOX_LOSSES.register(SmoothL1, name="smooth_l1", keys={**WEIGHT, "beta": "SMOOTH_L1_LOSS_BETA"})

# "": as the quality branch says.
BOX_WEIGHTS = Parts("BOX_WEIGHT", optional=True)
QUALITIES = Parts("QUALITY", group="QUALITIES", optional=True)
for name, weight in {"one": terms.one, "score": terms.score, "centerness": terms.central}.items():
    BOX_WEIGHTS.register(weight, name=name)
QUALITIES.register(terms.central, name="centerness")

NORMALISERS = Parts("NORMALISER")
NORMALISERS.register(terms.positives)
NORMALISERS.register(terms.targets)

LEVEL_WEIGHTS = Parts("LEVEL_WEIGHT", known=("num_levels",), optional=True)

SCORES = Parts("SCORE")
SCORES.register(root, name="sqrt")
SCORES.register(product)

SUPPRESSIONS = Parts("SUPPRESSION")
SUPPRESSIONS.register(NMS, name="nms", keys={"threshold": "NMS_THRESH_TEST"})
VOTE = {"threshold": "TTA.VOTE_THRESH"}
SUPPRESSIONS.register(Vote, name="vote", keys=VOTE)
SUPPRESSIONS.register(SoftVote, name="soft_vote", keys={**VOTE, "min_score": "TTA.SOFT_MIN_SCORE"})
SUPPRESSIONS.register(keep_all, name="none")

__all__ = [
    "BOX_CODES",
    "BOX_LOSSES",
    "BOX_WEIGHTS",
    "CLS_LOSSES",
    "CLS_TARGETS",
    "HEAD_REGISTRY",
    "LEVEL_WEIGHTS",
    "NMS",
    "NORMALISERS",
    "QUALITIES",
    "SCORES",
    "SUPPRESSIONS",
    "ATSSDetector",
    "ATSSHead",
    "ATSSWithTTA",
    "BoxDeltas",
    "Branch",
    "Corners",
    "Criterion",
    "Focal",
    "GIoU",
    "IoU",
    "LegacyPixels",
    "LogDistances",
    "OnBoxes",
    "P6P7FromP5",
    "Phase",
    "PointDistances",
    "PostProcessor",
    "SmoothL1",
    "SoftVote",
    "Vote",
    "build_fpn",
    "keep_all",
    "make_deformable",
]
