"""The rules and similarities that a config names."""

from ..registry import Registry
from .atss import ATSS
from .ddod import DDOD
from .matcher import Matcher
from .max_iou import MaxIoU
from .ota import OTA
from .paa import PAA
from .poto import POTO
from .sampled import Sampled
from .sim_ota import SimOTA, SoftLabel
from .similarities import NWD, IoU, SimD
from .spatial_scale import SpatialScale
from .tal import TAL

SIMILARITIES = Registry("SIMILARITY", group="SIMILARITIES")
SIMILARITIES.add(iou=IoU, nwd=NWD, simd=SimD)

ASSIGNER_REGISTRY = Registry(
    "ASSIGNER", injected=("num_levels", "num_classes"), removed={"TopK": "docs/own_assigner.md"}
)
SIMILARITY = {"similarity": SIMILARITIES}
ASSIGNER_REGISTRY.register(ATSS, parts=SIMILARITY, legacy={"ALPHA": "DDOD"})
ASSIGNER_REGISTRY.register(MaxIoU, parts=SIMILARITY)
ASSIGNER_REGISTRY.register(SpatialScale)
ASSIGNER_REGISTRY.register(Matcher)
for rule in (DDOD, PAA, OTA, SimOTA, SoftLabel, TAL, POTO):
    ASSIGNER_REGISTRY.register(rule, parts=SIMILARITY)
ASSIGNER_REGISTRY.register(Sampled, parts={"rule": ASSIGNER_REGISTRY})
