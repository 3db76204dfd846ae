"""The detector and its parts, each in a file of its own; what configs can name of them.

Keys that are older than their parts, or that parts share, stand beside them.
"""

from ..losses import CLS_LOSSES, Focal, Matchability, QualityFocal, Varifocal
from ..parts import Parts
from . import terms
from .backbone import P6P7FromP5, build_fpn, make_deformable
from .box_coding import (
    BoxDeltas,
    Corners,
    Distribution,
    LegacyPixels,
    LogDistances,
    PointDistances,
)
from .branch import Branch, Phase
from .criterion import Criterion
from .detector import ATSSDetector
from .dyhead import DynamicTower
from .head import ATSSHead
from .postprocess import PostProcessor, product, root
from .suppression import NMS, ScoreVote, SoftVote, Vote, keep_all
from .terms import NWD, DistributionFocal, GIoU, IoU, SmoothL1
from .tood_head import TOODHead
from .tta import ATSSWithTTA
from .vfnet_head import VFNetHead

# A head is a module: list of (N, C, H_l, W_l) features -> HeadOutput, or several by name.
SHAPES = ("in_channels", "num_levels", "num_classes", "num_anchors")
OF_CODE = ("code", "box_bias", "box_channels", "bins")
HEAD_REGISTRY = Parts("HEAD", known=("cfg", "input_shape", "anchor_generator", *SHAPES, *OF_CODE))
OLDER = ("num_convs", "norm", "tower_bias", "prior_prob", "centerness", "level_scale")
OLDER_KEYS = {"deform": "DEFORM_TOWER", **{x: x.upper() for x in OLDER}}
# What all levels go through together, in place of the head's two towers.
TOWERS = Parts("TOWER", known=SHAPES)
TOWERS.add(dynamic=DynamicTower)
HEAD_REGISTRY.register(ATSSHead, keys=OLDER_KEYS, parts={"tower": TOWERS})

BOX_CODES = Parts("REGRESSION")
BOX_CODES.register(BoxDeltas, name="box", keys={"weights": "BBOX_REG_WEIGHTS"})
BOX_CODES.add(point=PointDistances, log_point=LogDistances, corners=Corners)
BOX_CODES.add(distribution=Distribution)
OF_TOWERS = {x: x.upper() for x in ("norm", "tower_bias", "prior_prob")}
HEAD_REGISTRY.register(VFNetHead, keys={**OF_TOWERS, "deform": "DEFORM_TOWER"})
HEAD_REGISTRY.register(TOODHead, keys=OF_TOWERS, parts={"inner": BOX_CODES})

CLS_TARGETS = Parts("CLS_TARGET")
CLS_TARGETS.add(one=terms.one, score=terms.score, overlap=terms.overlap)

BOX_LOSSES = Parts("BBOX_REG_LOSS_TYPE", ("code",), "BBOX_REG_LOSSES", optional=True, several=True)
WEIGHT = {"weight": "BBOX_REG_LOSS_WEIGHT"}
BOX_LOSSES.register(GIoU, name="giou", keys=WEIGHT)
BOX_LOSSES.register(IoU, name="iou", keys=WEIGHT)
BOX_LOSSES.register(SmoothL1, name="smooth_l1", keys={**WEIGHT, "beta": "SMOOTH_L1_LOSS_BETA"})
BOX_LOSSES.register(NWD, name="nwd", keys=WEIGHT)
BOX_LOSSES.add(dfl=DistributionFocal)
BOX_WEIGHTS = Parts("BOX_WEIGHT", optional=True)
BOX_WEIGHTS.add(one=terms.one, score=terms.score, centerness=terms.central)
BOX_WEIGHTS.add(overlap=terms.overlap, confidence=terms.confidence)
QUALITIES = Parts("QUALITY", group="QUALITIES", optional=True)
QUALITIES.add(centerness=terms.central, overlap=terms.overlap)
NORMALISERS = Parts("NORMALISER")
NORMALISERS.add(positives=terms.positives, targets=terms.targets)
LEVEL_WEIGHTS = Parts("LEVEL_WEIGHT", known=("num_levels",), optional=True)
LEVEL_WEIGHTS.add(balance=terms.Balance)

SCORES = Parts("SCORE")
SCORES.add(sqrt=root, product=product)
SUPPRESSIONS = Parts("SUPPRESSION")
OF_NMS = {"threshold": "NMS_THRESH_TEST"}
SUPPRESSIONS.register(NMS, name="nms", keys=OF_NMS)
SUPPRESSIONS.register(ScoreVote, name="score_vote", keys=OF_NMS)
VOTE = {"threshold": "TTA.VOTE_THRESH"}
SUPPRESSIONS.register(Vote, name="vote", keys=VOTE)
SUPPRESSIONS.register(SoftVote, name="soft_vote", keys={**VOTE, "min_score": "TTA.SOFT_MIN_SCORE"})
SUPPRESSIONS.add(none=keep_all)

# fmt: off
__all__ = [
    "BOX_CODES", "BOX_LOSSES", "BOX_WEIGHTS", "CLS_LOSSES", "CLS_TARGETS", "HEAD_REGISTRY",
    "LEVEL_WEIGHTS", "NMS", "NORMALISERS", "NWD", "QUALITIES", "SCORES", "SUPPRESSIONS", "TOWERS",
    "ATSSDetector", "ATSSHead", "ATSSWithTTA", "BoxDeltas", "Branch", "Corners", "Criterion",
    "Distribution", "DistributionFocal", "DynamicTower", "Focal", "GIoU", "IoU", "LegacyPixels",
    "LogDistances", "Matchability", "P6P7FromP5", "Phase", "PointDistances", "PostProcessor",
    "QualityFocal", "ScoreVote", "SmoothL1", "SoftVote", "TOODHead", "VFNetHead", "Varifocal",
    "Vote", "build_fpn", "keep_all", "make_deformable",
]
# fmt: on
