"""Keys of the config that weights depend on, without which they load but compute other values."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from atss_runner import planes

from ..weights import WeightsError

# Entry of a checkpoint: {key: value}.
ENTRY = "trained_with"
PIXELS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
KEYS = (
    *PIXELS,
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.ATSS.RELU_BEFORE_P7",
    "MODEL.RESNETS.STRIDE_IN_1X1",
)


def values_in(cfg: CfgNode) -> dict[str, Any]:
    """Return {key: value}, which a checkpoint can contain."""
    values = {}
    for key in KEYS:
        node: Any = cfg
        for name in key.split("."):
            node = node[name]
        values[key] = list(node) if isinstance(node, tuple) else node
    return values


def refuse_others(stored: Any, values: Mapping[str, Any], path: str) -> None:
    """Compare the keys of a checkpoint with those of the config.

    Args:
        stored: ENTRY of the checkpoint, None for most.
        values: from :func:`values_in`; empty if there is no config.

    Raises:
        WeightsError: if they differ. Planes may begin with weights for three channels.
    """
    if not isinstance(stored, Mapping):
        return
    skipped = PIXELS if values.get("INPUT.FORMAT") == planes.FORMAT else ()
    differ = [x for x in values if x not in skipped and stored.get(x, values[x]) != values[x]]
    if differ:
        theirs = ", ".join(f"{key} {stored[key]}" for key in differ)
        ours = ", ".join(f"{values[key]}" for key in differ)
        raise WeightsError(
            f"the weights {path} were trained with {theirs}, the config has {ours}: set these "
            "keys, or name the config that was written beside the weights first in _BASE_"
        )
