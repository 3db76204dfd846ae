"""Modules that need neither torch nor Detectron2."""

__all__ = ["media"]
