"""Rules that choose training samples, one per file. ``MODEL.ATSS.ASSIGNER`` names a rule,
``MODEL.ATSS.ASSIGNERS.<name>`` configures it."""

from .atss import ATSS
from .ddod import DDOD
from .engine import use_engine
from .matcher import Matcher
from .matching import Matching
from .max_iou import MaxIoU
from .ota import OTA
from .paa import PAA
from .poto import POTO
from .registry import ASSIGNER_REGISTRY, SIMILARITIES
from .sampled import Sampled
from .sim_ota import SimOTA, SoftLabel
from .similarities import NWD, IoU, SimD
from .spatial_scale import SpatialScale
from .tal import TAL

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
    "Matcher",
    "Matching",
    "MaxIoU",
    "Sampled",
    "SimD",
    "SimOTA",
    "SoftLabel",
    "SpatialScale",
    "use_engine",
]
