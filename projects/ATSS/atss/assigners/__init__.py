"""How training samples are chosen: one rule per file, all through one call.

    assigner(anchors: Anchors, gt: GroundTruth, predictions: Predictions | None) -> Assignment

A rule is a class that takes its parameters as keyword arguments, an
:class:`~atss.structures.Assigner`. Registered, it can be named in a config:
``MODEL.ATSS.ASSIGNER`` chooses it, ``MODEL.ATSS.ASSIGNERS.<name>`` holds its arguments.
"""

from ..parts import Parts
from .atss import ATSS
from .ddod import DDOD
from .engine import use_engine
from .matching import Matching
from .max_iou import MaxIoU
from .ota import OTA
from .paa import PAA
from .poto import POTO
from .sim_ota import SimOTA, SoftLabel
from .similarities import NWD, IoU, SimD
from .spatial_scale import SpatialScale
from .tal import TAL

# Of two boxes (..., 4) each -> (...).
SIMILARITIES = Parts("SIMILARITY", group="SIMILARITIES")
for similarity in (IoU, NWD, SimD):
    SIMILARITIES.register(similarity, name=similarity.__name__.lower())

ASSIGNER_REGISTRY = Parts(
    "ASSIGNER", known=("num_levels", "num_classes"), gone={"TopK": "docs/own_assigner.md"}
)
LIKE = {"similarity": SIMILARITIES}
ASSIGNER_REGISTRY.register(ATSS, parts=LIKE, legacy={"ALPHA": "DDOD"})
ASSIGNER_REGISTRY.register(MaxIoU, parts=LIKE)
ASSIGNER_REGISTRY.register(SpatialScale)
for rule in (DDOD, PAA, OTA, SimOTA, SoftLabel, TAL, POTO):
    ASSIGNER_REGISTRY.register(rule, parts=LIKE)

__all__ = [
    "ASSIGNER_REGISTRY",
    "ATSS",
    "DDOD",
    "NWD",
    "OTA",
    "PAA",
    "POTO",
    "SIMILARITIES",
    "TAL",
    "IoU",
    "Matching",
    "MaxIoU",
    "SimD",
    "SimOTA",
    "SoftLabel",
    "SpatialScale",
    "use_engine",
]
