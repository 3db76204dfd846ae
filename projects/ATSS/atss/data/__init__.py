"""Images and annotations: loading them by position, and what can be wrong with them."""

from .datasets import register
from .loader import TrainLoader, build_train_loader
from .mapper import Mapper

__all__ = ["Mapper", "TrainLoader", "build_train_loader", "register"]
