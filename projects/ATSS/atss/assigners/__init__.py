"""How training samples are chosen: one rule per file, all through one call.

    assigner(anchors: Anchors, gt: GroundTruth, predictions: Predictions | None) -> Assignment

A rule is a class that takes its parameters as keyword arguments. Registered, it can be named in a
config: ``MODEL.ATSS.ASSIGNER`` chooses it, ``MODEL.ATSS.ASSIGNERS.<name>`` holds its arguments.
"""

from detectron2.utils.registry import Registry

from .atss import ATSS
from .max_iou import MaxIoU
from .spatial_scale import SpatialScale
from .top_k import TopK

ASSIGNER_REGISTRY = Registry("ASSIGNER")
for rule in (ATSS, MaxIoU, SpatialScale, TopK):
    ASSIGNER_REGISTRY.register(rule)

__all__ = ["ASSIGNER_REGISTRY", "ATSS", "MaxIoU", "SpatialScale", "TopK"]
