"""Names of older versions. Each works until 0.4.0, with a warning that names what replaces it."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that names have left.

    Args:
        names: old name -> "module.name" of what it returns; after a blank what to write instead, if
            that is something else.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target, _, instead = names[name].partition(" ")
        warn(f"{module}.{name}", instead or target)
        place, _, new = target.rpartition(".")
        return getattr(importlib.import_module(place), new)

    return find


def warn(name: str, instead: str) -> None:
    """Warn about a name. The warning shows the line that calls the caller."""
    message = f"{name} is deprecated and goes with version 0.4.0: use {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
