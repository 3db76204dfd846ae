"""What can be wrong with the values of a config, in one sentence each that names the key."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode

# Least and greatest value of a key, or of each of its values, of which there must be some.
LIMITS = {
    "INPUT.MAX_SIZE_TEST": (0, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0, 1),
    "MODEL.ATSS.ANCHOR_RATIOS": (1e-6, 1e6),
    "MODEL.ATSS.ANCHOR_SCALES": (1e-6, 1e6),
    "MODEL.ATSS.BBOX_REG_LOSS_WEIGHT": (0, 1e6),
    "MODEL.ATSS.BBOX_REG_WEIGHTS": (1e-6, 1e6),
    "MODEL.ATSS.FOCAL_LOSS_ALPHA": (0, 1),
    "MODEL.ATSS.FOCAL_LOSS_GAMMA": (0, 1e3),
    "MODEL.ATSS.IMS_PER_BATCH_TEST": (1, math.inf),
    "MODEL.ATSS.NMS_THRESH_TEST": (0, 1),
    "MODEL.ATSS.NUM_CONVS": (0, math.inf),
    "MODEL.ATSS.PRIOR_PROB": (1e-9, 1 - 1e-9),
    "MODEL.ATSS.SCORE_THRESH_TEST": (0, 1),
    "MODEL.ATSS.SMOOTH_L1_LOSS_BETA": (0, 1e6),
    "MODEL.ATSS.TOPK_CANDIDATES_TEST": (1, math.inf),
    "MODEL.ATSS.TTA.MAX_DETECTIONS": (1, math.inf),
    "MODEL.ATSS.TTA.SOFT_MIN_SCORE": (0, 1),
    "MODEL.ATSS.TTA.VOTE_THRESH": (0, 1),
    "MODEL.FPN.OUT_CHANNELS": (1, math.inf),
    "MODEL.PIXEL_STD": (1e-6, 1e6),
    "TEST.DETECTIONS_PER_IMAGE": (1, math.inf),
}
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
CHOICES = {
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "MODEL.ATSS.CENTERNESS": ("box", "cls", ""),
    "MODEL.ATSS.DEFORM_TOWER": ("v1", "v2", ""),
    "MODEL.ATSS.NORM": NORMS,
    "MODEL.FPN.NORM": NORMS,
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
}


def check_values(cfg: CfgNode, limits: Mapping[str, tuple[float, float]] = LIMITS) -> None:
    """That numbers lie within their limits, and names are known.

    Raises:
        ValueError: naming the key.
    """
    known = dict(flatten(cfg))
    for key, (low, high) in limits.items():
        value = known[key]
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, int | float) or not low <= number <= high:
                least_and_most = f"from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
                raise ValueError(f"{key} must be {least_and_most}, not {value!r}")
        if value in ([], ()):
            raise ValueError(f"{key} is empty")
    for key, choices in CHOICES.items():
        if known[key] not in choices:
            raise ValueError(f"{key} is {known[key]!r}; known are {[*choices]}")


def lookup(known: Mapping[str, Any] | Iterable[tuple[str, Any]], name: str, key: str) -> Any:
    """The entry of a dictionary or registry that a key of the config names.

    Raises:
        ValueError: naming the key, and what is known.
    """
    entries = dict(known)
    if name not in entries:
        raise ValueError(f"{key} is {name!r}; known are {sorted(entries)}")
    return entries[name]


@contextmanager
def building(key: str, name: str) -> Iterator[None]:
    """Says of an error that comes up in building a part which key chose it."""
    try:
        yield
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{key} {name} does not work here: {kind}{reason}") from error


def flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(KEY, value) of all groups and keys."""
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{name}.")
