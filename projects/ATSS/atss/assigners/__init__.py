"""How training samples are chosen: one rule per file, all through one call.

    assigner(anchors: Anchors, gt: GroundTruth, predictions: Predictions | None) -> Assignment

A rule is a class that takes its parameters as keyword arguments. Registered, it can be named in a
config: ``MODEL.ATSS.ASSIGNER`` chooses it, ``MODEL.ATSS.ASSIGNERS.<name>`` holds its arguments.
"""

from ..geometry import iou
from ..parts import Parts
from .atss import ATSS
from .max_iou import MaxIoU
from .spatial_scale import SpatialScale
from .top_k import TopK

# Of two boxes (..., 4) each -> (...).
SIMILARITIES = Parts("SIMILARITY", group="SIMILARITIES")
SIMILARITIES.register(iou)

ASSIGNER_REGISTRY = Parts("ASSIGNER", known=("num_levels", "num_classes"))
ASSIGNER_REGISTRY.register(ATSS, parts={"similarity": SIMILARITIES})
for rule in (MaxIoU, SpatialScale, TopK):
    ASSIGNER_REGISTRY.register(rule)

__all__ = ["ASSIGNER_REGISTRY", "ATSS", "SIMILARITIES", "MaxIoU", "SpatialScale", "TopK"]
