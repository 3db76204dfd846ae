"""The parts of a detector that a config names, by kind. Rules are in assigners/registry.py.

Arguments have keys below their part's group. Those in ``keys`` have keys shared with other parts,
or older than the groups.
"""

from .. import losses
from ..registry import Part, Registry
from . import box_coding, terms
from .criterion import Criterion
from .dyhead import DynamicTower
from .head import ATSSHead
from .postprocess import PostProcessor, product, root
from .proposals import RPNHead
from .suppression import NMS, ScoreVote, SoftVote, Vote, keep_all
from .tood_head import TOODHead
from .vfnet_head import VFNetHead

# Heads
BOX_CODES = Registry("REGRESSION")
BOX_CODES.register(box_coding.BoxDeltas, name="box", keys={"weights": "BBOX_REG_WEIGHTS"})
# fmt: off
BOX_CODES.add(
    point=box_coding.PointDistances, log_point=box_coding.LogDistances,
    corners=box_coding.Corners, distribution=box_coding.Distribution,
)
# fmt: on

FROM_SHAPES = ("in_channels", "num_levels", "num_classes", "num_anchors")
FROM_BOX_CODE = ("code", "box_bias", "box_channels", "bins")
# Modules in place of the two towers of ATSSHead, which get all levels at once.
TOWERS = Registry("TOWER", injected=FROM_SHAPES)
TOWERS.add(dynamic=DynamicTower)

# List of (N, C, H_l, W_l) features -> HeadOutput, or {name: HeadOutput}.
HEAD_REGISTRY = Registry(
    "HEAD", injected=("cfg", "input_shape", "anchor_generator", *FROM_SHAPES, *FROM_BOX_CODE)
)
HEAD_KEYS = {x: x.upper() for x in ("num_convs", "norm", "tower_bias", "prior_prob")}
DEFORM_KEYS = HEAD_KEYS | {"deform": "DEFORM_TOWER"}
ATSS_KEYS = DEFORM_KEYS | {"centerness": "CENTERNESS", "level_scale": "LEVEL_SCALE"}
HEAD_REGISTRY.register(ATSSHead, keys=ATSS_KEYS, parts={"tower": TOWERS})
HEAD_REGISTRY.register(VFNetHead, keys=DEFORM_KEYS)
HEAD_REGISTRY.register(TOODHead, keys=HEAD_KEYS, parts={"inner": BOX_CODES})
HEAD_REGISTRY.register(RPNHead)

# Losses
CLS_LOSSES = Registry("CLS_LOSS", ("num_classes",), "CLS_LOSSES", optional=True)
CLS_LOSSES.register(
    losses.Focal, name="focal", keys={"alpha": "FOCAL_LOSS_ALPHA", "gamma": "FOCAL_LOSS_GAMMA"}
)
CLS_LOSSES.add(cross_entropy=losses.cross_entropy, quality_focal=losses.QualityFocal)
CLS_LOSSES.add(varifocal=losses.Varifocal, matchability=losses.Matchability)

CLS_TARGETS = Registry("CLS_TARGET")
CLS_TARGETS.add(one=terms.one, score=terms.score, overlap=terms.overlap)

BOX_LOSSES = Registry(
    "BBOX_REG_LOSS_TYPE", ("code",), "BBOX_REG_LOSSES", optional=True, several=True
)
BOX_LOSS_KEYS = {"weight": "BBOX_REG_LOSS_WEIGHT"}
BOX_LOSSES.register(terms.GIoULoss, name="giou", keys=BOX_LOSS_KEYS)
BOX_LOSSES.register(terms.IoULoss, name="iou", keys=BOX_LOSS_KEYS)
BOX_LOSSES.register(
    terms.SmoothL1Loss, name="smooth_l1", keys={**BOX_LOSS_KEYS, "beta": "SMOOTH_L1_LOSS_BETA"}
)
BOX_LOSSES.register(terms.NWDLoss, name="nwd", keys=BOX_LOSS_KEYS)
BOX_LOSSES.add(dfl=terms.DistributionFocalLoss)

BOX_WEIGHTS = Registry("BOX_WEIGHT", optional=True)
BOX_WEIGHTS.add(one=terms.one, score=terms.score, centerness=terms.central)
BOX_WEIGHTS.add(overlap=terms.overlap, confidence=terms.confidence)
QUALITIES = Registry("QUALITY", group="QUALITIES", optional=True)
QUALITIES.add(centerness=terms.central, overlap=terms.overlap)
NORMALISERS = Registry("NORMALISER")
NORMALISERS.add(positives=terms.positives, targets=terms.targets)
LEVEL_WEIGHTS = Registry("LEVEL_WEIGHT", injected=("num_levels",), optional=True)
LEVEL_WEIGHTS.add(balance=terms.Balance)

# fmt: off
CRITERION_PARTS = {
    "cls_loss": CLS_LOSSES, "cls_target": CLS_TARGETS, "box_terms": BOX_LOSSES,
    "box_weight": BOX_WEIGHTS, "quality": QUALITIES, "normaliser": NORMALISERS,
    "level_weight": LEVEL_WEIGHTS,
}
# A branch may pass the level weight of another branch, because it may have buffers.
CRITERION = Part(
    Criterion,
    injected=("level_weight",),
    keys={
        **{argument: kind.key for argument, kind in CRITERION_PARTS.items()},
        "quality_name": "QUALITY", "quality_weight": "QUALITY_LOSS_WEIGHT",
        "least": "NORMALISER_MIN", "least_per_image": "NORMALISER_PER_IMAGE",
        "box_least": "BOX_NORMALISER_MIN",
    },
    parts=CRITERION_PARTS,
)
# fmt: on

# Detections
SCORES = Registry("SCORE")
SCORES.add(sqrt=root, product=product)
SUPPRESSIONS = Registry("SUPPRESSION")
AGNOSTIC = {"class_agnostic": "CLASS_AGNOSTIC_NMS"}
NMS_KEYS = {"threshold": "NMS_THRESH_TEST", **AGNOSTIC}
SUPPRESSIONS.register(NMS, name="nms", keys=NMS_KEYS)
SUPPRESSIONS.register(ScoreVote, name="score_vote", keys=NMS_KEYS)
VOTE_KEYS = {"threshold": "TTA.VOTE_THRESH", **AGNOSTIC}
SUPPRESSIONS.register(Vote, name="vote", keys=VOTE_KEYS)
SUPPRESSIONS.register(
    SoftVote, name="soft_vote", keys={**VOTE_KEYS, "min_score": "TTA.SOFT_SCORE_MIN"}
)
SUPPRESSIONS.add(none=keep_all)

# fmt: off
POSTPROCESSOR = Part(
    PostProcessor,
    injected=("max_detections",),
    keys={
        "score_thresh": "SCORE_THRESH_TEST", "topk_candidates": "TOPK_CANDIDATES_TEST",
        "score": "SCORE", "suppression": "SUPPRESSION", "threshold_on_score": "THRESHOLD_ON_SCORE",
        "rank_by_class": "RANK_BY_CLASS", "rank_anchors": "RANK_ANCHORS", "clip": "CLIP_BOXES",
    },
    parts={"score": SCORES, "suppression": SUPPRESSIONS},
)
# fmt: on
