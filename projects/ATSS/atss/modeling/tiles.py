"""Detection on tiles of large images."""

import numpy as np
import torch
from detectron2.data.transforms import Augmentation
from detectron2.structures import Boxes, Instances
from torch import nn

from atss_runner.detections import Detections
from atss_runner.tiles import Tiles


class ATSSWithTiles(nn.Module):
    """Detector of large images: merged detections of tiles, each of which is an image to the model,
    resized like other images. An image that is not larger than a tile is detected on as without
    tiles.

    Args:
        resize: of a tile; its ``get_transform`` takes an image.
        limit: greatest number of detections of an image.
        batch: tiles in the model at a time.
    """

    def __init__(
        self, model: nn.Module, tiles: Tiles, *, resize: Augmentation, limit: int, batch: int
    ):
        super().__init__()
        self.model = model
        self.tiles = tiles
        self.resize = resize
        self.limit = limit
        self.batch = batch
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Return detections in Detectron2's format, of dicts with "image" (C, H, W) that is not
        resized."""
        return [{"instances": self._detect(x["image"])} for x in batched_inputs]

    def _detect(self, image: torch.Tensor) -> Instances:
        pixels = image.permute(1, 2, 0).cpu().numpy()
        found = self.tiles.detect(pixels, self._run, self.limit, self.batch)
        boxes, scores, classes = map(torch.as_tensor, found)
        return Instances(
            tuple(pixels.shape[:2]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
        )

    def _run(self, images: list[np.ndarray]) -> list[Detections]:
        inputs = []
        for image in images:
            height, width = image.shape[:2]
            resized = self.resize.get_transform(image).apply_image(image)
            tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            inputs.append({"image": tensor, "height": height, "width": width})
        outputs = [x["instances"].to("cpu") for x in self.model(inputs)]
        return [
            Detections(x.pred_boxes.tensor.numpy(), x.scores.numpy(), x.pred_classes.numpy())
            for x in outputs
        ]
