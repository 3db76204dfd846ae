"""The engines of candidate pairs: lists on CPUs, tables on GPUs.

A list holds only the pairs that can be selected, so a CPU computes 3 to 9 times less; but their
search takes hundreds of operators, and the host must know their number. A table holds objects with
all anchors of their images: few operators, of shapes that the host knows, so it never waits. Both
assign every anchor alike, unless costs agree to the last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..errors import check_choice, check_range

ENGINES = ("auto", "lists", "tables")
# Most pairs of a table of several objects, 234 in images of 800 x 1344 px. They take some 580 MiB.
LIMIT = 5 << 20
_chosen: ContextVar[tuple[str, int]] = ContextVar("engine", default=("auto", LIMIT))


def uses_tables(device: torch.device) -> bool:
    """Return whether rules on this device hold pairs in tables."""
    name, _ = _chosen.get()
    return name == "tables" or (name == "auto" and device.type == "cuda")


def table_limit() -> int:
    """Return the largest number of pairs of a table of several objects."""
    return _chosen.get()[1]


@contextmanager
def use_engine(name: str, limit: int = LIMIT) -> Iterator[None]:
    """Choose the engine of the rules that this thread calls within the context.

    Args:
        name: "lists", "tables", or "auto": tables on GPUs, lists elsewhere.
        limit: most pairs of a table. Larger batches are split, except by rules that need all
            objects at once.
    """
    check_choice("name", name, ENGINES)
    check_range("limit", limit, 1)
    token = _chosen.set((name, limit))
    try:
        yield
    finally:
        _chosen.reset(token)
