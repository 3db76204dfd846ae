"""The detector and its parts; ``registry`` has those that configs name."""

from ..deprecated import renamed_names
from ..losses import Focal, Matchability, QualityFocal, Varifocal
from .backbone import P6P7FromP5, build_fpn, make_deformable
from .box_coding import BoxDeltas, Corners, Distribution, LegacyPixels, LogDistances, PointDistances
from .branch import Branch, Phase
from .criterion import Criterion
from .detector import ATSSDetector
from .dyhead import DynamicTower
from .head import ATSSHead
from .postprocess import PostProcessor
from .proposals import ATSSProposals, RPNHead
from .registry import (
    BOX_CODES,
    BOX_LOSSES,
    BOX_WEIGHTS,
    CLS_LOSSES,
    CLS_TARGETS,
    CRITERION,
    HEAD_REGISTRY,
    LEVEL_WEIGHTS,
    NORMALISERS,
    POSTPROCESSOR,
    QUALITIES,
    SCORES,
    SUPPRESSIONS,
    TOWERS,
)
from .suppression import NMS, ScoreVote, SoftVote, Vote, keep_all
from .terms import DistributionFocalLoss, GIoULoss, IoULoss, NWDLoss, SmoothL1Loss
from .tiles import ATSSWithTiles
from .tood_head import TOODHead
from .tta import ATSSWithTTA
from .vfnet_head import VFNetHead

__getattr__ = renamed_names(__name__)

# fmt: off
__all__ = [
    "BOX_CODES", "BOX_LOSSES", "BOX_WEIGHTS", "CLS_LOSSES", "CLS_TARGETS", "CRITERION",
    "HEAD_REGISTRY", "LEVEL_WEIGHTS", "NMS", "NORMALISERS", "POSTPROCESSOR", "QUALITIES", "SCORES",
    "SUPPRESSIONS", "TOWERS", "ATSSDetector", "ATSSHead", "ATSSProposals", "ATSSWithTTA",
    "ATSSWithTiles", "BoxDeltas", "Branch", "Corners", "Criterion", "Distribution",
    "DistributionFocalLoss", "DynamicTower", "Focal", "GIoULoss", "IoULoss", "LegacyPixels",
    "LogDistances", "Matchability", "NWDLoss", "P6P7FromP5", "Phase", "PointDistances",
    "PostProcessor", "QualityFocal", "RPNHead",
    "ScoreVote", "SmoothL1Loss", "SoftVote", "TOODHead", "VFNetHead", "Varifocal", "Vote",
    "build_fpn", "keep_all", "make_deformable",
]
# fmt: on
