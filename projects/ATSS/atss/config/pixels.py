"""How pixels become numbers: a backbone of timm says it itself."""

from collections.abc import Collection

from detectron2.config import CfgNode

from ..errors import UserError
from ..modeling.timm_backbone import pixels_of

TIMM = "build_timm_fpn_backbone"


def complete_pixels(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Fills in, in place, what MODEL.TIMM.PIXELS asks for.

    Args:
        given: keys that somebody has typed, which are not to be overwritten silently.

    Raises:
        ValueError: as :func:`~atss.modeling.timm_backbone.pixels_of`, or where other values were
            typed.
    """
    if _asks(cfg):
        if set(given) & {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}:
            check_pixels(cfg)
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixels_of(cfg.MODEL.TIMM.NAME)


def check_pixels(cfg: CfgNode) -> None:
    """That they have been filled in: wrong ones would show in nothing but the results.

    Raises:
        ValueError: naming the keys.
    """
    there = cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if _asks(cfg) and there != (wanted := pixels_of(cfg.MODEL.TIMM.NAME)):
        raise UserError(
            "MODEL.TIMM.PIXELS wants INPUT.FORMAT {}, MODEL.PIXEL_MEAN {} and MODEL.PIXEL_STD {}, "
            "as atss.config.load_config fills in; False leaves them as they are".format(*wanted)
        )


def _asks(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME == TIMM and cfg.MODEL.TIMM.PIXELS
