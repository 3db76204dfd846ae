"""Configs and models by name, as Detectron2's model_zoo has them."""

from detectron2.modeling import build_model
from torch import nn

from .checkpoints.checkpointer import SafeCheckpointer
from .config import use_available_device
from .config.read import get_config, get_config_file

__all__ = ["get", "get_config", "get_config_file"]


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
