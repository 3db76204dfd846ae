"""Modules that run without torch and Detectron2, with NumPy and OpenCV only."""

__all__ = ["media"]
