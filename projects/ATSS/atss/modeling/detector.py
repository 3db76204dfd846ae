"""The detector: from images to losses or detections, top to bottom."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..anchors import GridAnchorGenerator
from ..errors import UserError
from ..structures import GroundTruth, HeadOutput, Predictions
from .box_coding import BoxCode
from .branch import Assigner, Branch, Branches, Phase, decode
from .criterion import Criterion
from .postprocess import PostProcessor
from .recompute import recompute

LEGACY_PIXELS_IN_TRAINING = (
    "MODEL.ATSS.LEGACY_PIXELS True is for inference with weights of the authors' code: set it to "
    "False to train them"
)


class ATSSDetector(DenseDetector):
    """One-stage detector whose training samples are chosen by an assigner.

    It has one or several branches: outputs with an assigner and a criterion.

    Args:
        backbone: images -> {name: feature map}.
        head: list of feature maps -> HeadOutput, or {name: HeadOutput} for several branches.
        anchor_generator: feature maps -> Anchors, by its method ``grid``.
        assigner, criterion: of the only branch.
        branches: {name: branch}, in place of assigner and criterion.
        inference: name of the branch that detects; losses of the others are called <name>/...
        input_format: order of the channels of images, pixel_mean and pixel_std, "BGR" or "RGB".
        shown: the channels in pictures, in this order; None for all.
        head_in_features: levels, fine to coarse; by default all of the backbone's.
        vis_period: iterations between pictures of a training image in the log; 0: none.
        precision: dtype of backbone and towers under autocast; None leaves autocast to the caller.
            Everything after the head is float32.
        compile_tail: whether torch.compile compiles :func:`.branch.compute_quotients`, for any
            canvas and number of objects.
        accumulate: parts of a training batch that the network computes one after the other.

    Attributes:
        iteration: of the training, for phases, if no event storage counts iterations.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        anchor_generator: GridAnchorGenerator,
        box_coder: BoxCode,
        postprocess: PostProcessor,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        assigner: Assigner | None = None,
        criterion: Criterion | None = None,
        branches: Mapping[str, Branch] | None = None,
        inference: str = "main",
        input_format: str = "BGR",
        shown: Sequence[int] | None = None,
        head_in_features: Sequence[str] | None = None,
        vis_period: int = 0,
        precision: torch.dtype | None = None,
        compile_tail: bool = False,
        accumulate: int = 1,
    ):
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if branches is None:
            if assigner is None or criterion is None:
                raise UserError("a detector needs an assigner and a criterion, or branches")
            branches = {"main": Branch(Phase(assigner, criterion))}
        self.branches = Branches(branches, inference)
        self.inference = inference
        self.anchor_generator = anchor_generator
        self.box_coder = box_coder
        self.postprocess = postprocess
        self.num_classes = num_classes
        self.input_format = input_format
        self.shown = slice(None) if shown is None else list(shown)
        self.vis_period = vis_period
        self.precision = precision
        self.compile_tail = compile_tail
        self.accumulate = accumulate
        self.iteration = 0

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Return losses by name in training, else {"instances": detections} of each image, from
        Detectron2's model format: dicts with "image" (C, H, W) and, in training, "instances"."""
        if not self.training and len(groups := self._canvas_groups(batched_inputs)) != 1:
            return self._forward_groups(batched_inputs, groups)
        # Copied before the network runs: afterwards the copy would wait for the GPU.
        gt = self._ground_truth(batched_inputs) if self.training else None
        images, features, outputs = self._run_network(batched_inputs, self.training)
        if gt is not None:
            return self.forward_training(images, features, outputs, gt)
        detections = self.forward_inference(images, features, outputs)
        inputs = zip(detections, images.image_sizes, batched_inputs, strict=True)
        return [{"instances": self._resize_detections(*each)} for each in inputs]

    def _canvas_groups(self, batched_inputs: list[dict]) -> list[list[int]]:
        """Return image indices by padded size: more padding would change an image's detections."""
        step = max(self.backbone.size_divisibility, 1)
        groups = defaultdict(list)
        for i, example in enumerate(batched_inputs):
            groups[tuple(-(-side // step) for side in example["image"].shape[-2:])].append(i)
        return list(groups.values())

    def _forward_groups(self, batched_inputs: list[dict], groups: list[list[int]]) -> list[dict]:
        results: dict[int, Any] = {}
        for group in groups:
            detections = self.forward([batched_inputs[i] for i in group])
            results |= zip(group, detections, strict=True)
        return [results[i] for i in range(len(batched_inputs))]

    def _ground_truth(self, batched_inputs: list[dict]) -> GroundTruth:
        if any("instances" not in x for x in batched_inputs):
            raise UserError("training needs images with instances")
        gt = GroundTruth.from_instances([x["instances"] for x in batched_inputs])
        return gt.to(self.device)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As in Detectron2, but without waiting for the GPU."""
        images = (x["image"].to(self.device, non_blocking=True) for x in batched_inputs)
        return super().preprocess_image([{"image": image} for image in images])

    def _run_network(
        self, batched_inputs: list[dict], training: bool
    ) -> tuple[ImageList, list[Tensor], dict[str, HeadOutput]]:
        """Return the images, their features and the outputs of the branches; with ``accumulate``,
        the features of the first part. Assignment and criterion get the outputs of all images; the
        backward pass runs the network of one part after the other again."""
        images = self.preprocess_image(batched_inputs)
        if self.accumulate == 1 or not (training and torch.is_grad_enabled()):
            return images, *self._run_part(images.tensor, training)
        parts = [
            recompute(self, self._run_part, pixels, training)
            for pixels in images.tensor.chunk(self.accumulate)
        ]
        features, _ = parts[0]
        outputs = {x: HeadOutput.concatenate([part[1][x] for part in parts]) for x in parts[0][1]}
        return images, features, outputs

    def _run_part(
        self, pixels: Tensor, training: bool
    ) -> tuple[list[Tensor], dict[str, HeadOutput]]:
        with torch.autocast(self.device.type, self.precision) if self.precision else nullcontext():
            maps = self.backbone(pixels)
            features = [maps[name] for name in self.head_in_features]
            return features, self.branches.outputs(self.head, features, training)

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> Predictions:
        """Return the predictions at all anchors of the branch that detects, as assigners get them.
        The images must share a canvas."""
        _, features, outputs = self._run_network(batched_inputs, training=False)
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            return decode(self.box_coder, outputs[self.inference], anchors)

    def raw(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Predict at every anchor from a tensor alone, for export.

        Args:
            pixels: (N, C, H, W) float32 in the channel order of ``input_format``, 0 to 255; sides
                are multiples of the backbone's divisor.

        Returns:
            boxes (N, R, 4) in pixels of the canvas, class probabilities (N, R, K) and, if the head
            predicts it, quality (N, R).
        """
        return self.raw_levels(pixels)[0]

    def raw_levels(self, pixels: Tensor) -> tuple[tuple[Tensor, ...], list[int]]:
        """Return :meth:`raw`, and the number of anchors of each level."""
        maps = self.backbone((pixels - self.pixel_mean) / self.pixel_std)
        features = [maps[name] for name in self.head_in_features]
        outputs = self.branches.outputs(self.head, features, training=False)
        anchors = self.anchor_generator.grid(features)
        output, boxes = decode(self.box_coder, outputs[self.inference], anchors)
        quality = () if output.quality is None else (output.quality.sigmoid(),)
        return (boxes, output.probability(), *quality), anchors.per_level

    def _resize_detections(
        self, detections: Instances, input_hw: tuple[int, int], example: dict
    ) -> Instances:
        height, width = example.get("height", input_hw[0]), example.get("width", input_hw[1])
        result = self.postprocess.in_original(detections, height, width)
        self.box_coder.after_resizing(result, input_hw)
        return result

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        outputs: Mapping[str, HeadOutput],
        gt: GroundTruth,
    ) -> dict[str, Tensor]:
        """Return the losses: anchors -> decode -> assign -> losses, of each branch.

        Args:
            outputs: {branch: output}.
            gt: on the model's device.
        """
        if self.box_coder.inference_only:
            raise UserError(LEGACY_PIXELS_IN_TRAINING)
        anchors = self.anchor_generator.grid(features)
        losses = self.branches.losses(
            self.box_coder, outputs, anchors, gt, self.iteration, self.compile_tail
        )
        draws = has_event_storage() and self.vis_period > 0
        if draws and get_event_storage().iter % self.vis_period == 0:
            self._log_picture(images, features, outputs, gt)
        return losses

    def forward_inference(
        self, images: ImageList, features: list[Tensor], outputs: Mapping[str, HeadOutput]
    ) -> list[Instances]:
        """Return detections in pixels of the network's input."""
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            output = outputs[self.inference].map(Tensor.float)
            return self.postprocess(output, anchors, self.box_coder, images.image_sizes)

    def _log_picture(
        self,
        images: ImageList,
        features: list[Tensor],
        outputs: Mapping[str, HeadOutput],
        gt: GroundTruth,
    ) -> None:
        height, width = images.image_sizes[0]
        image = images.tensor[0, :, :height, :width] * self.pixel_std + self.pixel_mean
        image = image[self.shown]
        boxes = Boxes(gt.boxes[gt.image_index == 0].cpu())
        objects = Instances((height, width), gt_boxes=boxes)
        example = {"image": image.cpu(), "instances": objects}
        with torch.no_grad():
            results = self.forward_inference(images, features, outputs)
        self.visualize_training([example], results[:1])
