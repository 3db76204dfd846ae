"""Multi-scale testing as published: 26 views of an image, filtered by size and merged by voting."""

import logging
from collections.abc import Callable, Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn

from atss_runner.images import too_thin

from ..errors import UserError
from ..geometry import area
from .suppression import ScoredBoxes


class ATSSWithTTA(nn.Module):
    """Test-time augmentation: merged detections of resized and mirrored views of each image, one
    view at a time, to limit memory. The log has its progress.

    Args:
        plain: (short side, longest side) of the view that contributes boxes of all sizes.
        sizes: (short side, longest side, low, high) of the other views, which contribute boxes with
            an area between low^2 and high^2, in pixels of the view.
        flip: whether each view is also mirrored.
        merge: a suppression of :mod:`.suppression`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plain: tuple[int, int],
        sizes: Sequence[tuple[int, int, float, float]],
        flip: bool,
        merge: Callable[[Tensor, Tensor, Tensor, int], ScoredBoxes],
        max_detections: int,
        input_format: str,
    ):
        super().__init__()
        self.model = model
        self.views = [(*plain, 0.0, float("inf")), *sizes]
        self.flips = (False, True) if flip else (False,)
        self.merge = merge
        self.max_detections = max_detections
        self.input_format = input_format

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Return detections in Detectron2's format.

        Args:
            batched_inputs: with "image" in the size of "height" and "width", else with "file_name",
                which is read, or with "image" alone.

        Raises:
            UserError: if an image is too thin for a view.
        """
        return [{"instances": self._merge_views(example)} for example in batched_inputs]

    def _merge_views(self, example: dict) -> Instances:
        given, size = example.get("image"), (example.get("height"), example.get("width"))
        if "file_name" in example and (given is None or given.shape[1:] != size):
            image = read_image(example["file_name"], self.input_format)
        else:
            image = example["image"].permute(1, 2, 0).cpu().numpy()
        height, width = image.shape[:2]
        name = example.get("file_name", "of the input")
        for short, longest, *_ in self.views:
            if thin := too_thin(height, width, short, longest):
                raise UserError(f"the image {name} {thin}")
        found = []
        views = [(*view, flip) for view in self.views for flip in self.flips]
        for number, view in enumerate(views, start=1):
            found.append(self._detect(image, *view))
            progress = f"View {number} of {len(views)} of the image {name}"
            log_every_n_seconds(logging.INFO, progress, n=5)
        boxes, scores, classes = (torch.cat(x) for x in zip(*found, strict=True))
        boxes, scores, classes = self.merge(boxes, scores, classes, self.max_detections)
        merged = Instances(
            (height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
        )
        return detector_postprocess(
            merged, example.get("height", height), example.get("width", width)
        )

    def _detect(
        self, image: np.ndarray, short: int, longest: int, low: float, high: float, flip: bool
    ) -> ScoredBoxes:
        resize = T.ResizeShortestEdge([short, short], longest).get_transform(image)
        view = resize.apply_image(image)
        if flip:
            view = view[:, ::-1]
        (height, width), (view_height, view_width) = image.shape[:2], view.shape[:2]
        tensor = torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1)))
        if tensor.dtype == torch.float64:  # as Detectron2 reads YUV
            tensor = tensor.float()
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        detections = output["instances"]
        boxes = detections.pred_boxes.tensor
        size = area(boxes) * (view_height / height) * (view_width / width)
        in_range = (size > low**2) & (size < high**2)
        boxes = boxes[in_range]
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        return ScoredBoxes(boxes, detections.scores[in_range], detections.pred_classes[in_range])
