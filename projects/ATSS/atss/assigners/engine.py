"""Which engine holds candidate pairs: lists on CPUs, tables on GPUs.

A list holds the few pairs that can matter, so a CPU computes 3 to 9 times less; but finding them
takes hundreds of operators, and the host must know their number. A table holds an object and all
anchors of its image: more arithmetic, in few operators whose shapes the host knows, so a GPU never
waits for the host, nor the host for the GPU. Both assign every anchor alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..parts import one_of, within

ENGINES = ("auto", "lists", "tables")


@dataclass
class _Settings:
    name: str = "auto"
    # Pairs of a table: bounds memory at some 500 MiB. An object has R of them at least.
    limit: int = 1 << 23


_settings = _Settings()


def uses_tables(device: torch.device) -> bool:
    """Whether rules on this device hold pairs in tables."""
    return _settings.name == "tables" or (_settings.name == "auto" and device.type == "cuda")


def table_limit() -> int:
    """The number of pairs of a table at most, but for a table of one object."""
    return _settings.limit


@contextmanager
def use_engine(name: str, limit: int = _Settings.limit) -> Iterator[None]:
    """Choose the engine of all rules of this process, until the context ends.

    Args:
        name: "lists", "tables", or "auto": tables on GPUs, lists elsewhere.
        limit: pairs of a table at most; larger batches are cut into pieces of objects.
    """
    one_of("name", name, ENGINES)
    within("limit", limit, 1)
    before = _settings.name, _settings.limit
    _settings.name, _settings.limit = name, limit
    try:
        yield
    finally:
        _settings.name, _settings.limit = before
