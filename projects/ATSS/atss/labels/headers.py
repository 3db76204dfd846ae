"""Headers of image files, read without decoding pixels."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import IO

import fsspec
import numpy as np
from PIL import Image

from atss_runner.images import HIGH_DEPTH, Size, too_thin
from atss_runner.planes import ORIENTATION

# EXIF's orientations that swap width and height.
TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class Header:
    """Header of an image file.

    Attributes:
        format: Pillow's name, such as "JPEG".
        size: (width, height) after the orientation, as in training.
        mode: Pillow's.
        orientation: EXIF's, 1 by default.
        transparent: whether it has an alpha channel or a transparent colour.
        complete: whether the file ends with its format's end marker; False if unknown.
    """

    format: str | None
    size: tuple[int, int]
    mode: str
    orientation: int
    transparent: bool
    animated: bool
    complete: bool


def read_header(source: str | BytesIO, decode: bool = False) -> Header:
    """Read the header of a file or its content; with ``decode`` also the pixels.

    Raises:
        OSError: the end of a sentence that names the file.
    """
    with _opened(source) as (file, image):
        if decode:
            image.load()
        orientation = _orientation(image, decode)
        return Header(
            format=image.format,
            size=image.size[::-1] if orientation in TURNED else image.size,
            mode=image.mode,
            orientation=orientation,
            transparent=image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
            animated=getattr(image, "is_animated", False),
            complete=_complete(file, image.format),
        )


def verify(source: str | BytesIO) -> None:
    """Compare the checksums in a file, such as a PNG's, without decoding.

    Raises:
        OSError: as :func:`read_header`.
    """
    with _opened(source) as (_, image):
        image.verify()


def header_of(pixels: np.ndarray) -> Header:
    """Return the header of an image that was decoded and turned, (H, W, C)."""
    return Header(None, pixels.shape[1::-1], "", 1, False, False, True)


@contextmanager
def _opened(source: str | BytesIO) -> Iterator[tuple[IO, Image.Image]]:
    try:
        opened = open_file(source) if isinstance(source, str) else nullcontext(source)
        with opened as file, Image.open(file) as image:
            yield file, image
    except Image.UnidentifiedImageError as error:
        if isinstance(source, str):
            empty = os.path.isfile(source) and not os.path.getsize(source)
        else:
            empty = not source.getbuffer().nbytes
        problem = "it is empty" if empty else "it is not an image, or of an unknown format"
        raise OSError(problem) from error
    except Exception as error:  # damaged files make Pillow raise many types
        raise OSError(getattr(error, "strerror", None) or str(error)) from error


def problems(
    header: Header, labelled: tuple[int, int] | None, sizes: Sequence[Size] = ()
) -> Iterator[tuple[str, str]]:
    """Find the problems of a readable image.

    Args:
        labelled: (width, height) in the annotations, if any.
        sizes: (shorter side, longest side) to which training resizes; a shorter side of 0: not
            resized.

    Yields:
        a key of KINDS, and the end of a sentence that begins with the file's name.
    """
    width, height = header.size
    if labelled and header.size != labelled:
        turned = header.orientation in TURNED
        turn = f" after its EXIF orientation {header.orientation}" if turned else ""
        yield (
            "image_size_wrong",
            f"is {width} x {height} pixels{turn}, but {labelled[0]:g} x {labelled[1]:g} according "
            "to the annotations",
        )
    if header.mode in HIGH_DEPTH:
        yield (
            "image_high_depth",
            f"has more than 8 bits per channel (mode {header.mode}), which would be clipped at "
            "255: convert it to 8 bits",
        )
    if thin := next(filter(None, (too_thin(height, width, *size) for size in sizes)), ""):
        yield "image_thin", thin
    if header.orientation != 1 and header.format == "TIFF":
        # Pillow turns a TIFF while it decodes it.
        yield (
            "image_turned_twice",
            f"is a TIFF with EXIF orientation {header.orientation}, which Detectron2 applies "
            "twice: save it upright, without an orientation",
        )
    elif header.orientation != 1:
        yield "image_rotated", f"has EXIF orientation {header.orientation}"
    if header.transparent:
        yield "image_alpha", f"is transparent (mode {header.mode})"
    if header.animated:
        yield "image_animated", "is animated"
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):  # None: no limit
        yield "image_huge", f"is {width} x {height} pixels"
    for kind, modes in (
        ("image_grey", ("1", "L", "LA")),
        ("image_palette", ("P", "PA")),
        ("image_cmyk", ("CMYK",)),
    ):
        if header.mode in modes:
            yield kind, f"has mode {header.mode}"


def _orientation(image: Image.Image, decoded: bool) -> int:
    # Pillow decodes a PNG to look for an EXIF behind the pixels, which is rare.
    if image.format == "PNG" and not decoded and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Detectron2 ignores a broken EXIF too
        return 1
    return orientation if orientation in range(1, 9) else 1


def _complete(file: IO, image_format: str | None) -> bool:
    """Return whether the format's end marker ends the file."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 12))
    tail = file.read()
    if image_format == "JPEG":
        return tail.endswith(b"\xff\xd9")
    if image_format == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    if image_format == "GIF":
        return tail.endswith(b";")
    if image_format in ("WEBP", "BMP"):
        file.seek(0)
        start = file.read(8)
        if image_format == "BMP":
            return int.from_bytes(start[2:6], "little") == length
        return int.from_bytes(start[4:8], "little") + 8 == length
    return False


def open_file(file_name: str) -> IO:
    """Open a file or an address of fsspec."""
    return fsspec.open(file_name, "rb").open() if "://" in file_name else open(file_name, "rb")
