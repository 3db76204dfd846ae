"""Checks of config values, whose messages name the key."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode

from atss_runner import planes

from ..deprecated import renamed_names
from ..errors import UserError, WrongValue, check_choice, check_range, with_message
from ..modeling.head import NORMS
from ..registry import OWN_PARTS

__getattr__ = renamed_names(__name__)

# (minimum, maximum) of a key, or of each value of a list, which must not be empty. The parts check
# the keys of this project.
LIMITS: dict[str, tuple[float, float]] = {
    "DATALOADER.NUM_WORKERS": (0, math.inf),
    "DATALOADER.PREFETCH_FACTOR": (1, math.inf),
    "DATALOADER.TIMEOUT": (0, math.inf),
    "INPUT.HIGHEST": (1, math.inf),
    "INPUT.MAX_SIZE_TEST": (0, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "MODEL.FPN.OUT_CHANNELS": (1, math.inf),
    "MODEL.PIXEL_STD": (1e-6, 1e6),
    "TEST.DETECTIONS_PER_IMAGE": (1, math.inf),
}
CHOICES = {
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601", planes.FORMAT),
    "INPUT.RESIZE": ("shortest", "stretch"),
    "MODEL.FPN.NORM": NORMS,
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
}
# Detectron2's groups and keys that ATSSDetector does not read: {name: the same here, or ""}. Keys
# of a group have their own names.
NO_EFFECT = {
    "MODEL.RETINANET": "MODEL.ATSS",
    "MODEL.RPN": "MODEL.ATSS",
    "MODEL.ROI_HEADS": "MODEL.ATSS",
    "MODEL.PROPOSAL_GENERATOR": "",
    "MODEL.ROI_BOX_HEAD": "",
    "MODEL.ROI_BOX_CASCADE_HEAD": "",
    "MODEL.ROI_MASK_HEAD": "",
    "MODEL.ROI_KEYPOINT_HEAD": "",
    "MODEL.SEM_SEG_HEAD": "",
    "MODEL.PANOPTIC_FPN": "",
    "MODEL.ANCHOR_GENERATOR.SIZES": "MODEL.ATSS.ANCHOR_SCALES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "MODEL.ATSS.ANCHOR_RATIOS",
    "MODEL.ANCHOR_GENERATOR.ANGLES": "",
}

# Keys of MODEL.ATSS that select detections, and those that select proposals in a first stage.
OF_DETECTIONS = {
    "SCORE_THRESH_TEST": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "THRESHOLD_ON_SCORE": "",
    "TOPK_CANDIDATES_TEST": "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "RANK_BY_CLASS": "",
    "RANK_ANCHORS": "",
    "CLIP_BOXES": "",
    "NMS_THRESH_TEST": "MODEL.RPN.NMS_THRESH",
    "CLASS_AGNOSTIC_NMS": "",
    "SUPPRESSION": "MODEL.RPN.NMS_THRESH",
}

# Keys of MODEL.ATSS that ATSSDetector alone obeys, and their values without effect.
OF_DETECTOR = {
    "CHANNELS_LAST": False,
    "COMPILE": None,
    "IMS_PER_BATCH_TEST": 1,
    "LEGACY_PIXELS": False,
    "PRECISION": "fp32",
}


def has_no_effect(key: str) -> bool:
    return key in NO_EFFECT or key.rpartition(".")[0] in NO_EFFECT


def check_values(cfg: CfgNode, limits: Mapping[str, tuple[float, float]] = LIMITS) -> None:
    """Check limits of numbers and choices of names.

    Raises:
        UserError: naming the key.
    """
    values = dict(flatten(cfg))
    for key, (low, high) in limits.items():
        check_range(key, values[key], low, high)
    for key, choices in CHOICES.items():
        check_choice(key, values[key], choices)
    for key, value in (("RESIZE", "stretch"), ("FORMAT", planes.FORMAT)):
        if cfg.TEST.AUG.ENABLED and cfg.INPUT[key] == value:
            raise UserError(f"TEST.AUG.ENABLED True is not possible with INPUT.{key} {value}")
    if cfg.INPUT.RESIZE == "stretch":
        for key in ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"):
            check_range(key, values[key], 1)
        if len(cfg.INPUT.MIN_SIZE_TRAIN) != 1:
            raise UserError(
                "INPUT.RESIZE stretch needs one INPUT.MIN_SIZE_TRAIN, the height, got "
                f"{cfg.INPUT.MIN_SIZE_TRAIN}"
            )


def check_first_stage(cfg: CfgNode) -> None:
    """Check the keys of MODEL.ATSS in a detector of two stages.

    Raises:
        UserError: for a key that a first stage would ignore, or an ambiguous number of classes.
    """
    for key, value in OF_DETECTOR.items():
        if cfg.MODEL.ATSS[key] != value:
            raise UserError(
                f"MODEL.ATSS.{key} is for ATSSDetector: with MODEL.PROPOSAL_GENERATOR.NAME "
                f"ATSSProposals it must be {value!r}, got {cfg.MODEL.ATSS[key]!r}"
            )
    number, of_rois = cfg.MODEL.ATSS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if number not in (1, -1, of_rois):
        raise UserError(
            "MODEL.ATSS.NUM_CLASSES of a first stage must be 1, for proposals of any class, or -1 "
            f"for MODEL.ROI_HEADS.NUM_CLASSES {of_rois}, got {number}"
        )


@contextmanager
def rename_errors(**keys: str) -> Iterator[None]:
    """Replace the argument in a WrongValue by its key; ``keys`` is {argument: key}."""
    try:
        yield
    except WrongValue as error:
        key = keys.get(error.argument, error.argument)
        raise UserError(f"{key} {error.complaint}") from error


def lookup(entries: Mapping[str, Any] | Iterable[tuple[str, Any]], name: str, key: str) -> Any:
    """Return the entry that a key names.

    Raises:
        UserError: naming the key and the choices.
    """
    choices = dict(entries)
    if name not in choices:
        own_parts = "" if isinstance(entries, Mapping) else OWN_PARTS
        raise UserError(f"unknown {key} {name!r}: choose from {sorted(choices)}{own_parts}")
    return choices[name]


@contextmanager
def building(key: str, name: str, own: bool = False) -> Iterator[None]:
    """Add key and name of a part to an error in building it. An own part's errors but UserErrors
    keep their tracebacks."""
    try:
        yield
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = str(error).partition("\n")[0]
        raise with_message(error, f"{key} {name} cannot be used: {kind}{reason}", own) from error


def flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{name}.")
