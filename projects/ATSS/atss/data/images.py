"""Image files and addresses: reading, and checking that they exist."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from typing import IO, Any

import fsspec
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from atss_runner.images import Size
from atss_runner.planes import FORMAT, Planes

from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.findings import ERROR, KINDS
from ..labels.formats import ADDRESS
from ..labels.headers import Header, header_of, problems, read_header, verify

__getattr__ = renamed_names(__name__)


def read_image(
    file_name: str,
    sizes: Sequence[Size] = (),
    labelled: tuple[int, int] | None = None,
    image_format: str | Planes = "BGR",
) -> np.ndarray:
    """Read an image, turned by its EXIF orientation, as (H, W, C). The file is opened once.

    Args:
        labelled, sizes: see :func:`~atss.labels.headers.problems`.
        image_format: INPUT.FORMAT, or its Planes. "BGR" gives three channels of uint8.

    Raises:
        OSError: naming a file that cannot be read.
        UserError: naming a file that training or evaluation would read wrongly.
    """
    if isinstance(image_format, Planes):
        with blame_unreadable(file_name):
            pixels = image_format.scale(image_format.read(_read(file_name)))
            _refuse(file_name, header_of(pixels), labelled, sizes)
            return pixels
    with blame_unreadable(file_name):
        content = BytesIO(_read(file_name))
        header = read_header(content)
        if header.format == "PNG":
            # Detectron2 first meets damage when it looks for an EXIF, and ignores it.
            verify(content)
        _refuse(file_name, header, labelled, sizes)
        with Image.open(content) as image:
            return convert_PIL_to_numpy(_apply_exif_orientation(image), image_format)


def read_planes(file_name: str) -> np.ndarray:
    """Read the planes of an image as they are.

    Raises:
        OSError: naming a file that cannot be read.
    """
    with blame_unreadable(file_name):
        return Planes.read(_read(file_name))


def measure_planes(files: Iterable[str]) -> list[Any]:
    """Return KEY VALUE pairs of INPUT.FORMAT planes for images: their range, and mean and deviation
    of each plane. The range is that of the fewest bits that hold all values, at least eight.

    Raises:
        OSError: naming a file that cannot be read.
        UserError: naming an image with another number of planes than the first.
    """
    highest, pixels = 0.0, 0
    sums = np.zeros((2, 0))
    for file in files:
        planes = read_planes(file)
        planes = planes.reshape(*planes.shape[:2], -1).astype(np.float64)
        if not pixels:
            sums = np.zeros((2, planes.shape[2]))
        if planes.shape[2] != sums.shape[1]:
            raise UserError(f"{file} has {planes.shape[2]} planes, the first image {sums.shape[1]}")
        highest, pixels = max(highest, planes.max()), pixels + planes[:, :, 0].size
        sums += [(planes**power).sum(axis=(0, 1)) for power in (1, 2)]
    if not pixels:
        raise UserError("no image has planes to measure")
    highest = max(2 ** math.ceil(math.log2(highest + 1)) - 1, 255)
    mean, square = sums / pixels
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    means, deviations = (
        [round(255 / highest * x, 3) for x in values.tolist()] for values in (mean, deviation)
    )
    return [
        *("INPUT.FORMAT", FORMAT, "INPUT.HIGHEST", highest, "MODEL.PIXEL_MEAN", means),
        *("MODEL.PIXEL_STD", [x or 1.0 for x in deviations], "MODEL.TIMM.PIXELS", False),
        *("INPUT.SHOWN_PLANES", [min(i, len(means) - 1) for i in range(3)]),
    ]


def _read(file_name: str) -> bytes:
    register_handler(file_name)
    with PathManager.open(file_name, "rb") as file:
        return file.read()


def pixel_format(cfg: CfgNode) -> str | Planes:
    """Return INPUT.FORMAT, or its Planes.

    Raises:
        UserError: if pictures cannot show the planes.
    """
    if cfg.INPUT.FORMAT != FORMAT:
        return cfg.INPUT.FORMAT
    number, shown = len(cfg.MODEL.PIXEL_MEAN), tuple(cfg.INPUT.SHOWN_PLANES)
    if len(shown) != 3 or not set(shown) <= set(range(number)):
        raise UserError(
            f"INPUT.SHOWN_PLANES is {list(shown)}: three planes of 0 to {number - 1} are needed"
        )
    return Planes(number, cfg.INPUT.HIGHEST, shown)


def _refuse(
    file_name: str,
    header: Header,
    labelled: tuple[int, int] | None,
    sizes: Sequence[Size],
) -> None:
    for kind, problem in problems(header, labelled, sizes):
        if KINDS[kind].level == ERROR:
            raise UserError(f"the image {file_name} {problem}")


@contextmanager
def blame_unreadable(file_name: str) -> Iterator[None]:
    """Turn errors but UserErrors into an OSError naming the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many types if a file is damaged
        raise OSError(f"cannot read the image {file_name}: {error}") from error


@contextmanager
def blame_file(file_name: str) -> Iterator[None]:
    """Name the image in errors of its mapping: in messages of UserErrors and OSErrors, the only
    part that users see, else in a note."""
    try:
        yield
    except Exception as error:
        if file_name in str(error):
            raise
        for kind in (UserError, OSError):
            if isinstance(error, kind):
                raise kind(f"the image {file_name} cannot be mapped: {error}") from error
        error.add_note(f"in mapping {file_name}")
        raise


def find_missing(files: Iterable[str]) -> Iterator[str]:
    """Yield the files that do not exist. Each folder is listed once, each scheme of addresses tried
    once."""
    can_open: dict[str, bool] = {}
    listed: dict[str, set[str]] = {}
    for file in files:  # a million within a second
        if "://" in file and (scheme := ADDRESS.match(file)):
            if scheme[0] not in can_open:
                can_open[scheme[0]] = _can_open(file)
            if not can_open[scheme[0]]:
                yield file
            continue
        folder, _, name = file.rpartition("/")
        if folder not in listed:
            listed[folder] = _files_in(folder)
        # File systems may ignore case, and one path has several spellings.
        if name not in listed[folder] and not os.path.isfile(file):
            yield file


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {x.name for x in entries if x.is_file()}
    except OSError:
        return set()


def _can_open(address: str) -> bool:
    """Return whether a handler opens an address, not the PathManager as a local file."""
    register_handler(address)
    try:
        return PathManager.isfile(address)
    except NotImplementedError:  # the handler of https has no isfile
        return True
    except Exception as error:  # handlers raise errors of many types
        raise UserError(f"the image {address} cannot be opened: {error}") from error


# ------------------------------------------------------------------------------------------------
# Addresses
# ------------------------------------------------------------------------------------------------


class _FsspecHandler(PathHandler):
    """File system of fsspec for addresses with a prefix such as ``s3://``."""

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


def register_handler(address: str) -> None:
    """Open addresses like this with fsspec, unless Detectron2's PathManager has a handler."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme in fsspec.available_protocols():
        _register_prefix(f"{scheme}://")


@cache
def _register_prefix(prefix: str) -> None:
    with suppress(KeyError):  # another handler is registered
        PathManager.register_handler(_FsspecHandler(prefix), allow_override=False)
