"""Multi-scale testing as published: 26 views of an image, filtered by size, merged by voting."""

from collections.abc import Callable, Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..geometry import area
from .suppression import ScoredBoxes


class ATSSWithTTA(nn.Module):
    """A detector that looks at several resized and mirrored views of each image.

    Each view goes through the whole detector by itself, its own suppression included, so that
    memory is that of the largest view. Of a view only boxes within its range of sizes count, small
    ones on large views and the reverse.

    Args:
        model: in evaluation mode.
        plain: (short side, longest side) of the view that everything counts of.
        sizes: (short side, longest side, least and greatest size) of the others: only boxes whose
            area lies between the squares of the latter two, in pixels of the view, count.
        flip: whether each view is mirrored too.
        merge: a suppression.
        max_detections: kept per image.
        input_format: of the model, "BGR" or "RGB".
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
        """Detectron2's model format. An image is read from its "file_name", or else taken as it is;
        detections are in the frame of "height" and "width", or of the image."""
        return [{"instances": self._one(example)} for example in batched_inputs]

    def _one(self, example: dict) -> Instances:
        if "file_name" in example:
            image = read_image(example["file_name"], self.input_format)
        else:
            image = example["image"].permute(1, 2, 0).cpu().numpy()
        views = [self._view(image, *view, flip) for view in self.views for flip in self.flips]
        boxes, scores, classes = (torch.cat(x) for x in zip(*views, strict=True))
        boxes, scores, classes = self.merge(boxes, scores, classes, self.max_detections)
        height, width = image.shape[:2]
        merged = Instances(
            (height, width),
            pred_boxes=Boxes(boxes),
            scores=scores,
            pred_classes=classes,
        )
        return detector_postprocess(
            merged, example.get("height", height), example.get("width", width)
        )

    def _view(
        self, image: np.ndarray, short: int, longest: int, least: float, greatest: float, flip: bool
    ) -> ScoredBoxes:
        """What the model finds on one view, in pixels of the image."""
        resize = T.ResizeShortestEdge([short, short], longest).get_transform(image)
        view = resize.apply_image(image)
        if flip:
            view = view[:, ::-1]
        (height, width), (view_height, view_width) = image.shape[:2], view.shape[:2]
        tensor = torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1)))
        if tensor.dtype == torch.float64:  # as Detectron2 reads YUV
            tensor = tensor.float()
        found = self.model([{"image": tensor, "height": height, "width": width}])[0]["instances"]
        boxes = found.pred_boxes.tensor
        size = area(boxes) * (view_height / height) * (view_width / width)
        counts = (size > least**2) & (size < greatest**2)
        boxes = boxes[counts]
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        return ScoredBoxes(boxes, found.scores[counts], found.pred_classes[counts])
