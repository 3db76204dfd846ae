"""Configs and models by name, as Detectron2's model_zoo has them."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .config_file import load_config
from .engine import SafeCheckpointer


def get_config_file(name: str) -> str:
    """Path of a config.

    Args:
        name: as MODEL_ZOO.md lists it, such as "ATSS_R_50_FPN_1x" or "tables/atss_k3".

    Raises:
        ValueError: for an unknown name, with those that there are.
    """
    package = Path(__file__).resolve().parent
    # Beside the package where it was installed from a wheel, in the project's folder otherwise.
    folders = (package / "configs", package.parents[2] / "configs")
    root = next(folder for folder in folders if (folder / "Base-ATSS.yaml").is_file())
    file = root / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
        raise ValueError(f"there is no config {name!r}; known are {', '.join(known)}")
    return str(file)


def get_config(name: str) -> CfgNode:
    """A config with the keys of this project; ``name`` as in :func:`get_config_file`."""
    return load_config(get_config_file(name))


def get(name: str, weights: str | None = None, device: str | None = None) -> nn.Module:
    """A model in evaluation mode.

    Args:
        name: as in :func:`get_config_file`.
        weights: a path or address; random weights by default.
        device: that of the config by default.

    Raises:
        ValueError: for an unknown name, or weights that cannot be read or fit nowhere.
    """
    cfg = get_config(name)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg).eval()
    if weights is not None:
        SafeCheckpointer(model).load(weights)
    return model
