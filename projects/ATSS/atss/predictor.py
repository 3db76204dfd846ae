"""Detection with a trained model: images in, NumPy arrays out."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from PIL import Image

from atss_runner.detections import Detections, draw_detections, explain_none
from atss_runner.images import HIGH_DEPTH, Size, too_thin
from atss_runner.planes import Planes, as_planes
from atss_runner.thresholds import DEFAULT, class_thresholds, per_class

from .checkpoints import SafeCheckpointer
from .config import (
    build_tiles,
    class_ids,
    class_names,
    for_inference,
    input_size,
    load_config,
    merge_options,
    use_available_device,
    uses_atss,
)
from .config.checks import lookup
from .config.inputs import values_in
from .data.images import pixel_format, read_image, read_planes
from .data.mapper import build_test_resize, single
from .errors import UserError
from .structures import Predictions

# Files of a training, best first.
WEIGHTS = ("model_best.pth", "model_final.pth")
# Longer side of a picture with detections, in pixels, at least.
LEAST_SIDE = 640
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray


def find_run(run: str | Path, weights: str | Path | None) -> tuple[str, str]:
    """Return the config and the weights of a training's folder, or of a config with weights.

    Raises:
        UserError: if there are no weights.
    """
    folder = Path(run).expanduser()
    if folder.is_dir():
        return str(folder / "config.yaml"), str(weights or find_weights(folder))
    if weights is None:
        raise UserError(f"{run} is not the folder of a training: pass its folder, or the weights")
    return str(run), str(weights)


def find_weights(run: str | Path) -> Path:
    """Return the best weights in the folder of a training.

    Raises:
        UserError: if it has none.
    """
    for name in WEIGHTS:
        if Path(run, name).is_file():
            return Path(run, name)
    hint = ""
    if checkpoints := sorted(Path(run).glob("model_[0-9]*.pth")):
        hint = (
            ": the training was interrupted: continue it by --resume, or pass --weights "
            f"{checkpoints[-1]}"
        )
    raise UserError(f"{run} contains neither {' nor '.join(WEIGHTS)}{hint}")


class Predictor:
    """A detector for images of any size, several at a time.

    Args:
        config: the folder of a training, a config file, a name of the model zoo, or a config.
        weights: a checkpoint; None for the best of the folder. Nothing in it is executed.
        opts: KEY VALUE pairs over the config.
        thresholds: least score of each class: a json of `tools/report.py`, or {class name: score}.
            Classes without one keep all detections.

    Attributes:
        names: of the classes; may be empty.
        ids: of the classes in the training data; may be empty.
        size: (shorter side, longest side) of resized images; (height, width, True) if they are
            stretched to it.
        thresholds: of the classes, with None for a class without one; None without thresholds.
        max_detections: TEST.DETECTIONS_PER_IMAGE, the most that an image has.
        tiles: layout of tiles of large images (TEST.TILES); None if it is off.
        planes: of images with INPUT.FORMAT planes, or None.

    Raises:
        UserError, OSError: naming the file or the key.
    """

    def __init__(
        self,
        config: str | Path | CfgNode,
        weights: str | Path | None = None,
        opts: Sequence[Any] = (),
        thresholds: str | os.PathLike[str] | Mapping[str, float | None] | None = None,
    ):
        if isinstance(config, CfgNode):
            if weights is None:
                raise UserError("weights are missing: a CfgNode needs them")
            cfg = config.clone()
        else:
            config, weights = find_run(config, weights)
            cfg = load_config(config)
        cfg.defrost()
        merge_options(cfg, opts)
        use_available_device(cfg)
        lookup(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
        self.names = class_names(cfg)
        self.thresholds: list[float | None] | None = None
        if thresholds is not None:
            self.thresholds = class_thresholds(thresholds, self.names)
        cfg.MODEL.WEIGHTS = str(weights)  # without it a timm backbone loads its own
        if uses_atss(cfg):
            cfg = for_inference(cfg)
        self.model = build_model(cfg).eval()
        SafeCheckpointer(
            self.model, class_names=self.names, trained_with=values_in(cfg), whole=True
        ).load(str(weights))
        self.ids = class_ids(cfg)
        self.size = input_size(cfg)
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
        self.resize = build_test_resize(cfg)
        self.tiles = build_tiles(cfg) if cfg.TEST.TILES.ENABLED else None
        self._tile_batch = cfg.TEST.TILES.BATCH
        self.input_format = pixel_format(cfg)
        self.planes = self.input_format if isinstance(self.input_format, Planes) else None

    @overload  # a path is also a sequence of texts
    def __call__(self, images: ImageLike) -> Detections: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Sequence[ImageLike] | Iterator[ImageLike]) -> list[Detections]: ...

    def __call__(self, images):
        """Detect on one image (one result) or several (a list).

        Args:
            images: an image, or a sequence or an iterator of images. An image is a path, read as in
                training; a PIL image, turned by its EXIF orientation; or a uint8 array as in
                OpenCV: (H, W, 3) BGR, (H, W, 4) BGRA (alpha is ignored), (H, W) or (H, W, 1) grey.
                With INPUT.FORMAT planes, arrays are (H, W, planes) of integers or floats as in
                files, red before blue.

        Raises:
            TypeError, ValueError: naming type, shape and dtype of other objects.
            UserError: if an image is too thin to be resized, or a PIL image is damaged.
            OSError: naming a file that cannot be read.
        """
        detections = self._detect(self._arrays(images))
        return detections if _are_several(images) else detections[0]

    def _detect(self, arrays: Sequence[np.ndarray]) -> list[Detections]:
        if self.tiles is None:
            detections = self._detect_whole(arrays)
        else:
            rules = self._detect_whole, self.max_detections, self._tile_batch
            detections = [self.tiles.detect(x, *rules) for x in arrays]
        if self.thresholds is not None:
            detections = [x.above(self._least_scores(0.0)) for x in detections]
        return detections

    @torch.no_grad()
    def _detect_whole(self, arrays: Sequence[np.ndarray]) -> list[Detections]:
        inputs = self._inputs(arrays)
        outputs = [x["instances"].to("cpu") for x in self.model(inputs)] if inputs else []
        return [
            Detections(x.pred_boxes.tensor.numpy(), x.scores.numpy(), x.pred_classes.numpy())
            for x in outputs
        ]

    def show(self, image: ImageLike, threshold: float = DEFAULT) -> Image.Image:
        """Return a picture of an image and its detections, which notebooks display. It has 640
        pixels or more, so that labels can be read.

        Args:
            threshold: smallest score that is drawn, of classes without one of their own. Detections
                have no score below MODEL.ATSS.SCORE_THRESH_TEST.
        """
        pixels = self.read(image)
        detections = self._detect([pixels])[0]
        found = detections.above(self._least_scores(threshold))
        if not len(found.boxes):
            highest = float(detections.scores.max(initial=0))
            logging.getLogger(__name__).warning(explain_none(highest, threshold, "threshold"))
        drawn = draw_detections(self.picture(pixels), found, self.names, LEAST_SIDE)
        return Image.fromarray(np.ascontiguousarray(drawn[:, :, ::-1]))

    def read(self, image: ImageLike) -> np.ndarray:
        """Return an image as an array: (H, W, 3) uint8 BGR, or its planes as in files."""
        return self._read(image, "the image")

    def picture(self, array: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 BGR of an array of :meth:`read`."""
        return array if self.planes is None else self.planes.picture(array)

    def _least_scores(self, default: float) -> float | np.ndarray:
        return default if self.thresholds is None else per_class(self.thresholds, default)

    def at_anchors(
        self, images: ImageLike | Sequence[ImageLike] | Iterator[ImageLike]
    ) -> Predictions:
        """Return the predictions at every anchor, for assigners, on the CPU. Resized images share a
        canvas. Tiles are not used.

        Raises:
            TypeError, ValueError, OSError: as above, and if there is no image.
        """
        inputs = self._inputs(self._arrays(images))
        if not inputs:
            raise ValueError("at_anchors needs an image, got none")
        output, boxes = self.model.predict(inputs)
        return Predictions(output.map(torch.Tensor.cpu), boxes.cpu())

    def _arrays(self, images: Any) -> list[np.ndarray]:
        if _are_several(images):
            return [self._read(image, f"image {i}") for i, image in enumerate(images)]
        return [self._read(images, "the image")]

    def _read(self, image: Any, name: str) -> np.ndarray:
        """Return (H, W, 3) uint8 BGR, or planes as in files. Messages begin with ``name``."""
        if self.planes is not None:
            return _as_planes(image, name, self.size, self.planes)
        return _as_bgr(image, name, self.size)

    def _inputs(self, arrays: Sequence[np.ndarray]) -> list[dict]:
        inputs = []
        for array in arrays:
            image = _in_format(array, self.input_format)
            height, width = image.shape[:2]
            image = self.resize.get_transform(image).apply_image(image)
            tensor = torch.as_tensor(image.transpose(2, 0, 1).copy())
            inputs.append({"image": single(tensor), "height": height, "width": width})
        return inputs


def _are_several(images: Any) -> bool:
    return isinstance(images, Sequence | Iterator) and not isinstance(images, str | bytes)


def _as_bgr(image: Any, name: str, size: Size) -> np.ndarray:
    """Return (H, W, 3) uint8 BGR. Messages begin with ``name``."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), [size])
    if isinstance(image, Image.Image):
        image = _pil_to_bgr(image, name)
    is_uint8 = isinstance(image, np.ndarray) and image.dtype == np.uint8
    channels = ((), (1,), (3,), (4,))
    if not (is_uint8 and image.ndim > 1 and image.shape[2:] in channels and image.size):
        details = [f", {x} {getattr(image, x)}" for x in ("shape", "dtype") if hasattr(image, x)]
        raise (ValueError if is_uint8 else TypeError)(
            f"{name} has type {type(image).__name__}{''.join(details)}: expected a path, a PIL "
            "image, a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a list of these"
        )
    if thin := too_thin(image.shape[0], image.shape[1], *size):
        raise UserError(f"{name} {thin}")
    image = image.reshape(*image.shape[:2], -1)
    return image[:, :, :3] if image.shape[2] > 1 else image.repeat(3, axis=2)


def _in_format(array: np.ndarray, input_format: str | Planes) -> np.ndarray:
    """Return BGR pixels in the format of INPUT.FORMAT, without a copy of BGR and RGB."""
    if isinstance(input_format, Planes):
        return input_format.scale(array)
    if input_format in ("BGR", "RGB"):
        return array if input_format == "BGR" else array[:, :, ::-1]
    as_pillow = Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))
    return convert_PIL_to_numpy(as_pillow, input_format)


def _as_planes(image: Any, name: str, size: Size, planes: Planes) -> np.ndarray:
    """Return planes as in files, checked. Messages begin with ``name``."""
    if isinstance(image, str | os.PathLike):
        name = f"the image {os.fspath(image)}"
        image = read_planes(os.fspath(image))
    try:
        array = as_planes(image)
        planes.check(array)
    except (ValueError, OSError) as error:
        raise UserError(f"{name} cannot be used: {error}") from error
    if thin := too_thin(array.shape[0], array.shape[1], *size):
        raise UserError(f"{name} {thin}")
    return array


def _pil_to_bgr(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in HIGH_DEPTH:
        raise TypeError(
            f"{name} has more than 8 bits per channel (PIL mode {image.mode}): convert it to 8 bits"
        )
    try:
        image.load()  # raises an error on damage, which the search for an EXIF ignores
        return convert_PIL_to_numpy(_apply_exif_orientation(image), "BGR")
    except Exception as error:  # Pillow raises errors of many types
        raise UserError(f"cannot read {name}, a PIL image of mode {image.mode}: {error}") from error
