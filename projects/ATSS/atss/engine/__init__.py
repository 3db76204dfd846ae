"""Training and evaluation: what Detectron2's own engine does not do."""

from .trainer import Trainer

__all__ = ["Trainer"]
