"""Images with any number of planes, of 8 or 16 bits: INPUT.FORMAT "planes"."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

FORMAT = "planes"
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of its files
# EXIF's orientations: (turns by 90 degrees, counter-clockwise, after mirroring left and right).
TURNS = {
    **{2: (0, True), 3: (2, False), 4: (2, True)},
    **{5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)},
}
# Names of a TIFF's axes that separate planes.
AXES = {*"SCQI"}


@dataclass(frozen=True)
class Planes:
    """How the planes of image files become pixels.

    Args:
        number: of planes.
        highest: the value in files that becomes 255.
        shown: the planes that pictures show as red, green and blue.
    """

    number: int
    highest: float
    shown: Sequence[int]

    @staticmethod
    def read(content: bytes) -> np.ndarray:
        """Return the planes of an image file, turned by its EXIF orientation, for :meth:`scale`.

        Raises:
            ValueError: the end of a sentence that names the file.
            ImportError: if a TIFF needs tifffile.
        """
        decode = _decode_tiff if content[:4] in TIFF else _decode
        try:
            return _turned(*decode(content))
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:  # decoders raise errors of many types for damaged files
            raise ValueError(f"it is damaged: {error}") from error

    def check(self, planes: np.ndarray) -> None:
        """Check planes for :meth:`scale`.

        Raises:
            ValueError: the end of a sentence that names the image.
        """
        if planes.dtype.kind not in "uif" or planes.ndim not in (2, 3) or not planes.size:
            raise ValueError(f"it has shape {planes.shape} and dtype {planes.dtype}")
        number = 1 if planes.ndim == 2 else planes.shape[2]
        if number != self.number:
            raise ValueError(f"it has {number} planes, but MODEL.PIXEL_MEAN is of {self.number}")
        if planes.dtype == np.uint8:
            if self.highest == 255:
                return
            raise ValueError(f"it has 8 bits, but INPUT.HIGHEST is {self.highest:g}")
        if not planes.max() <= self.highest:  # NaN included
            raise ValueError(
                f"it has the value {planes.max()}, above INPUT.HIGHEST {self.highest:g}"
            )
        if planes.min() == -np.inf:
            raise ValueError("it has the value -inf")

    def scale(self, planes: np.ndarray) -> np.ndarray:
        """Return (H, W, number) pixels: uint8 as they are if ``highest`` is 255, else float32 with
        ``highest`` at 255.

        Args:
            planes: (H, W, number), or (H, W) for one plane, of integers or floats.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(planes)
        return self._scaled(planes.reshape(*planes.shape[:2], -1))

    def picture(self, planes: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 BGR of planes that :meth:`check` accepts."""
        shown = planes.reshape(*planes.shape[:2], -1)[:, :, self.shown[::-1]]
        return np.ascontiguousarray(self._scaled(shown).clip(0, 255).astype(np.uint8))

    def _scaled(self, planes: np.ndarray) -> np.ndarray:
        if planes.dtype == np.uint8:
            return np.ascontiguousarray(planes)
        pixels = planes.astype(np.float32)
        pixels *= np.float32(255 / self.highest)  # in place: images may be large
        return pixels


def as_planes(image: Any) -> np.ndarray:
    """Return the planes of a Pillow image, turned by its EXIF orientation, or of an array."""
    if not isinstance(image, Image.Image):
        return np.asarray(image)
    image.load()  # which turns a TIFF and removes its orientation
    return _turned(_of_pillow(image), image.getexif().get(ORIENTATION, 1))


def _turned(planes: np.ndarray, orientation: int) -> np.ndarray:
    turns, mirrored = TURNS.get(orientation, (0, False))
    return np.rot90(planes[:, ::-1] if mirrored else planes, turns)


def _of_pillow(image: Image.Image) -> np.ndarray:
    plain = {"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode)
    return np.asarray(image.convert(plain) if plain else image)


def resize_planes(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, C) uint8 or float32 by Pillow, which equals its resizing of RGB images."""
    resized = (
        Image.fromarray(np.ascontiguousarray(plane)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        for plane in pixels.transpose(2, 0, 1)
    )
    return np.stack([np.asarray(plane) for plane in resized], axis=2)


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    """Return all planes as stored, (H, W) or (H, W, C), red before blue, and EXIF's orientation."""
    with Image.open(BytesIO(content)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        if image.format != "PNG" or content[24] < 16:  # bits in its header
            return _of_pillow(image), orientation
    import cv2  # Pillow drops eight of sixteen bits

    planes = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if planes is None:
        raise ValueError("it is a damaged PNG")
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(planes.shape[2] if planes.ndim > 2 else 1)
    return planes if order is None else planes[:, :, order], orientation


def _decode_tiff(content: bytes) -> tuple[np.ndarray, int]:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("a TIFF needs tifffile: pip install tifffile") from error
    with tifffile.TiffFile(BytesIO(content)) as file:
        series: Any = file.series[0]
        planes, axes = series.asarray(), series.axes
        tag = file.pages.first.tags.get(ORIENTATION)
        count = len(file.series)
    other = [axis for axis in axes if axis not in "YX"]
    if count > 1 or len(other) > 1 or not AXES.issuperset(other):
        raise ValueError(f"it is a TIFF with {count} images of axes {axes}, not one of planes")
    return np.moveaxis(
        planes, axes.index(other[0]), 2
    ) if other else planes, tag.value if tag else 1
