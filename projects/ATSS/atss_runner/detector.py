"""Detection with an exported file, without torch: NumPy, Pillow and onnxruntime.

from atss_runner import load
detector = load("model.onnx")
boxes, scores, classes = detector("photo.jpg")
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .images import HIGH_DEPTH, resized, too_thin
from .media import FileError
from .postprocess import SUPPRESSIONS, detect

SCHEMA = 1
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


class Detector:
    """An exported detector.

    Args:
        path: an ONNX file of `tools/export.py`.
        threads: that the engine uses; 0: as many as there are cores.

    Attributes:
        names: of the classes.
        ids: of the classes in the training data; empty if unknown.
        size: (shorter side, longest side) to which images are resized.
        settings: the metadata of the file.

    Raises:
        FileError: if the file was not written by the exporter, or by a newer one.
    """

    def __init__(self, path: str | Path, threads: int = 0):
        self._run, properties = _open(str(path), threads)
        if "atss" not in properties:
            raise FileError(f"{path} is no exported detector: it has no metadata 'atss'")
        self.settings: dict[str, Any] = json.loads(properties["atss"])
        if self.settings["schema"] > SCHEMA:
            raise FileError(
                f"{path} has metadata of schema {self.settings['schema']}, this runner reads up to "
                f"{SCHEMA}: install a newer atss_runner"
            )
        if (name := self.settings["suppression"]["name"]) not in SUPPRESSIONS:
            raise FileError(f"{path} needs the suppression {name!r}, which this runner has not")
        self.names: list[str] = self.settings["classes"]
        self.ids: list[int] = self.settings["ids"]
        self.size: tuple[int, int] = (self.settings["min_size"], self.settings["max_size"])

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Detect on one image or several.

        Args:
            images: a path, a PIL image, or a uint8 array as of OpenCV, (H, W, 3) BGR, (H, W, 4)
                BGRA or (H, W) grey; or a list of these.

        Returns:
            :class:`Detections`; of a list a list.

        Raises:
            FileError: for an image that cannot be read or used.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        listed: Sequence[Any] = images if several else [images]  # type: ignore[assignment]
        # Images of one canvas run together; a larger canvas would change their borders.
        arrays = [read_rgb(x) for x in listed]
        groups = defaultdict(list)
        for i, array in enumerate(arrays):
            height, width = self.resized(*array.shape[:2])
            groups[self.canvas(height, width)].append((i, height, width))
        results: list[Any] = [None] * len(arrays)
        for canvas, members in groups.items():
            pixels = self._pixels([(arrays[i], h, w) for i, h, w in members], canvas)
            boxes, probabilities, quality = self.run(pixels)
            for row, (i, height, width) in enumerate(members):
                results[i] = detect(
                    boxes[row],
                    probabilities[row],
                    None if quality is None else quality[row],
                    self.per_level(canvas),
                    (height, width),
                    arrays[i].shape[:2],
                    self.settings,
                )
        return results if several else results[0]

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Run the network.

        Args:
            pixels: (N, 3, H, W) float32, 0 to 255, in the channel order of the metadata.

        Returns:
            boxes (N, R, 4), probabilities (N, R, K), and quality (N, R) or None.

        Raises:
            FileError: if a side is no multiple of the divisor.
        """
        divisor = self.settings["divisor"]
        if any(side % divisor or not side for side in pixels.shape[2:]):
            height, width = pixels.shape[2:]
            raise FileError(f"sides must be multiples of {divisor}, got {height} x {width}")
        outputs = dict(zip(self.settings["outputs"], self._run(pixels), strict=True))
        return outputs["boxes"], outputs["probabilities"], outputs.get("quality")

    def pixels(self, image: ImageLike) -> np.ndarray:
        """Return the input of the network for one image, (1, 3, H, W)."""
        array = read_rgb(image)
        height, width = self.resized(*array.shape[:2])
        return self._pixels([(array, height, width)], self.canvas(height, width))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image is resized, as Detectron2's ResizeShortestEdge."""
        if thin := too_thin(height, width, *self.size):
            raise FileError(f"the image {thin}")
        return resized(height, width, *self.size)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return the padded size."""
        divisor = self.settings["divisor"]
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor

    def per_level(self, canvas: tuple[int, int]) -> list[int]:
        """Return the number of anchors of each level."""
        each = self.settings["anchors_per_location"]
        return [-(-canvas[0] // s) * -(-canvas[1] // s) * each for s in self.settings["strides"]]

    def _pixels(
        self, members: list[tuple[np.ndarray, int, int]], canvas: tuple[int, int]
    ) -> np.ndarray:
        """Resized images on a canvas of the mean colour, which is 0 once normalised."""
        mean = np.array(self.settings["pixel_mean"], dtype=np.float32)
        pixels = np.empty((len(members), len(mean), *canvas), dtype=np.float32)
        pixels[:] = mean[:, None, None]
        for place, (image, height, width) in zip(pixels, members, strict=True):
            # By Pillow, as in training: another filter would change the input of the network.
            smaller = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(smaller)
            if self.settings["input_format"] == "BGR":
                array = array[:, :, ::-1]
            place[:, :height, :width] = array.transpose(2, 0, 1)
        return pixels


def load(path: str | Path, threads: int = 0) -> Detector:
    """Load an exported detector; see :class:`Detector`."""
    return Detector(path, threads)


def _open(path: str, threads: int) -> tuple[Any, dict[str, str]]:
    """Return a function (pixels) -> outputs, and the metadata of the file."""
    if not os.path.isfile(path):
        raise FileError(f"{path} does not exist")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise FileError(f"{path} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # onnxruntime's own types
        raise FileError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
    name = session.get_inputs()[0].name
    return (
        lambda pixels: session.run(None, {name: pixels}),
        session.get_modelmeta().custom_metadata_map,
    )


def read_rgb(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a path, a PIL image, or an array as of OpenCV."""
    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                return _of_pillow(opened, os.fspath(image))
        except FileError:
            raise
        except Exception as error:  # Pillow raises errors of many types for damaged files
            reason = getattr(error, "strerror", None) or error
            raise FileError(f"cannot read the image {os.fspath(image)}: {reason}") from error
    if isinstance(image, Image.Image):
        return _of_pillow(image, "the image")
    is_uint8 = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not (is_uint8 and image.ndim in (2, 3) and image.shape[2:] in ((), (1,), (3,), (4,))):
        kind = f"{type(image).__name__} {getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}"
        raise FileError(
            f"expected a path, a PIL image or a uint8 array (H, W, 3), got {kind.strip()}"
        )
    if not image.size:
        raise FileError(f"the image is empty: {image.shape}")
    image = image.reshape(*image.shape[:2], -1)
    bgr = image[:, :, :3] if image.shape[2] > 1 else image.repeat(3, axis=2)
    return np.ascontiguousarray(bgr[:, :, ::-1])


def _of_pillow(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in HIGH_DEPTH:
        raise FileError(
            f"{name} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits"
        )
    image.load()
    with suppress(Exception):  # a broken EXIF counts as none, as in training
        image = ImageOps.exif_transpose(image)
    return np.asarray(image.convert("RGB"))
