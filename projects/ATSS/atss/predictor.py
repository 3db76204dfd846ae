"""A trained detector from its config and weights: images in, NumPy out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from PIL import Image

from .checkpoints import SafeCheckpointer
from .config import (
    class_ids,
    class_names,
    for_inference,
    load_config,
    merge_options,
    use_available_device,
)
from .config.checks import lookup
from .data.mapper import single
from .structures import Predictions


class Detections(NamedTuple):
    """What was found on one image, best first.

    Attributes:
        boxes: (M, 4) float32 (x1, y1, x2, y2) in pixels of the image.
        scores: (M,) float32.
        classes: (M,) int64, positions in ``Predictor.names``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def above(self, threshold: float) -> "Detections":
        """Those whose score is at least so much."""
        return Detections(*(x[self.scores >= threshold] for x in self))


class Predictor:
    """Detects on images of any sizes, several at a time.

    Args:
        config: a file, such as the config.yaml that a training leaves, a name of the model zoo, or
            a config.
        weights: a checkpoint, such as model_final.pth. Nothing in it is executed.
        opts: KEY VALUE pairs over the config.

    Attributes:
        names: of the classes; empty where neither config nor data tell.
        ids: of the classes in the data that they were learnt from; empty where they are not known.
        size: (shorter side, longest side) to which images are resized.

    Raises:
        ValueError: naming the file or the key, where config or weights cannot be used.
    """

    def __init__(self, config: str | Path | CfgNode, weights: str | Path, opts: Sequence[Any] = ()):
        cfg = config.clone() if isinstance(config, CfgNode) else load_config(config)
        cfg.defrost()
        merge_options(cfg, opts)
        use_available_device(cfg)
        lookup(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
        self.names = class_names(cfg)
        cfg.MODEL.WEIGHTS = str(weights)  # so that a backbone's own are not looked for
        if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
            cfg = for_inference(cfg)
        self.model = build_model(cfg).eval()
        SafeCheckpointer(self.model, class_names=self.names, whole=True).load(str(weights))
        self.ids = class_ids(cfg)
        self.size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self.resize = T.ResizeShortestEdge([self.size[0]] * 2, self.size[1])
        self.input_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """
        Args:
            images: (H, W, 3) uint8, BGR as OpenCV reads them.
        """
        found = [x["instances"].to("cpu") for x in self.model(self._inputs(images))]
        return [
            Detections(x.pred_boxes.tensor.numpy(), x.scores.numpy(), x.pred_classes.numpy())
            for x in found
        ]

    def at_anchors(self, images: Sequence[np.ndarray]) -> Predictions:
        """What the model says at every anchor, for rules to look at; on the CPU.

        Args:
            images: as above; resized, they share a canvas.
        """
        output, boxes = self.model.predict(self._inputs(images))
        return Predictions(output.map(torch.Tensor.cpu), boxes.cpu())

    def _inputs(self, images: Sequence[np.ndarray]) -> list[dict]:
        inputs = []
        for image in images:
            height, width = image.shape[:2]
            as_pillow = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
            image = convert_PIL_to_numpy(as_pillow, self.input_format)
            image = self.resize.get_transform(image).apply_image(image)
            tensor = single(torch.as_tensor(image.transpose(2, 0, 1).copy()))
            inputs.append({"image": tensor, "height": height, "width": width})
        return inputs
