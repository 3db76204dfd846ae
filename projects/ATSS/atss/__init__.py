"""ATSS (arXiv 1912.02424) and related detectors on Detectron2. The import registers all parts."""

import warnings
from typing import TYPE_CHECKING, Any

try:
    import detectron2
except ImportError as error:
    raise ImportError(
        "atss needs Detectron2, which is not installed. The official source: pip install "
        "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'. "
        "Or the build that `make env` of this project installs (requirements-detectron2.txt)."
    ) from error

with warnings.catch_warnings():
    # Detectron2 compiles losses with torch.jit.script at import, which torch deprecates.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    import detectron2.modeling  # noqa: F401

from . import assigners, model_zoo
from .anchors import GridAnchorGenerator
from .config import add_atss_config, load_config
from .modeling import ATSSDetector
from .structures import (
    BACKGROUND,
    IGNORE,
    Anchors,
    Assignment,
    GroundTruth,
    HeadOutput,
    Predictions,
)

if TYPE_CHECKING:
    from .cli import train
    from .predictor import Predictor

__version__ = "0.3.0"
__all__ = [
    "BACKGROUND",
    "IGNORE",
    "ATSSDetector",
    "Anchors",
    "Assignment",
    "GridAnchorGenerator",
    "GroundTruth",
    "HeadOutput",
    "Predictions",
    "Predictor",
    "add_atss_config",
    "assigners",
    "load_config",
    "model_zoo",
    "train",
]


def __getattr__(name: str) -> Any:
    # Training and prediction import Detectron2's engine, which nothing else needs.
    if name == "train":
        from .cli import train

        return train
    if name == "Predictor":
        from .predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
