"""The detector: from images to losses or detections, top to bottom."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..anchors import Anchors, GridAnchorGenerator
from ..structures import Assignment, GroundTruth, HeadOutput, Predictions
from .box_coding import BoxDeltas, LogDistances, PointDistances
from .criterion import Criterion
from .postprocess import PostProcessor

LEGACY_PIXELS_IN_TRAINING = (
    "MODEL.ATSS.LEGACY_PIXELS True is for inference with weights of the authors' code: set it to "
    "False to train them on"
)


class ATSSDetector(DenseDetector):
    """One-stage detector whose training samples an assigner chooses.

    Detectron2's :class:`DenseDetector` normalises and pads the images, runs the backbone and the
    head, and brings detections back to the size of the original image; this class fills in the
    rest. All parts come built; :mod:`atss.config` builds them from a config.

    Args:
        backbone: images -> {name: feature map}.
        head: list of feature maps -> HeadOutput.
        anchor_generator: feature maps -> Anchors, by its method ``grid``.
        assigner: (anchors, ground truth, predictions) -> Assignment.
        box_coder: ``decode(deltas, anchors)`` -> boxes.
        criterion: (output, boxes, anchors, ground truth, assignment) -> losses.
        postprocess: (output, anchors, decode, image sizes) -> detections.
        num_classes: K.
        pixel_mean, pixel_std: of the channels, in the order of ``input_format``.
        input_format: "BGR" or "RGB": the order of the channels that come in.
        head_in_features: names of the levels, fine to coarse; all of the backbone's by default.
        vis_period: iterations between pictures of a training image in the log; 0 for none.
        precision: dtype of backbone and towers under autocast, or None to leave it to the caller.
            Everything after the head is float32.
        legacy_pixels: the weights are those of the authors' code, where a coordinate names the
            centre of a pixel and a box holds its last pixel. For inference: to train such weights
            on is to leave these pixels.
    """

    # As Detectron2's writers print: every so many iterations. Reading a number off a GPU waits
    # for it, so what is only logged is not computed in between.
    LOG_PERIOD = 20

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        anchor_generator: GridAnchorGenerator,
        assigner: Callable[[Anchors, GroundTruth, Predictions], Assignment],
        box_coder: BoxDeltas | PointDistances | LogDistances,
        criterion: Criterion,
        postprocess: PostProcessor,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        head_in_features: Sequence[str] | None = None,
        vis_period: int = 0,
        precision: torch.dtype | None = None,
        legacy_pixels: bool = False,
    ):
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.box_coder = box_coder
        self.criterion = criterion
        self.postprocess = postprocess
        self.num_classes = num_classes
        self.input_format = input_format
        self.vis_period = vis_period
        self.precision = precision
        self.legacy_pixels = legacy_pixels

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's model format: a list of dicts with "image" (C, H, W) and, in training,
        "instances"; returns losses by name in training, else one dict with "instances" each."""
        autocast: AbstractContextManager = nullcontext()
        if self.precision is not None:
            autocast = torch.autocast(self.device.type, dtype=self.precision)
        with autocast:
            if self.training:
                return super().forward(batched_inputs)
            # An image padded beyond its own canvas would see other borders than alone.
            results: list[dict] = [{}] * len(batched_inputs)
            for group in self._of_one_canvas(batched_inputs):
                detected = super().forward([batched_inputs[i] for i in group])
                for i, result in zip(group, detected, strict=True):
                    results[i] = result
        if self.legacy_pixels:
            for example, result in zip(batched_inputs, results, strict=True):
                _keep_last_pixel(result["instances"], example["image"].shape[-2:])
        return results

    def _of_one_canvas(self, batched_inputs: list[dict]) -> list[list[int]]:
        """Indices of images that are padded to the same size, group by group."""
        step = max(self.backbone.size_divisibility, 1)
        groups = defaultdict(list)
        for i, example in enumerate(batched_inputs):
            groups[tuple(-(-side // step) for side in example["image"].shape[-2:])].append(i)
        return list(groups.values())

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: HeadOutput,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """anchors -> decode -> assign -> losses.

        Raises:
            ValueError: with legacy pixels, in which the losses would learn other boxes than
                inference reports.
        """
        if self.legacy_pixels:
            raise ValueError(LEGACY_PIXELS_IN_TRAINING)
        with torch.autocast(self.device.type, enabled=False):
            output = _in_float32(predictions)
            anchors = self.anchor_generator.grid(features)
            gt = GroundTruth.from_instances(gt_instances)
            boxes = self.box_coder.decode(output.deltas, anchors.boxes)
            quality = None if output.quality is None else output.quality.detach()
            seen = Predictions(output.logits.detach(), boxes.detach(), quality)
            assignment = self.assigner(anchors, gt, seen)
            losses = self.criterion(output, boxes, anchors, gt, assignment)
        if has_event_storage():
            self._log(images, features, predictions, gt_instances, gt, assignment)
        return losses

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """score -> filter -> decode -> clip -> NMS, in the frame of the network's input."""
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            output = _in_float32(predictions)
            legacy = self.box_coder.legacy

            def decode(deltas: Tensor, anchor_boxes: Tensor) -> Tensor:
                boxes = self.box_coder.decode(deltas, anchor_boxes)
                return boxes + boxes.new_tensor(legacy) if self.legacy_pixels else boxes

            return self.postprocess(output, anchors, decode, images.image_sizes)

    def _log(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: HeadOutput,
        gt_instances: list[Instances],
        gt: GroundTruth,
        assignment: Assignment,
    ) -> None:
        storage = get_event_storage()
        if storage.iter % self.LOG_PERIOD == 0 and len(gt):
            counts = assignment.positives_per_object(len(gt)).cpu()
            storage.put_scalar("assignment/positives_per_object", counts.float().mean().item())
            storage.put_scalar("assignment/objects_without_positive", (counts == 0).sum().item())
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            height, width = images.image_sizes[0]
            image = images.tensor[0, :, :height, :width] * self.pixel_std + self.pixel_mean
            shown = {"image": image.cpu(), "instances": gt_instances[0].to("cpu")}
            with torch.no_grad():
                results = self.forward_inference(images, features, predictions)
            self.visualize_training([shown], results[:1])


def _in_float32(output: HeadOutput) -> HeadOutput:
    logits, deltas, quality = output
    return HeadOutput(logits.float(), deltas.float(), None if quality is None else quality.float())


def _keep_last_pixel(instances: Instances, input_hw: Sequence[int]) -> None:
    """In legacy pixels the last pixel of a box is one pixel of the original image wide, whatever
    the size of the input: resizing it with the box was wrong by the difference. In place."""
    height, width = instances.image_size
    boxes = instances.pred_boxes.tensor
    boxes[:, 2] += 1 - width / input_hw[1]
    boxes[:, 3] += 1 - height / input_hw[0]
    instances.pred_boxes.clip((height, width))
