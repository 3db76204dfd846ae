"""The detector: from images to losses or detections, top to bottom."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property

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
from .box_coding import BoxCode, LegacyPixels
from .branch import Assigner, Branch, HeadOutputs, Phase, compute_quotients, decode
from .criterion import Criterion, divide
from .postprocess import PostProcessor

# COCO's: (least, greatest) square root of the area, in pixels.
SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, float("inf"))}
LEGACY_PIXELS_IN_TRAINING = (
    "MODEL.ATSS.LEGACY_PIXELS True is for inference with weights of the authors' code: set it to "
    "False to train them on"
)


class ATSSDetector(DenseDetector):
    """One-stage detector whose training samples an assigner chooses.

    It has one branch, or several: outputs, each with a rule and a criterion of its own. All parts
    come built; :mod:`atss.config` builds them from a config.

    Args:
        backbone: images -> {name: feature map}.
        head: list of feature maps -> HeadOutput, or {name: HeadOutput} for branches to read.
        anchor_generator: feature maps -> Anchors, by its method ``grid``.
        assigner: (anchors, ground truth, predictions) -> Assignment, of the one branch.
        box_coder: between numbers and boxes.
        criterion: (output, boxes, anchors, ground truth, assignment) -> losses, of the one branch.
        branches: {name: branch}, in place of assigner and criterion.
        inference: name of the branch that detects; losses of the others are called <name>/...
        postprocess: (output, anchors, box code, image sizes) -> detections.
        num_classes: K.
        pixel_mean, pixel_std: of the channels, in the order of ``input_format``.
        input_format: "BGR" or "RGB": the order of the channels that come in.
        head_in_features: names of the levels, fine to coarse; all of the backbone's by default.
        vis_period: iterations between pictures of a training image in the log; 0 for none.
        precision: dtype of backbone and towers under autocast, or None to leave it to the caller.
            Everything after the head is float32.
        compile_tail: whether torch.compile compiles :func:`.branch.compute_quotients`: decoding,
            assignment and criterion, of any canvas and number of objects.

    Attributes:
        iteration: of the training, for phases, where there is no event storage that knows it.
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
            raise UserError(f"no branch {inference!r} for inference: there are {sorted(branches)}")
        self.branches: Mapping[str, Branch] = nn.ModuleDict(branches)  # type: ignore[assignment]
        self.inference = inference
        self.anchor_generator = anchor_generator
        self.box_coder = box_coder
        self.postprocess = postprocess
        self.num_classes = num_classes
        self.input_format = input_format
        self.vis_period = vis_period
        self.precision = precision
        self.compile_tail = compile_tail
        self.iteration = 0

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's model format: a list of dicts with "image" (C, H, W) and, in training,
        "instances"; returns losses by name in training, else one dict with "instances" each."""
        with self._autocast():
            if self.training:
                if any("instances" not in x for x in batched_inputs):
                    raise UserError("to train, images come with their instances")
                # Before the network, while a GPU has little to do that a copy would wait for.
                gt = GroundTruth.from_instances([x["instances"] for x in batched_inputs])
                gt = gt.to(self.device)
                return self.forward_training(*self._read(batched_inputs, self.branches), gt)
            # An image padded beyond its own canvas would see other borders than alone.
            results: list[dict] = [{}] * len(batched_inputs)
            for group in self._of_one_canvas(batched_inputs):
                examples = [batched_inputs[i] for i in group]
                images, features, outputs = self._read(examples, [self.inference])
                found = self.forward_inference(images, features, outputs)
                for i, detected, input_hw in zip(group, found, images.image_sizes, strict=True):
                    in_original = self._in_original(detected, input_hw, batched_inputs[i])
                    results[i] = {"instances": in_original}
        return results

    def _autocast(self) -> AbstractContextManager:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def _read(
        self, batched_inputs: list[dict], names: Iterable[str]
    ) -> tuple[ImageList, list[Tensor], dict[str, HeadOutput]]:
        """Normalised and padded images, their feature maps, and what branches of these names read
        of them."""
        images = self.preprocess_image(batched_inputs)
        maps = self.backbone(images.tensor)
        features = [maps[name] for name in self.head_in_features]

        @cache
        def outputs_of(owner: str) -> HeadOutputs:
            """Of the head of a branch, or of the detector's."""
            try:
                return self.branches[owner].own_outputs(features) if owner else self.head(features)
            except ValueError as error:
                if min(x[0, 0].numel() for x in features) > 1:
                    raise
                raise UserError(
                    "MODEL.ATSS.NORM has too few numbers on a level of 1 x 1 locations: raise "
                    "MODEL.FPN.OUT_CHANNELS, of which GN makes 32 groups, the size of images or "
                    f"their number ({error})"
                ) from error

        found = {}
        for name in names:
            branch = self.branches[name]
            owner, _ = branch.source(name)
            found[name] = branch.select_output(outputs_of(owner))
        return images, features, found

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> Predictions:
        """What the branch that detects says at every anchor, as rules see it, of images that share
        a canvas."""
        with self._autocast():
            _, features, outputs = self._read(batched_inputs, [self.inference])
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
        maps = self.backbone((pixels - self.pixel_mean) / self.pixel_std)
        features = [maps[name] for name in self.head_in_features]
        branch = self.branches[self.inference]
        owner, _ = branch.source(self.inference)
        outputs = self.branches[owner].own_outputs(features) if owner else self.head(features)
        anchors = self.anchor_generator.grid(features)
        output, boxes = decode(self.box_coder, branch.select_output(outputs), anchors)
        quality = () if output.quality is None else (output.quality.sigmoid(),)
        return boxes, output.probability(), *quality

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Detectron2's, in which the host does not wait for what a GPU still has to do."""
        there = (x["image"].to(self.device, non_blocking=True) for x in batched_inputs)
        return super().preprocess_image([{"image": image} for image in there])

    def _in_original(
        self, detected: Instances, input_hw: tuple[int, int], example: dict
    ) -> Instances:
        """From pixels of the network's input to those of the image that it was made of."""
        height, width = example.get("height", input_hw[0]), example.get("width", input_hw[1])
        result = self.postprocess.in_original(detected, height, width)
        if isinstance(self.box_coder, LegacyPixels):
            self.box_coder.after_resizing(result, input_hw)
        return result

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
        outputs: Mapping[str, HeadOutput],
        gt: GroundTruth,
    ) -> dict[str, Tensor]:
        """anchors -> decode -> assign -> losses, of each branch.

        Args:
            outputs: what each branch reads, by its name.
            gt: on the device of the model.

        Raises:
            ValueError: with legacy pixels, in which the losses would learn other boxes than
                inference reports.
        """
        if isinstance(self.box_coder, LegacyPixels):
            raise UserError(LEGACY_PIXELS_IN_TRAINING)
        storage = get_event_storage() if has_event_storage() else None
        phases = self._phases(self.iteration if storage is None else storage.iter)
        sources = {name: branch.source(name) for name, branch in self.branches.items()}
        by_source = {sources[name]: output for name, output in outputs.items()}
        with torch.autocast(self.device.type, enabled=False):
            anchors = self.anchor_generator.grid(features)
            tail = _compiled_tail(anchors, gt) if self.compile_tail else compute_quotients
            found, assignments = tail(self.box_coder, phases, sources, by_source, anchors, gt)
            losses = divide(
                {
                    loss if name == self.inference else f"{name}/{loss}": quotient
                    for name, quotients in found.items()
                    for loss, quotient in quotients.items()
                }
            )
        if storage is not None:
            self._log(images, features, outputs, gt, assignments)
        return losses

    def _phases(self, iteration: int) -> dict[str, Phase]:
        """The phase of each branch.

        Raises:
            ValueError: if a branch takes the assignment of one that has none then.
        """
        phases = {name: branch.at(iteration) for name, branch in self.branches.items()}
        assigned = sorted(name for name, phase in phases.items() if phase.assigner is not None)
        for name, phase in phases.items():
            if phase.assignment_of and phase.assignment_of not in assigned:
                raise UserError(
                    f"branch {name!r} takes the assignment of {phase.assignment_of!r}; those with "
                    f"one are {assigned}"
                )
        return phases

    def forward_inference(
        self, images: ImageList, features: list[Tensor], outputs: Mapping[str, HeadOutput]
    ) -> list[Instances]:
        """score -> filter -> decode -> clip -> suppress, in the frame of the network's input."""
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
            for name, assignment in assignments.items():
                prefix = "" if name == self.inference else f"{name}/"
                counts = assignment.positives_per_object(len(gt)).cpu()
                name = f"{prefix}assignment/objects_without_positive"
                storage.put_scalar(
                    f"{prefix}assignment/positives_per_object", counts.float().mean().item()
                )
                storage.put_scalar(name, (counts == 0).sum().item())
                # On the canvas, by COCO's sizes.
                side = area(gt.boxes.cpu()).sqrt()
                for size, (low, high) in SIZES.items():
                    without = (counts == 0) & (side >= low) & (side < high)
                    storage.put_scalar(f"{name}_{size}", without.sum().item())
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            height, width = images.image_sizes[0]
            image = images.tensor[0, :, :height, :width] * self.pixel_std + self.pixel_mean
            objects = Instances(
                (height, width), gt_boxes=Boxes(gt.boxes[gt.image_index == 0].cpu())
            )
            shown = {"image": image.cpu(), "instances": objects}
            with torch.no_grad():
                results = self.forward_inference(images, features, outputs)
            self.visualize_training([shown], results[:1])


def _compiled_tail(anchors: Anchors, gt: GroundTruth) -> Callable:
    """The compiled :func:`compute_quotients`, for these arguments."""
    # Values that anchors compute once and keep are computed here: inside, torch.compile would make
    # one graph for the first step of a canvas, which computes them, and one for others.
    for name, value in vars(Anchors).items():
        if isinstance(value, cached_property):
            getattr(anchors, name)
    # Without the mark torch.compile takes sizes that are equal in a first batch for one size: 4
    # objects for the 4 sides of a box, which are always 4.
    for tensor in (gt.boxes, gt.classes, gt.image_index):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile(compute_quotients)


@cache
def _compile(function: Callable) -> Callable:
    # One for all models, and no attribute of theirs, because it cannot be pickled.
    return torch.compile(function, dynamic=True)
