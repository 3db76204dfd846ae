"""The detector: from images to losses or detections, top to bottom."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..anchors import Anchors, GridAnchorGenerator
from ..errors import UserError
from ..geometry import area
from ..structures import Assignment, GroundTruth, HeadOutput, Predictions
from .box_coding import BoxCode
from .branch import Assigner, Branch, HeadOutputs, Phase, compute_quotients, decode
from .criterion import Criterion, divide
from .postprocess import PostProcessor

# COCO's sizes: bounds of the square root of the area, in pixels.
SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, float("inf"))}
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

    Attributes:
        iteration: of the training, for phases, if no event storage counts iterations.
    """

    # Period of Detectron2's writers. Reading a number from a GPU waits for it, so statistics are
    # computed only if they are written.
    LOG_PERIOD = 20

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
    ):
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if branches is None:
            if assigner is None or criterion is None:
                raise UserError("a detector needs an assigner and a criterion, or branches")
            branches = {"main": Branch(Phase(assigner, criterion))}
        if inference not in branches:
            raise UserError(f"unknown branch {inference!r}: choose from {sorted(branches)}")
        self.branches: Mapping[str, Branch] = nn.ModuleDict(branches)  # type: ignore[assignment]
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
        self.iteration = 0

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Return losses by name in training, else {"instances": detections} of each image, from
        Detectron2's model format: dicts with "image" (C, H, W) and, in training, "instances"."""
        if not self.training and len(groups := self._canvas_groups(batched_inputs)) != 1:
            return self._forward_groups(batched_inputs, groups)
        # Copied before the network runs: afterwards the copy would wait for the GPU.
        gt = self._ground_truth(batched_inputs) if self.training else None
        branches = self.branches if self.training else [self.inference]
        images, features, outputs = self._run_network(batched_inputs, branches)
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
        self, batched_inputs: list[dict], branches: Iterable[str]
    ) -> tuple[ImageList, list[Tensor], dict[str, HeadOutput]]:
        """Return the images, their features and the outputs of these branches."""
        with torch.autocast(self.device.type, self.precision) if self.precision else nullcontext():
            images = self.preprocess_image(batched_inputs)
            maps = self.backbone(images.tensor)
            features = [maps[name] for name in self.head_in_features]
            return images, features, self._run_heads(features, branches)

    def _run_heads(self, features: list[Tensor], names: Iterable[str]) -> dict[str, HeadOutput]:
        """Return the outputs of these branches. Each head runs once."""
        heads: dict[str, HeadOutputs] = {}
        outputs = {}
        for name in names:
            branch = self.branches[name]
            owner, _ = branch.source(name)
            if owner not in heads:
                heads[owner] = self._run_head(features, owner)
            outputs[name] = branch.select_output(heads[owner])
        return outputs

    def _run_head(self, features: list[Tensor], owner: str) -> HeadOutputs:
        """Return the outputs of a branch's own head, or of the detector's head for ""."""
        try:
            return self.branches[owner].own_outputs(features) if owner else self.head(features)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # of torch's norms
                raise
            raise UserError(
                "MODEL.ATSS.NORM has too few values on a level of 1 x 1 locations: raise "
                "MODEL.FPN.OUT_CHANNELS, which GN divides into 32 groups, the size of images or "
                f"their number ({error})"
            ) from error

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> Predictions:
        """Return the predictions at all anchors of the branch that detects, as assigners get them.
        The images must share a canvas."""
        _, features, outputs = self._run_network(batched_inputs, [self.inference])
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
        outputs = self._run_heads(features, [self.inference])
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
        storage = get_event_storage() if has_event_storage() else None
        phases = self._phases(self.iteration if storage is None else storage.iter)
        sources = {name: branch.source(name) for name, branch in self.branches.items()}
        by_source = {sources[name]: output for name, output in outputs.items()}
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            tail = _compiled_tail(anchors, gt) if self.compile_tail else compute_quotients
            quotients, assignments = tail(self.box_coder, phases, sources, by_source, anchors, gt)
            losses = divide(
                {
                    loss if name == self.inference else f"{name}/{loss}": quotient
                    for name, losses_of_branch in quotients.items()
                    for loss, quotient in losses_of_branch.items()
                }
            )
        if storage is not None:
            self._log(images, features, outputs, gt, assignments)
        return losses

    def _phases(self, iteration: int) -> dict[str, Phase]:
        phases = {name: branch.at(iteration) for name, branch in self.branches.items()}
        assigned = sorted(name for name, phase in phases.items() if phase.assigner is not None)
        for name, phase in phases.items():
            if phase.assignment_of and phase.assignment_of not in assigned:
                raise UserError(
                    f"branch {name!r} takes the assignment of {phase.assignment_of!r}: choose from "
                    f"{assigned}"
                )
        return phases

    def forward_inference(
        self, images: ImageList, features: list[Tensor], outputs: Mapping[str, HeadOutput]
    ) -> list[Instances]:
        """Return detections in pixels of the network's input."""
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            output = outputs[self.inference].map(Tensor.float)
            return self.postprocess(output, anchors, self.box_coder, images.image_sizes)

    def _log(
        self,
        images: ImageList,
        features: list[Tensor],
        outputs: Mapping[str, HeadOutput],
        gt: GroundTruth,
        assignments: Mapping[str, Assignment],
    ) -> None:
        storage = get_event_storage()
        if storage.iter % self.LOG_PERIOD == 0 and len(gt):
            side = area(gt.boxes.cpu()).sqrt()  # on the canvas
            for name, assignment in assignments.items():
                group = "assignment" if name == self.inference else f"{name}/assignment"
                counts = assignment.positives_per_object(len(gt)).cpu()
                storage.put_scalar(f"{group}/positives_per_object", counts.float().mean().item())
                without = counts == 0
                statistic = f"{group}/objects_without_positive"
                storage.put_scalar(statistic, without.sum().item())
                for size, (low, high) in SIZES.items():
                    of_size = without & (side >= low) & (side < high)
                    storage.put_scalar(f"{statistic}_{size}", of_size.sum().item())
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            height, width = images.image_sizes[0]
            image = images.tensor[0, :, :height, :width] * self.pixel_std + self.pixel_mean
            image = image[self.shown]
            boxes = Boxes(gt.boxes[gt.image_index == 0].cpu())
            objects = Instances((height, width), gt_boxes=boxes)
            example = {"image": image.cpu(), "instances": objects}
            with torch.no_grad():
                results = self.forward_inference(images, features, outputs)
            self.visualize_training([example], results[:1])


def _compiled_tail(anchors: Anchors, gt: GroundTruth) -> Callable:
    """Return the compiled :func:`compute_quotients`."""
    # Compute the anchors' cached properties (functools') here. Otherwise torch.compile would make a
    # graph for the first step of a canvas, which computes them, and another for the next steps.
    for name, value in vars(Anchors).items():
        if isinstance(value, cached_property):
            getattr(anchors, name)
    # Without the mark torch.compile assumes that sizes that are equal in the first batch are always
    # equal, such as 4 objects and the 4 sides of a box.
    for tensor in (gt.boxes, gt.classes, gt.image_index):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile(compute_quotients)


@cache
def _compile(function: Callable) -> Callable:
    # Shared by all models, and no attribute of a model, because it cannot be pickled.
    return torch.compile(function, dynamic=True)
