"""Export of a trained detector to files that run without torch."""

from .files import (
    Parity,
    Raw,
    compare,
    export_onnx,
    export_openvino,
    export_program,
    metadata,
)
from .formats import parts, remove
from .padding import static_padding
from .precision import convert_precision

__all__ = [
    "Parity",
    "Raw",
    "compare",
    "convert_precision",
    "export_onnx",
    "export_openvino",
    "export_program",
    "metadata",
    "parts",
    "remove",
    "static_padding",
]
