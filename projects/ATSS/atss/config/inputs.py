"""Keys that weights depend on, without which they load but compute other values."""

from typing import Any

from detectron2.config import CfgNode

from atss_runner import planes

from .checks import flatten

PIXELS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
KEYS = (
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.ATSS.RELU_BEFORE_P7",
    "MODEL.RESNETS.STRIDE_IN_1X1",
)


def values_in(cfg: CfgNode) -> dict[str, Any]:
    """Return {key: value}, which a checkpoint can contain. Planes have no pixel values: they may
    begin with weights for three channels."""
    values = dict(flatten(cfg))
    keys = KEYS if cfg.INPUT.FORMAT == planes.FORMAT else (*PIXELS, *KEYS)
    return {k: list(x) if isinstance(x := values[k], tuple) else x for k in keys}
