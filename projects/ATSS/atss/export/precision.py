"""Conversion of exported files to fp16 and int8."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from atss_runner.images import SUFFIXES as IMAGE_SUFFIXES

from ..errors import UserError
from .formats import hidden, move, remove, require

CALIBRATION_IMAGES = 24


def convert_precision(file: Path, precision: str, calibrate: str | None) -> None:
    """Convert an exported file to fp16 or int8, in place.

    OpenVINO's fp16 compresses weights alone; int8 is for ONNX.

    Args:
        calibrate: for int8, a folder of images on which ranges of activations are measured.

    Raises:
        UserError: if the folder has no image that can be read.
    """
    unfinished, prepared = hidden(file, precision), hidden(file, "prepared")
    try:
        if file.suffix == ".xml":
            openvino = require("openvino")
            model = openvino.Core().read_model(str(file))
            openvino.save_model(model, str(unfinished), compress_to_fp16=True)
        else:
            _convert_onnx(file, prepared, unfinished, precision, str(calibrate))
        move(unfinished, file)
    finally:
        remove(unfinished)
        remove(prepared)


def _convert_onnx(file: Path, prepared: Path, target: Path, precision: str, calibrate: str) -> None:
    onnx = require("onnx")
    properties = onnx.load(str(file)).metadata_props
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        proto = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
    else:
        _quantize(file, prepared, target, calibrate)
        proto = onnx.load(str(target))
    del proto.metadata_props[:]
    proto.metadata_props.extend(properties)
    onnx.save(proto, str(target))


def _quantize(file: Path, prepared: Path, target: Path, folder: str) -> None:
    """Quantise convolutions, activations to uint8 and weights to int8 per channel. The first two
    stay in float: quantised, they cost a small backbone most of its AP."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx, runner, media = require("onnx"), require("atss_runner"), require("atss_runner.media")
    detector = runner.load(str(file))
    found, _ = media.find_media([folder], IMAGE_SUFFIXES, Path(os.devnull))
    images = [str(x) for x in found if not media.is_video(x)][:CALIBRATION_IMAGES]
    if not images:
        raise UserError(f"--calibrate {folder} contains no image")

    def inputs(image: str) -> dict[str, Any]:
        pixels = detector.pixels(image)
        values = (pixels, np.array([pixels.shape[2:]]))
        return dict(zip(detector.settings["inputs"], values, strict=False))

    batches = map(inputs, images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    proto = onnx.load(str(prepared))
    _rename_constants(proto.graph)
    onnx.save(proto, str(prepared))
    convolutions = [x.name for x in proto.graph.node if x.op_type == "Conv"]
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


def _rename_constants(graph: Any) -> None:
    """Append letters to the names of constants: onnxruntime copies a bias that several convolutions
    share by appending a number to its name, and "cat_1" with 0 may be the name of another value."""
    names = {x.name: f"{x.name}_constant" for x in graph.initializer}
    for constant in graph.initializer:
        constant.name = names[constant.name]
    for node in graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
