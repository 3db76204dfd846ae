"""Checkpoints: loaded without execution, written atomically, converted."""

from ..weights import WeightsError
from .checkpointer import SafeCheckpointer, TrainingCheckpointer
from .convert import SOURCES, config_for, convert, convert_file, load
from .detectors import DETECTORS, ConversionError
from .mmdet import convert_file_to_mmdet, mmdet_config, to_mmdet

__all__ = [
    "DETECTORS",
    "SOURCES",
    "ConversionError",
    "SafeCheckpointer",
    "TrainingCheckpointer",
    "WeightsError",
    "config_for",
    "convert",
    "convert_file",
    "convert_file_to_mmdet",
    "load",
    "mmdet_config",
    "to_mmdet",
]
