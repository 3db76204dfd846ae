"""Configs and models by name, as Detectron2's model_zoo has them."""

from typing import NamedTuple

from detectron2.modeling import build_model
from torch import nn

from .checkpoints.checkpointer import SafeCheckpointer
from .config import use_available_device
from .config.files import get_config, get_config_file

__all__ = ["PUBLISHED", "Published", "get", "get_config", "get_config_file"]


class Published(NamedTuple):
    """Weights that mmdet publishes, for tools/convert_checkpoint.py.

    Attributes:
        detector: as of ``--detector``.
        file: name in mmdet's model zoo.
        ap: on COCO, as mmdet publishes it.
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
    """A model in evaluation mode.

    Args:
        name: as in :func:`get_config_file`.
        weights: a path or address; by default random, or of the backbone alone where the config
            names some of timm's.
        device: by default that of the config, or the CPU where there is no GPU.

    Raises:
        ValueError: for an unknown name, or weights that cannot be read or fit nowhere.
    """
    cfg = get_config(name)
    if device is not None:
        cfg.MODEL.DEVICE = device
    else:
        use_available_device(cfg)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights  # so that a backbone's own are not looked for
    model = build_model(cfg).eval()
    if weights is not None:
        SafeCheckpointer(model).load(weights)
    return model
