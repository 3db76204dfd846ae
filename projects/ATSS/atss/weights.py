"""Weights, read without executing anything.

A pickle is a program that calls functions by name. This reader allows functions that build arrays,
in versions that check memory sizes in the file, and replaces other objects beside weights by empty
ones, or by dictionaries of their attributes.
"""

import copy
import functools
import hashlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .deprecated import renamed_names
from .errors import UserError

__getattr__ = renamed_names(__name__)


class WeightsError(UserError):
    """Error for a file of weights that cannot be used."""


# Keys of a checkpoint that may contain its weights.
KEYS = ("model", "state_dict")
# Prefixes of names: of nn.DataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")


def widen_first(weights: dict[str, Any], model: nn.Module, channels: int) -> dict[str, Any]:
    """Return weights whose first convolution takes ``channels`` instead of three: its filters are
    repeated and scaled by 3 / channels, or summed for one channel, as timm does.

    Args:
        weights: by the model's names or others. A copy keeps their attribute, the versions.
        model: whose convolutions of so many channels have the shapes of the widened ones.
    """
    if channels == 3:
        return weights
    own = {name: x.shape for name, x in model.state_dict().items()}
    convolutions = [x.weight.shape for x in model.modules() if isinstance(x, nn.Conv2d)]
    narrow = {(x[0], 3, *x[2:]) for x in convolutions if x[1] == channels}
    widened = copy.copy(weights)
    for name, weight in weights.items():
        # Not another convolution of three channels, such as one of groups.
        if tuple(weight.shape) in narrow and own.get(name) != weight.shape:
            widened[name] = _widen(torch.as_tensor(weight), channels)
    return widened


def _widen(weight: Tensor, channels: int) -> Tensor:
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def load_weights(path: str | Path, mmap: bool = False) -> Any:
    """Return the content of a file of weights, on the CPU.

    A .pkl is a pickle of arrays and plain Python types, as in Detectron2's model zoo; other files
    are safetensors or of torch.save, whose checksums (CRC-32) torch.load does not compare.

    Args:
        mmap: leave tensors of torch.save on the disk until they are used.

    Raises:
        WeightsError: if the file cannot be read, is damaged, or contains other objects.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                # Python 2 pickled the bytes of arrays as text.
                return _DataUnpickler(file, encoding="latin1").load()
        stat = os.stat(path)
        if wrong := _wrong_checksum(str(path), stat.st_mtime_ns, stat.st_size):
            raise WeightsError(f"{path} is damaged: wrong checksum of {wrong}")
        with torch.serialization.safe_globals([(x, name) for name, x in _ALLOWED.items()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except WeightsError:
        raise
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors: {error}") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged files raise errors of many types
        # torch names an unknown object in its message only.
        unknown = re.search(r"\bGLOBAL (\S+)", str(error))
        if unknown or isinstance(error, _Refused):
            reason = f"it asks for {unknown[1]}" if unknown else error
            raise WeightsError(
                f"{path} contains more than weights ({reason}) and is not loaded: save only the "
                "weights, with torch.save(model.state_dict(), FILE)"
            ) from error
        problem = "is no checkpoint, or is damaged"
        if isinstance(error, pickle.UnpicklingError) and not str(path).endswith(".pkl"):
            problem = "is no checkpoint, or contains code, which is not executed"
        raise WeightsError(f"{path} {problem}") from error


@functools.cache
def _wrong_checksum(path: str, modified: int, size: int) -> str | None:
    """Return the first part with a wrong checksum in a file of torch.save, or None. Cached: a
    resumption reads a checkpoint several times."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip() if any(part.CRC for part in file.infolist()) else None


def find_weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in the content of a file: all of it, or the entry under one of KEYS.
    Arrays are replaced in place: the dictionary has an attribute, the versions of modules.

    Raises:
        WeightsError: naming the first entry that is no tensor.
    """
    for key in KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} contains no weights")
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            with suppress(TypeError):  # an array of text
                content[name] = value = torch.as_tensor(value)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path} contains no weights: {name!r} is no tensor")
    return content


def unwrapped(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the weights, then without one, two, ... of PREFIXES that all names share."""
    yield weights
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            inner = copy.copy(weights)
            consume_prefix_in_state_dict_if_present(inner, prefix)
            yield from unwrapped(inner)


def fit_names(weights: dict[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    """Return the weights without PREFIXES if one of ``names`` then fits."""
    return next((x for x in unwrapped(weights) if names & x.keys()), weights)


def verify_download(url: str, path: str | Path) -> None:
    """Compare a file with the digits of its SHA-256 in its name, as in torchvision's
    resnet50-0676ba61.pth.

    Raises:
        WeightsError: if they differ.
    """
    match = re.search(r"-([0-9a-f]{8})\.(?:pth|pt|pkl)$", url)
    if match is None or re.fullmatch(r"(?:19|20)\d\d[01]\d[0-3]\d", match[1]):  # a date
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    if digest != match[1]:
        raise WeightsError(
            f"the download of {url} is damaged or not the original: expected a SHA-256 that "
            f"begins with {match[1]}, as in its name, got {digest}; delete {path} to download it "
            "again"
        )


class _Refused(Exception):
    """Error for content that is not allowed."""


class _DType:
    """numpy.dtype of numbers and text, without objects or records."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSU":
            raise _Refused(f"it contains an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Array whose dtype comes from a :class:`_DType`."""

    def __new__(cls, *_: Any) -> "_Array":
        return np.empty(0, np.uint8).view(cls)  # __setstate__ follows

    def __setstate__(self, state: tuple) -> None:
        if self.size:  # a tensor may share its memory, which would be freed
            raise _Refused("it fills an array twice")
        version, shape, kind, by_column, raw = state
        super().__setstate__((version, shape, _checked(kind), by_column, raw))


class _Empty:
    """Object in place of one beside the weights."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Record(dict):
    """Attributes of an object, in its place."""

    def __new__(cls, *_: Any) -> "_Record":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise _Refused("it contains an object without named attributes")
        self.update(state)


def _checked(kind: Any) -> np.dtype:
    if not isinstance(kind, _DType):
        raise _Refused("it contains an array without a dtype")
    return kind.dtype


def _scalar(kind: _DType, raw: bytes | str) -> np.generic:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, _checked(kind))[0]


def _from_buffer(buffer: bytes, kind: _DType, shape: tuple, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, _checked(kind)).reshape(shape, order=order).copy()


def _encode(text: str, encoding: str) -> bytes:
    """Pickles of protocol 2 encode bytes as text."""
    if encoding != "latin1":
        raise _Refused(f"it contains text encoded as {encoding}")
    return text.encode("latin1")


# Functions and types of pickled arrays in NumPy 1 and 2, and objects that become empty ones or
# dictionaries.
_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    **{
        f"numpy.{core}.{name}": replacement
        for core in ("core", "_core")
        for name, replacement in {
            "multiarray._reconstruct": _Array,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _from_buffer,
        }.items()
    },
    "argparse.Namespace": _Empty,
    # Python 3.13 has the second name.
    **{
        f"{module}.{system}Path": _Empty
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows", "PurePosix", "PureWindows")
    },
    # OTX 2 had two places for its modules.
    **{f"otx.{place}types.label.LabelInfo": _Record for place in ("core.", "")},
    **{f"otx.{place}config.data.TileConfig": _Empty for place in ("core.", "")},
    "mmengine.logging.history_buffer.HistoryBuffer": _Empty,
    "builtins.getattr": _Empty,  # a HistoryBuffer refers to its methods
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise _Refused(f"it asks for {module}.{name}")
        return _ALLOWED[f"{module}.{name}"]
