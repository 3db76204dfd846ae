"""What can be wrong with the values of a config, in one sentence each that names the key."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode

from ..deprecated import renamed_names
from ..errors import UserError, WrongValue, check_choice, check_range
from ..modeling.head import NORMS
from ..registry import OWN_PARTS

__getattr__ = renamed_names(__name__)

# Least and greatest value of a key, or of each of its values, of which there must be some. Of our
# own keys, what they are handed to checks it.
LIMITS: dict[str, tuple[float, float]] = {
    "DATALOADER.NUM_WORKERS": (0, math.inf),
    "DATALOADER.PREFETCH_FACTOR": (1, math.inf),
    "DATALOADER.TIMEOUT": (0, math.inf),
    "INPUT.MAX_SIZE_TEST": (0, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "MODEL.FPN.OUT_CHANNELS": (1, math.inf),
    "MODEL.PIXEL_STD": (1e-6, 1e6),
}
CHOICES = {
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "MODEL.FPN.NORM": NORMS,
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
}


def check_values(cfg: CfgNode, limits: Mapping[str, tuple[float, float]] = LIMITS) -> None:
    """That numbers lie within their limits, and names are known.

    Raises:
        ValueError: naming the key.
    """
    known = dict(flatten(cfg))
    try:
        for key, (low, high) in limits.items():
            check_range(key, known[key], low, high)
        for key, choices in CHOICES.items():
            check_choice(key, known[key], choices)
    except WrongValue as error:
        raise UserError(str(error)) from error


@contextmanager
def rename_errors(**keys: str) -> Iterator[None]:
    """Says of a wrong argument which key it comes from.

    Args:
        keys: {argument: key}.
    """
    try:
        yield
    except WrongValue as error:
        key = keys.get(error.argument, error.argument)
        raise UserError(f"{key} {error.complaint}") from error


def lookup(known: Mapping[str, Any] | Iterable[tuple[str, Any]], name: str, key: str) -> Any:
    """The entry of a dictionary or registry that a key of the config names.

    Raises:
        ValueError: naming the key, and what is known.
    """
    entries = dict(known)
    if name not in entries:
        own_parts = "" if isinstance(known, Mapping) else OWN_PARTS
        raise UserError(f"unknown {key} {name!r}: choose from {sorted(entries)}{own_parts}")
    return entries[name]


@contextmanager
def building(key: str, name: str) -> Iterator[None]:
    """Says of an error that comes up in building a part which key chose it."""
    try:
        yield
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key} {name} does not work here: {kind}{reason}") from error


def flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(KEY, value) of all groups and keys."""
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{name}.")
