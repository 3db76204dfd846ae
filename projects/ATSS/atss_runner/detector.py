"""Detection with an exported file, without torch: NumPy, Pillow and onnxruntime (or openvino).

from atss_runner import load
detector = load("model.onnx")
boxes, scores, classes = detector("photo.jpg")
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .detections import Detections
from .images import HIGH_DEPTH, Size, resized, too_thin
from .media import FileError, batches
from .planes import FORMAT, ORIENTATION, Planes, as_planes, resize_planes
from .postprocess import anchors_per_level, in_original, select
from .settings import read_settings
from .tiles import choose_tiles

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


class Detector:
    """An exported detector, for several threads at once, too.

    Args:
        path: an ONNX file of `tools/export.py`, or an OpenVINO .xml of it.
        threads: that the engine uses; 0: as many as there are cores.
        batch: images of a list that are in memory and in the network at a time, or tiles.
        tiles: side of the tiles of large images, in pixels; 0: that for the training data; None: no
            tiles.

    Attributes:
        names: of the classes.
        ids: of the classes in the training data; empty if unknown.
        size: (shorter side, longest side) to which images are resized; (height, width, True) if
            they are stretched to it.
        max_detections: the most that an image has.
        thresholds: of the classes, if the file has them, with None for a class without one; the
            command applies them, calls return all detections.
        planes: of images with INPUT.FORMAT planes, or None.
        settings: the metadata of the file.

    Raises:
        FileError: if the file was not written by the exporter, or by a newer one, or has no size of
            tiles.
    """

    def __init__(
        self, path: str | Path, threads: int = 0, batch: int = 4, tiles: int | None = None
    ):
        self._run, properties = _open(str(path), threads)
        self.settings: dict[str, Any] = read_settings(str(path), properties)
        self.names: list[str] = self.settings["classes"]
        self.ids: list[int] = self.settings["ids"]
        self.max_detections: int = self.settings["max_detections"]
        size = (self.settings["min_size"], self.settings["max_size"])
        stretched = self.settings["resize"] == "stretch"
        self.size: Size = (*size, True) if stretched else size
        self.thresholds: list[float | None] | None = self.settings["thresholds"]
        self.batch = batch
        self.tiles = None if tiles is None else choose_tiles(self.settings["tiles"], tiles)
        self.planes: Planes | None = None
        if self.settings["input_format"] == FORMAT:
            number, shown = len(self.settings["pixel_mean"]), self.settings["shown_planes"]
            self.planes = Planes(number, self.settings["highest"], shown)

    def __call__(self, images: ImageLike | Sequence[ImageLike] | Iterator[ImageLike]) -> Any:
        """Detect on one image or several.

        Args:
            images: a path, a PIL image, or a uint8 array as of OpenCV, (H, W, 3) BGR, (H, W, 4)
                BGRA or (H, W) grey; or a list or an iterator of these. With INPUT.FORMAT planes,
                arrays are (H, W, planes) as in files, red before blue.

        Returns:
            :class:`Detections`; of a list or an iterator a list.

        Raises:
            FileError: for an image that cannot be read or used.
        """
        if isinstance(images, str | bytes) or not isinstance(images, Sequence | Iterator):
            return self._detect([images])[0]
        return [found for part in batches(images, self.batch) for found in self._detect(part)]

    def _detect(self, images: Sequence[Any]) -> list[Detections]:
        arrays = [self.read(x) for x in images]
        if self.tiles is None:
            return self._detect_whole(arrays)
        detect = self.tiles.detect
        return [detect(x, self._detect_whole, self.max_detections, self.batch) for x in arrays]

    def _detect_whole(self, arrays: Sequence[np.ndarray]) -> list[Detections]:
        # Images of one canvas run together; a larger canvas would change their borders.
        sizes = [self.resized(x) for x in arrays]
        groups = defaultdict(list)
        for i, size in enumerate(sizes):
            groups[self.canvas(size)].append(i)
        results = {}
        for canvas, members in groups.items():
            pixels = np.concatenate([self._pixels(arrays[i]) for i in members])
            outputs = self.outputs(pixels, np.array([sizes[i] for i in members]))
            for row, i in enumerate(members):
                own = {name: values[row] for name, values in outputs.items()}
                results[i] = self.detections(own, canvas, sizes[i], arrays[i].shape[:2])
        return [results[i] for i in range(len(arrays))]

    def outputs(self, pixels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Run the network.

        Args:
            pixels: (N, C, H, W) float32, 0 to 255, in the channel order of the metadata.
            sizes: (N, 2) int64 height and width of the images on their canvas.

        Returns:
            boxes (N, R, 4), probabilities (N, R, K), and quality (N, R) if the head predicts it; of
            a file with NMS, boxes (N, M, 4), scores (N, M), classes (N, M) and count (N,).

        Raises:
            FileError: if a side is no multiple of the divisor.
        """
        divisor = self.settings["divisor"]
        if any(side % divisor or not side for side in pixels.shape[2:]):
            height, width = pixels.shape[2:]
            raise FileError(f"sides must be multiples of {divisor}, got {height} x {width}")
        inputs = (pixels, sizes)[: len(self.settings["inputs"])]
        return dict(zip(self.settings["outputs"], self._run(*inputs), strict=True))

    def detections(
        self,
        outputs: Mapping[str, np.ndarray],
        canvas: tuple[int, int],
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> Detections:
        """Return the detections of one image.

        Args:
            outputs: those of the network for the image.
            canvas, size, original: (height, width) of the input, of the resized image on it, and of
                the image.
        """
        if self.settings["nms_inside"]:
            count = int(outputs["count"])
            found = Detections(*(outputs[x][:count] for x in Detections._fields))
        else:
            found = select(outputs, self.per_level(canvas), size, self.settings)
        return in_original(found, size, original, self.settings)

    def pixels(self, image: ImageLike) -> np.ndarray:
        """Return the input of the network for one image, (1, C, H, W): resized, on a canvas of the
        mean colour, which is 0 once normalised."""
        return self._pixels(self.read(image))

    def _pixels(self, array: np.ndarray) -> np.ndarray:
        height, width = size = self.resized(array)
        mean = np.array(self.settings["pixel_mean"], dtype=np.float32)
        pixels = np.empty((1, len(mean), *self.canvas(size)), dtype=np.float32)
        pixels[:] = mean[:, None, None]
        scaled = array if self.planes is None else self.planes.scale(array)
        channels = resize_planes(scaled, height, width).transpose(2, 0, 1)
        is_rgb = self.settings["input_format"] == "RGB"
        pixels[0, :, :height, :width] = channels[::-1] if is_rgb else channels
        return pixels

    def read(self, image: ImageLike) -> np.ndarray:
        """Return an image as an array: (H, W, 3) uint8 BGR, or its planes as in files.

        Raises:
            FileError: if it cannot be read or used.
        """
        return read_bgr(image) if self.planes is None else read_planes(image, self.planes)

    def picture(self, array: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 BGR of an array of :meth:`read`."""
        return array if self.planes is None else self.planes.picture(array)

    def resized(self, image: np.ndarray) -> tuple[int, int]:
        """Return (height, width) to which an image is resized."""
        height, width = image.shape[:2]
        if thin := too_thin(height, width, *self.size):
            raise FileError(f"the image {thin}")
        return resized(height, width, *self.size)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the padded size."""
        divisor = self.settings["divisor"]
        return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor

    def per_level(self, canvas: tuple[int, int]) -> list[int]:
        """Return the number of anchors of each level."""
        rules = self.settings
        return anchors_per_level(canvas, rules["strides"], rules["anchors_per_location"])


def load(path: str | Path, threads: int = 0, batch: int = 4, tiles: int | None = None) -> Detector:
    """Load an exported detector; see :class:`Detector`."""
    return Detector(path, threads, batch, tiles)


def _open(path: str, threads: int) -> tuple[Any, dict[str, str]]:
    """Return a function (inputs) -> outputs, and the metadata of the file."""
    if not os.path.isfile(path):
        raise FileError(f"{path} {'is no file' if os.path.exists(path) else 'does not exist'}")
    try:
        if path.endswith(".xml"):
            return _open_openvino(path, threads)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise FileError(f"{path} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # the engines' own types
        raise FileError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
    names = [x.name for x in session.get_inputs()]
    return (
        lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True))),
        session.get_modelmeta().custom_metadata_map,
    )


def _open_openvino(path: str, threads: int) -> tuple[Any, dict[str, str]]:
    import openvino

    # Its default on many processors is bfloat16, which moves boxes by pixels.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    model = core.read_model(path)
    properties = {"atss": model.get_rt_info("atss").value} if model.has_rt_info("atss") else {}
    compiled = core.compile_model(model, "CPU", options)
    # A request of its own for each call: calls may come from several threads.
    return lambda *inputs: compiled.create_infer_request().infer(inputs).to_tuple(), properties


def read_bgr(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 BGR of a path, a PIL image, or an array as of OpenCV."""
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
    return np.ascontiguousarray(bgr)


def read_planes(image: Any, planes: Planes) -> np.ndarray:
    """Return the checked planes, as in files, of a path, a Pillow image or an array."""
    is_file = isinstance(image, str | os.PathLike)
    name = os.fspath(image) if is_file else "the image"
    try:
        array = planes.read(Path(image).read_bytes()) if is_file else as_planes(image)
        planes.check(array)
        return array
    except Exception as error:  # decoders raise errors of many types for damaged files
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot read {name}: {reason}") from error


def _of_pillow(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in HIGH_DEPTH:
        raise FileError(
            f"{name} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits"
        )
    image.load()
    with suppress(Exception):  # a broken EXIF counts as none, as in training
        if image.getexif().get(ORIENTATION, 1) != 1:  # otherwise it would only copy
            image = ImageOps.exif_transpose(image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.ascontiguousarray(np.asarray(rgb)[:, :, ::-1])
