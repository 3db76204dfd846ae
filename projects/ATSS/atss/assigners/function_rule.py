"""Rules of version 0.2, whose steps are functions, until version 0.4.0."""

from collections.abc import Callable
from typing import Any

from ..deprecated import warn


class FunctionRule:
    """Constructor ``Matching(cost=..., cut=...)``: a rule of functions, on lists.

    Args:
        cost, cut, functions: the methods ``cost``, ``select``, ``candidates``, ``rank`` and
            ``score``, and the attributes ``together`` and ``similarity``.
    """

    def __init__(self, *, cost: Callable, cut: Callable, **functions: Any):
        instead = "the methods cost, select, rank and score, as docs/own_assigner.md shows"
        warn("Matching(cost=..., cut=...)", instead)
        if functions.pop("farther", None) or functions.pop("takes_part", None):
            raise TypeError(
                "Matching no longer takes farther and takes_part: write the methods fallbacks and "
                "num_wanted, and the attribute eligible_radius"
            )
        allowed = {"candidates", "rank", "score", "together", "similarity"}
        if not functions.keys() <= allowed:
            raise TypeError(f"Matching takes cost, cut, {sorted(allowed)}, got {sorted(functions)}")
        defaults = {"rank": None, "score": None, "lists_only": True}
        self.__dict__.update(defaults | functions, cost=cost, select=cut)
