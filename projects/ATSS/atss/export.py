"""Export of a trained detector to one ONNX file for every batch and size, with its parity checked.

The file maps pixels to boxes, class probabilities and quality at every anchor; what follows is the
runner's (``atss_runner``). Its metadata property "atss" is JSON with all that a runner needs.
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from atss_runner.images import SUFFIXES as IMAGE_SUFFIXES

from . import __version__
from .config import class_ids, class_names
from .errors import UserError
from .modeling import ATSSDetector, suppression
from .modeling.postprocess import product, root

SCHEMA = 1
OUTPUTS = ("boxes", "probabilities", "quality")
# DeformConv needs 19.
OPSET = 20
SUPPRESSIONS: dict[Any, str] = {
    suppression.keep_all: "none",
    suppression.NMS: "nms",
    suppression.ScoreVote: "score_vote",
    suppression.Vote: "vote",
    suppression.SoftVote: "soft_vote",
}
# The file may differ from eager by so many times what eager itself moves when its input is
# multiplied by 1 + NUDGE.
NUDGE, ALLOWED = 1e-6, 10


class Parity(NamedTuple):
    """The largest differences of a file and eager at one shape, and eager's own movement.

    Attributes:
        shape: (N, 3, H, W).
        differences, own: of boxes in pixels, of probabilities, and of quality.
    """

    shape: tuple[int, ...]
    differences: tuple[float, ...]
    own: tuple[float, ...]


class Raw(nn.Module):
    """The part of a detector that is exported."""

    def __init__(self, detector: ATSSDetector):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) -> :meth:`ATSSDetector.raw`."""
        return self.detector.raw(image)


def export_onnx(detector: ATSSDetector, cfg: CfgNode, target: Path) -> list[Parity]:
    """Write an ONNX file, and compare it with the detector at three other shapes.

    Args:
        detector: with its weights.
        cfg: its config.

    Returns:
        the comparisons.

    Raises:
        UserError: if a package is missing, the config has no class names, its suppression or score
            is not one of ours, or the file differs from the detector; then there is no file.
    """
    onnx = _require("onnx")
    _require("onnxscript")
    settings = metadata(detector, cfg)
    model = Raw(detector.cpu().float().eval())
    detector.precision = None
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with torch.no_grad(), _static_padding(model):
            program = export_program(model, settings["divisor"])
            written: Any = torch.onnx.export(
                program,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                input_names=["image"],
                output_names=settings["outputs"],
                verbose=False,
            )
        proto = written.model_proto
        _clear_paths(proto)
        entry = proto.metadata_props.add()
        entry.key, entry.value = "atss", json.dumps(settings)
        target.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(proto, str(unfinished))
        found = compare(detector, str(unfinished), settings)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return found


def export_program(model: nn.Module, divisor: int) -> Any:
    """torch.export's program for any batch and any size that the divisor divides."""
    # From a batch of 1, or a side on which a level is one cell, this size would be baked in.
    height, width = (-(-side // divisor) * divisor for side in (192, 224))
    height, width = max(height, 2 * divisor), max(width, 3 * divisor)
    dim = torch.export.Dim
    sizes = {0: dim("batch"), 2: divisor * dim("h"), 3: divisor * dim("w")}
    example = torch.rand(2, 3, height, width) * 255
    return torch.export.export(model, (example,), dynamic_shapes={"image": sizes}, strict=False)


def compare(detector: ATSSDetector, file: str, settings: Mapping[str, Any]) -> list[Parity]:
    """Run the file beside the detector on random pixels of three shapes.

    Raises:
        UserError: if an output differs by more than ALLOWED times eager's own movement.
    """
    runner = _require("atss_runner")
    loaded = runner.load(file)
    divisor = settings["divisor"]
    coarsest = max(*settings["strides"], divisor)
    one_cell = -(-coarsest // divisor) * divisor
    sides = [-(-x // divisor) * divisor for x in (320, 384, 256)]
    shapes = [(3, *sides[:2]), (1, sides[2], sides[0]), (1, one_cell, one_cell)]
    found = []
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in shapes:
        pixels = torch.rand(batch, 3, height, width, generator=generator) * 255
        with torch.no_grad():
            eager = detector.raw(pixels)
            moved = detector.raw(pixels * (1 + NUDGE))
        ours = [x for x in loaded.run(pixels.numpy()) if x is not None]
        differences = tuple(
            float(np.abs(x - y.numpy()).max()) for x, y in zip(ours, eager, strict=True)
        )
        own = tuple(float((x - y).abs().max()) for x, y in zip(eager, moved, strict=True))
        found.append(Parity(tuple(pixels.shape), differences, own))
        floor = (1e-3, 1e-5, 1e-5)
        for name, difference, movement, least in zip(
            settings["outputs"], differences, own, floor, strict=False
        ):
            if not difference <= max(ALLOWED * movement, least):
                raise UserError(
                    f"the exported file differs from the detector: {name} by {difference:.1e} at "
                    f"{tuple(pixels.shape)}, where the detector itself moves by {movement:.1e} if "
                    f"its input moves by {NUDGE:g}; no file was written"
                )
    return found


def metadata(detector: ATSSDetector, cfg: CfgNode) -> dict[str, Any]:
    """Return the metadata that a runner needs.

    Raises:
        UserError: if the config has no class names, or a part that no runner knows.
    """
    post, generator = detector.postprocess, detector.anchor_generator
    names = class_names(cfg)
    if not names:
        raise UserError(
            "the config has no class names, which the file would lack: set MODEL.ATSS.CLASS_NAMES"
        )
    part: Any = post.suppression
    name = SUPPRESSIONS.get(part if part in SUPPRESSIONS else type(part))
    if name is None:
        raise UserError("MODEL.ATSS.SUPPRESSION is a part of your own, which no runner has")
    arguments = {} if part in SUPPRESSIONS else dataclasses.asdict(part)
    scores = {product: "product", root: "sqrt"}
    if post.score not in scores:
        raise UserError("MODEL.ATSS.SCORE is a part of your own, which no runner has")
    outputs = OUTPUTS if has_quality(detector) else OUTPUTS[:2]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "classes": list(names),
        "ids": list(class_ids(cfg)),
        "input": "image",
        "outputs": list(outputs),
        "input_format": cfg.INPUT.FORMAT,
        "pixel_mean": detector.pixel_mean.flatten().tolist(),
        "pixel_std": detector.pixel_std.flatten().tolist(),
        "normalised_inside": True,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "divisor": max(detector.backbone.size_divisibility, 1),
        "strides": [int(x) for x in generator.strides],
        "anchors_per_location": generator.num_anchors[0],
        "score": scores[post.score],
        "score_thresh": post.score_thresh,
        "topk": post.topk_candidates,
        "max_detections": post.max_detections,
        "threshold_on_score": post.threshold_on_score,
        "rank_by_class": post.rank_by_class,
        "rank_anchors": post.rank_anchors,
        "clip": post.clip,
        "suppression": {"name": name, **arguments},
        "legacy_pixels": detector.box_coder.inference_only,
    }


def has_quality(detector: ATSSDetector) -> bool:
    """Whether the head predicts a quality."""
    side = max(detector.backbone.size_divisibility, 1) * 2
    with torch.no_grad():
        return len(detector.raw(torch.zeros(1, 3, side, side, device=detector.device))) > 2


@contextmanager
def _static_padding(model: nn.Module) -> Iterator[None]:
    """Replace the padding of timm's "same" convolutions, which depends on the size, by the one that
    sides which the stride divides get."""
    try:
        from timm.layers import Conv2dSame
    except ImportError:
        yield
        return
    replaced: list[Any] = [x for x in model.modules() if isinstance(x, Conv2dSame)]
    for conv in replaced:
        sides: list[int] = []
        for kernel, stride, dilation in zip(
            *(reversed(x) for x in (conv.kernel_size, conv.stride, conv.dilation)), strict=True
        ):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            sides += [total // 2, total - total // 2]
        conv.forward = _padded(conv, sides)
    try:
        yield
    finally:
        for conv in replaced:
            del conv.forward


def _padded(conv: Any, sides: Sequence[int]) -> Any:
    geometry = (conv.stride, 0, conv.dilation, conv.groups)
    return lambda x: F.conv2d(F.pad(x, sides), conv.weight, conv.bias, *geometry)


def _clear_paths(proto: Any) -> None:
    """Remove the exporter's stack traces, which name files of this machine."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]
    for function in proto.functions:
        for part in (function, *function.node, *function.value_info):
            part.doc_string = ""
            del part.metadata_props[:]


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"export needs {package}: pip install '.[export]'") from error


# ------------------------------------------------------------------------------------------------
# Smaller files
# ------------------------------------------------------------------------------------------------

CALIBRATION_IMAGES = 24


def convert_precision(file: Path, precision: str, calibrate: str | None) -> None:
    """Convert an exported file to fp16 or int8, in place.

    Args:
        calibrate: for int8, a folder of images on which ranges of activations are measured.

    Raises:
        UserError: if the folder has no image that can be read.
    """
    onnx = _require("onnx")
    unfinished = file.with_name(f".{file.name}.{precision}.onnx")
    prepared = file.with_name(f".{file.name}.prepared.onnx")
    header = onnx.load(str(file), load_external_data=False)
    properties = {x.key: x.value for x in header.metadata_props}
    try:
        if precision == "fp16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            proto = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
            onnx.save(proto, str(unfinished))
        else:
            _quantize(file, prepared, unfinished, str(calibrate))
        proto = onnx.load(str(unfinished))
        del proto.metadata_props[:]
        for key, value in properties.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.save(proto, str(unfinished))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
        prepared.unlink(missing_ok=True)


def _quantize(file: Path, prepared: Path, target: Path, folder: str) -> None:
    """Quantise convolutions, activations to uint8 and weights to int8 per channel. The first two
    stay in float: quantised, they cost a small backbone most of its AP."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx, runner, media = _require("onnx"), _require("atss_runner"), _require("atss_runner.media")
    detector = runner.load(str(file))
    inputs, _ = media.find_media([folder], IMAGE_SUFFIXES, Path(os.devnull))
    images = [str(x) for x in inputs if not media.is_video(x)][:CALIBRATION_IMAGES]
    if not images:
        raise UserError(f"--calibrate {folder} contains no image")
    batches = iter([{"image": detector.pixels(image)} for image in images])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    nodes = onnx.load(str(prepared), load_external_data=False).graph.node
    convolutions = [x.name for x in nodes if x.op_type == "Conv"]
    quantization.quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv"],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        nodes_to_exclude=convolutions[:2],
    )
