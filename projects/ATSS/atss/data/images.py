"""Looks at one image file by its header: what training would make of it. Reads it."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from typing import IO

import fsspec
import numpy as np
from detectron2.data.detection_utils import (
    _apply_exif_orientation,
    convert_PIL_to_numpy,
)
from detectron2.data.detection_utils import (
    read_image as read_image_d2,
)
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.findings import ERROR, KINDS
from ..labels.headers import problems, read_header, verify

__getattr__ = renamed_names(__name__)

# Modules that call what reads a file.
READERS = (__name__, f"{__package__}.mapper")


def read_image(
    file_name: str,
    sizes: Sequence[tuple[int, int]] = (),
    labelled: tuple[int, int] | None = None,
    image_format: str = "BGR",
) -> np.ndarray:
    """(H, W, C) image, turned as EXIF says; its file is opened once. What training, evaluation or
    prediction would read wrongly is refused.

    Args:
        labelled, sizes: as of :func:`problems`.
        image_format: INPUT.FORMAT. "BGR" gives three channels of uint8.

    Raises:
        ValueError, OSError: with a sentence that names the file.
    """
    with blame_file(file_name):
        with _open(file_name) as file:
            content = BytesIO(file.read())
        header = read_header(content)
        if header.format == "PNG":
            # Detectron2 meets damage first where it looks for an EXIF, and passes over it.
            verify(content)
        for kind, problem in problems(header, labelled, sizes):
            if KINDS[kind].level == ERROR:
                raise UserError(f"the image {file_name} {problem}")
        with Image.open(content) as image:
            return convert_PIL_to_numpy(_apply_exif_orientation(image), image_format)


@contextmanager
def blame_file(file_name: str) -> Iterator[None]:
    """Has whatever goes wrong in reading and mapping an image name its file."""
    try:
        yield
    except Exception as error:  # Pillow raises errors of many types where a file is damaged
        if isinstance(error, ValueError) and file_name in str(error):
            raise
        if _is_of_reading(error):
            raise OSError(f"cannot read the image {file_name}: {error}") from error
        if isinstance(error, ValueError):
            raise UserError(f"the image {file_name} cannot be mapped: {error}") from error
        error.add_note(f"in mapping {file_name}")  # a bug, of an augmentation for example
        raise


def _is_of_reading(error: Exception) -> bool:
    """Whether it came out of what reads the file, called from here or by Detectron2's mapper and
    not by an augmentation, which may read others."""
    reading = {x.__code__ for x in (read_image_d2, read_image)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code in reading:
            return True
        if frame.f_globals["__name__"] not in READERS:
            return False
    return False


# ------------------------------------------------------------------------------------------------
# Addresses
# ------------------------------------------------------------------------------------------------


class _OfFsspec(PathHandler):
    """A file system of fsspec, such as that of s3fs.

    Args:
        prefix: of its addresses, such as ``s3://``.
    """

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: object) -> IO:
        return fsspec.open(path, mode).open()

    def _isfile(self, path: str, **_: object) -> bool:
        system, place = fsspec.core.url_to_fs(path)
        return system.isfile(place)


def provide(address: str) -> None:
    """Have Detectron2's PathManager open an address by fsspec, if nothing else does."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme in fsspec.available_protocols():
        _provide(f"{scheme}://")


@cache
def _provide(prefix: str) -> None:
    with suppress(KeyError):  # another handler is registered
        PathManager.register_handler(_OfFsspec(prefix), allow_override=False)


def _open(file_name: str) -> IO:
    provide(file_name)
    return PathManager.open(file_name, "rb")
