"""What runs where torch and Detectron2 are not installed: NumPy and OpenCV are enough."""

__all__ = ["media"]
