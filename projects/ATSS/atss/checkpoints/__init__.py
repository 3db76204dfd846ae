"""Published weights: read without executing anything, renamed, converted, checked."""

from .convert import ConversionError, config_for, convert, load, mmdet_config, to_mmdet

__all__ = ["ConversionError", "config_for", "convert", "load", "mmdet_config", "to_mmdet"]
