"""The detector and its parts, each in a file of its own."""

from .backbone import P6P7FromP5, build_fpn, make_deformable
from .box_coding import BoxDeltas, LogDistances, PointDistances
from .criterion import Criterion, OnBoxes, OnDeltas
from .detector import ATSSDetector
from .head import HEAD_REGISTRY, ATSSHead
from .postprocess import PostProcessor
from .tta import ATSSWithTTA

__all__ = [
    "HEAD_REGISTRY",
    "ATSSDetector",
    "ATSSHead",
    "ATSSWithTTA",
    "BoxDeltas",
    "Criterion",
    "LogDistances",
    "OnBoxes",
    "OnDeltas",
    "P6P7FromP5",
    "PointDistances",
    "PostProcessor",
    "build_fpn",
    "make_deformable",
]
