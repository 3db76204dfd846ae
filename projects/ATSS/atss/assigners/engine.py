"""Which engine holds candidate pairs: lists on CPUs, tables on GPUs.

A list holds the few pairs that can matter, so a CPU computes 3 to 9 times less; but finding them
takes hundreds of operators, and the host must know their number. A table holds an object and all
anchors of its image: more arithmetic, in few operators whose shapes the host knows, so a GPU never
waits for the host, nor the host for the GPU. Both assign every anchor alike, unless
costs agree to the last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..errors import check_choice, check_range

ENGINES = ("auto", "lists", "tables")
# Most pairs of a table, which take some 580 MiB: 234 objects of 800 x 1344 pixels. A table of one
# object is never cut.
LIMIT = 5 << 20
_chosen: ContextVar[tuple[str, int]] = ContextVar("engine", default=("auto", LIMIT))


def uses_tables(device: torch.device) -> bool:
    """Whether rules on this device hold pairs in tables."""
    name, _ = _chosen.get()
    return name == "tables" or (name == "auto" and device.type == "cuda")


def table_limit() -> int:
    """The highest number of pairs of a table, unless it holds one object."""
    return _chosen.get()[1]


@contextmanager
def use_engine(name: str, limit: int = LIMIT) -> Iterator[None]:
    """Choose the engine of the rules that this thread calls, until the context ends.

    Args:
        name: "lists", "tables", or "auto": tables on GPUs, lists elsewhere.
        limit: most pairs of a table; larger batches are cut into pieces of objects, except by rules
            that need all objects at once.
    """
    check_choice("name", name, ENGINES)
    check_range("limit", limit, 1)
    token = _chosen.set((name, limit))
    try:
        yield
    finally:
        _chosen.reset(token)
