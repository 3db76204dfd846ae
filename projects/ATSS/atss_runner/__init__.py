"""What runs without torch and Detectron2: exported detectors, images, films."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector import Detector, FileError, load
    from .postprocess import Detections

__all__ = ["Detections", "Detector", "FileError", "load"]


def __getattr__(name: str) -> Any:
    # Pillow and an engine are needed by exported detectors alone, not by media.py.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import detector, postprocess

    return getattr(postprocess if name == "Detections" else detector, name)
