"""Conversion of torch.export's program to ONNX and OpenVINO."""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .selection import onnx_translations, openvino_extension

# Write a file with the outputs and the metadata of the settings.
Save = Callable[[Path, Mapping[str, Any]], None]
# DeformConv needs 19.
OPSET = 20


def to_onnx(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Save:
    """Convert a program to ONNX.

    Args:
        inputs, outputs: names. A saved file has as many of the outputs as its settings name.
    """
    import onnx

    written: Any = torch.onnx.export(
        program,
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        input_names=list(inputs),
        output_names=list(outputs),
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    proto = written.model_proto
    _clear_paths(proto)

    def save(path: Path, settings: Mapping[str, Any]) -> None:
        del proto.graph.output[len(settings["outputs"]) :]
        del proto.metadata_props[:]
        entry = proto.metadata_props.add()
        entry.key, entry.value = "atss", json.dumps(settings)
        onnx.save(proto, str(path))

    return save


def to_openvino(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Save:
    """Convert a program to OpenVINO, as :func:`to_onnx`. OpenVINO's reader of ONNX has no
    deformable convolution."""
    import openvino

    model = openvino.convert_model(program, extension=[openvino_extension()])
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})

    def save(path: Path, settings: Mapping[str, Any]) -> None:
        for result in model.get_results()[len(settings["outputs"]) :]:
            model.remove_result(result)
        model.set_rt_info(json.dumps(settings), "atss")
        openvino.save_model(model, str(path), compress_to_fp16=False)

    return save


def require(package: str) -> Any:
    """Import a package of an extra.

    Raises:
        UserError: if it is missing.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = "openvino" if package == "openvino" else "export"
        raise UserError(
            f"export needs {package}: pip install 'atss-detectron2[{extra}]'"
        ) from error


def parts(file: Path) -> list[Path]:
    """Return the file, and the file of the weights beside OpenVINO's .xml."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def hidden(file: Path, purpose: str) -> Path:
    """Return the name of a temporary file in the folder of a file, of the same suffix."""
    return file.with_name(f".{file.stem}.{purpose}{file.suffix}")


def move(source: Path, target: Path) -> None:
    """Replace a file by another, with its weights."""
    for old, new in zip(parts(source), parts(target), strict=True):
        os.replace(old, new)


def remove(file: Path) -> None:
    """Delete a file, if it exists, with its weights."""
    for part in parts(file):
        part.unlink(missing_ok=True)


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
