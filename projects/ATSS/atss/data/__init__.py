"""Data sets registered from labels, and batches of a training."""

from .datasets import register
from .loader import TrainLoader, build_train_loader
from .mapper import Mapper

__all__ = ["Mapper", "TrainLoader", "build_train_loader", "register"]
