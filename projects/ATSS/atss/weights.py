"""Reads files of weights. Nothing in a file is executed, whoever made it.

A pickle is a program: it names functions and has them called. Here it gets the few that build
arrays, in place of numpy's own, which believe what a file says about memory, and an empty object
for each path, argument or log that other projects save beside weights.
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
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .deprecated import renamed_names

__getattr__ = renamed_names(__name__)


class WeightsError(ValueError):
    """Says in one sentence which file is at fault, and how."""


# Keys of a checkpoint under which its weights may stand.
KEYS = ("model", "state_dict")
# Beginnings of names: of nn.DataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")


def load_weights(path: str | Path, mmap: bool = False) -> Any:
    """The content of a file, on the CPU: a pickle of arrays, dictionaries, lists, strings and
    numbers if its name ends in .pkl, as in Detectron2's model zoo; tensors if it ends in
    .safetensors; else what torch.save wrote.

    torch.load does not compare the checksums (CRC-32) that torch.save writes; here they are.

    Args:
        mmap: whether tensors that torch.save wrote stay on the disk until they are used.

    Raises:
        WeightsError: if it cannot be read, is damaged, or holds objects of other kinds.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                # Files of Python 2 hold the bytes of arrays as text.
                return _DataUnpickler(file, encoding="latin1").load()
        stat = os.stat(path)
        if wrong := _wrong_checksum(str(path), stat.st_mtime_ns, stat.st_size):
            raise WeightsError(f"{path} is damaged: the checksum of {wrong} in it is wrong")
        with torch.serialization.safe_globals([(known, name) for name, known in _KNOWN.items()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except WeightsError:
        raise
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors: {error}") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever damage makes of a reader
        # torch's error has the name of an unknown object in its message alone.
        unknown = re.search(r"\bGLOBAL (\S+)", str(error))
        if unknown or isinstance(error, _Refused):
            reason = f"it asks for {unknown[1]}" if unknown else error
            raise WeightsError(
                f"{path} holds more than weights ({reason}) and is not read: save the weights "
                "alone, by torch.save(model.state_dict(), FILE)"
            ) from error
        what = "is no checkpoint, or is damaged"
        if isinstance(error, pickle.UnpicklingError) and not str(path).endswith(".pkl"):
            what = "is no checkpoint, or wants to run code when it is read, which is not done here"
        raise WeightsError(f"{path} {what}") from error


@functools.cache
def _wrong_checksum(path: str, modified: int, size: int) -> str | None:
    """Name of the first part of a file of torch.save that differs from its checksum; None if there
    is none, or the file has no checksums: legacy ones, and after ``set_crc32_options(False)``.
    Looked at once: a resumption reads its checkpoint several times.

    Args:
        modified, size: of the file, which is looked at again if they change.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip() if any(part.CRC for part in file.infolist()) else None


def find_weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in the content of a file: all of it, or the entry under one of KEYS. Arrays in
    it become tensors in place, because it has the versions of modules as an attribute.

    Raises:
        WeightsError: naming the file and the first entry that is no tensor.
    """
    for key in KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds no weights")
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            with suppress(TypeError):  # an array of text
                content[name] = value = torch.as_tensor(value)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path} holds no weights: {name!r} is no tensor")
    return content


def unwrapped(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights, then the same without one, two, ... of PREFIXES that all names begin with."""
    yield weights
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            inner = copy.copy(weights)
            consume_prefix_in_state_dict_if_present(inner, prefix)
            yield from unwrapped(inner)


def fit_names(weights: dict[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    """The weights without PREFIXES if that makes any name one of a model's ``names``, else as they
    are."""
    return next((x for x in unwrapped(weights) if names & x.keys()), weights)


def verify_download(url: str, path: str | Path) -> None:
    """Compares a downloaded file with the checksum in its name, where it has one: the first eight
    digits of its SHA-256, as in resnet50-0676ba61.pth of torchvision or mmdet's files.

    Raises:
        WeightsError: where they differ.
    """
    match = re.search(r"-([0-9a-f]{8})\.(?:pth|pt|pkl)$", url)
    if match is None or re.fullmatch(r"(?:19|20)\d\d[01]\d[0-3]\d", match[1]):  # a date
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    if digest != match[1]:
        raise WeightsError(
            f"the download of {url} is damaged or not the original: its SHA-256 begins with "
            f"{digest}, not with {match[1]} as its name says; delete {path} to download it again"
        )


class _Refused(Exception):
    """What a pickle asked for."""


class _DType:
    """Stands for a numpy.dtype while a file is read: numbers and text, never objects or records."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSU":
            raise _Refused(f"it has an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its state from a file, but its type only from a :class:`_DType`."""

    def __new__(cls, *_: Any) -> "_Array":
        return np.empty(0, np.uint8).view(cls)  # the state follows

    def __setstate__(self, state: tuple) -> None:
        if self.size:  # a tensor may share its memory, which would be freed
            raise _Refused("it has an array that is filled twice")
        version, shape, kind, by_column, raw = state
        super().__setstate__((version, shape, _checked(kind), by_column, raw))


class _Empty:
    """Stands for an object beside the weights, without its content."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _checked(kind: Any) -> np.dtype:
    if not isinstance(kind, _DType):
        raise _Refused("it has an array of no type")
    return kind.dtype


def _scalar(kind: _DType, raw: bytes | str) -> np.generic:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, _checked(kind))[0]


def _from_buffer(buffer: bytes, kind: _DType, shape: tuple, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, _checked(kind)).reshape(shape, order=order).copy()


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise _Refused(f"it wants text encoded as {encoding}")
    return text.encode("latin1")


# Names that pickles of arrays use, from numpy 1 and numpy 2, and those of objects that are left
# empty. There are no others.
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    **{
        f"numpy.{core}.{name}": known
        for core in ("core", "_core")
        for name, known in {
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
    "mmengine.logging.history_buffer.HistoryBuffer": _Empty,
    "builtins.getattr": _Empty,  # a HistoryBuffer holds its own methods
}


class _DataUnpickler(pickle.Unpickler):
    """Knows what is in :data:`_KNOWN`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise _Refused(f"it asks for {module}.{name}")
        return _KNOWN[f"{module}.{name}"]
