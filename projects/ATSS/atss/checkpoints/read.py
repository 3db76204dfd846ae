"""Reads files of weights. Nothing in a file is executed, whoever made it.

A pickle is a program: it names functions and has them called. Here it gets the few that build
arrays, in place of numpy's own, which believe what a file says about memory.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class WeightsError(ValueError):
    """Says in one sentence which file is at fault, and how."""


def read(path: str | Path) -> Any:
    """What a file holds: a pickle of arrays, dictionaries, lists, strings and numbers where its
    name ends in .pkl, as in Detectron2's model zoo; else what torch.save wrote, on the CPU.

    Raises:
        WeightsError: where it cannot be read, is damaged, or wants code to run.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                # Files of Python 2 hold the bytes of arrays as text.
                return _DataUnpickler(file, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except _Refused as error:
        raise WeightsError(f"{path} holds more than weights: {error}, and is not read") from error
    except Exception as error:  # whatever damage makes of a reader
        what = "is no checkpoint, or is damaged"
        if isinstance(error, pickle.UnpicklingError) and not str(path).endswith(".pkl"):
            what = "is no checkpoint, or wants to run code when it is read, which is not done here"
        raise WeightsError(f"{path} {what}") from error


def require_tensors(content: Any, path: str | Path) -> None:
    """That it is what a model can load: names with tensors or arrays.

    Raises:
        WeightsError: naming the file and the first thing that is none.
    """
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray):
            raise WeightsError(f"{path} holds no weights: {name!r} is no tensor")


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

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, by_column, raw = state
        super().__setstate__((version, shape, _checked(kind), by_column, raw))


def _checked(kind: Any) -> np.dtype:
    if not isinstance(kind, _DType):
        raise _Refused("it has an array of no type")
    return kind.dtype


def _array(subtype: Any, shape: Any, typecode: Any) -> _Array:
    return np.empty(0, np.uint8).view(_Array)  # the state follows


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


class _DataUnpickler(pickle.Unpickler):
    """Knows the names that pickles of arrays use, from numpy 1 and numpy 2, and no others."""

    KNOWN: ClassVar = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument
        ("numpy", "dtype"): _DType,
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise _Refused(f"it asks for {module}.{name}")
        return self.KNOWN[module, name]
