"""Configs and models by name, like Detectron2's model_zoo."""

from typing import NamedTuple

from detectron2.modeling import build_model
from torch import nn

from .checkpoints.checkpointer import SafeCheckpointer
from .config import use_available_device
from .config.files import get_config, get_config_file
from .config.inputs import values_in

__all__ = ["PUBLISHED", "Published", "get", "get_config", "get_config_file"]


class Published(NamedTuple):
    """Weights in mmdet's model zoo, for tools/convert_checkpoint.py.

    Attributes:
        detector: value of ``--detector``.
        ap: AP on COCO by mmdet.
    """

    detector: str
    file: str
    ap: float


PUBLISHED = (
    Published("atss", "atss_r50_fpn_1x_coco_20200209-985f7bd0.pth", 39.4),
    Published("atss", "atss_r101_fpn_1x_20200825-dfcadd6f.pth", 41.5),
    Published("gfl", "gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth", 40.2),
    Published("paa", "paa_r50_fpn_1x_coco_20200821-936edec3.pth", 40.4),
    Published("vfnet", "vfnet_r50_fpn_1x_coco_20201027-38db6f58.pth", 41.6),
    Published("tood", "tood_r50_fpn_1x_coco_20211210_103425-20e20746.pth", 42.4),
    Published(
        "tood", "tood_r101_fpn_dconv_c3-c5_mstrain_2x_coco_20211210_213728-4a824142.pth", 49.3
    ),
    Published(
        "tood_anchor", "tood_r50_fpn_anchor_based_1x_coco_20211214_100105-b776c134.pth", 42.4
    ),
    Published("vfnet", "vfnet_r50_fpn_mdconv_c3-c5_mstrain_2x_coco_20201027pth-6879c318.pth", 48.0),
    Published("ddod", "ddod_r50_fpn_1x_coco_20220523_223737-29b2fc67.pth", 41.7),
)


def get(name: str, weights: str | None = None, device: str | None = None) -> nn.Module:
    """Build a model in evaluation mode.

    Args:
        name: of a config, as in :func:`get_config_file`.
        weights: path or URL. By default random, except pretrained weights of timm that the config
            sets.
        device: by default MODEL.DEVICE, or the CPU if no GPU is available.

    Raises:
        UserError: for an unknown name, or weights that cannot be read or do not match the model.
    """
    cfg = get_config(name)
    if device is not None:
        cfg.MODEL.DEVICE = device
    else:
        use_available_device(cfg)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights  # a timm backbone then loads no weights of its own
    model = build_model(cfg).eval()
    if weights is not None:
        SafeCheckpointer(model, trained_with=values_in(cfg)).load(weights)
    return model
