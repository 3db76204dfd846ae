"""Detection with an exported file, without torch and Detectron2."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detections import Detections
    from .detector import Detector, load
    from .media import FileError

__version__ = "0.3.0"  # that of atss
__all__ = ["Detections", "Detector", "FileError", "load"]

# Imported when the name is asked for: media.py needs OpenCV, detector.py Pillow.
_MODULES = {
    "Detections": "detections",
    "Detector": "detector",
    "FileError": "media",
    "load": "detector",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
