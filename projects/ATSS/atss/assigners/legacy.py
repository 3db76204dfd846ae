"""Rules of version 0.2, whose steps are functions. They go with version 0.4.0.

The frame imports this module, so the functions import the frame when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..anchors import Anchors
from ..deprecated import warn
from ..structures import GroundTruth
from .conflicts import assign_best


class FunctionRule:
    """Constructor ``Matching(cost=..., cut=...)``: a rule of functions, on lists.

    Args:
        cost, cut, functions: the methods ``cost``, ``select``, ``candidates``, ``rank`` and
            ``score`` of today, and the attributes ``together`` and ``similarity``.
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


def Cheapest(k: int) -> Callable:
    from .matching import select_cheapest

    return partial(select_cheapest, k=k)


def DynamicK(top_k: int) -> Callable:
    return partial(_select_dynamic, top_k=top_k)


def _select_dynamic(pairs: Any, cost: Tensor, top_k: int) -> Tensor:
    from .matching import select_cheapest
    from .sim_ota import dynamic_k

    return select_cheapest(pairs, cost, dynamic_k(pairs.highest_similarities(top_k)), top_k)


def overlap(pairs: Any) -> Tensor:
    return pairs.similarity


def resolve(anchors: Anchors, gt: GroundTruth, index: Tensor, affinity: Tensor) -> Tensor:
    return assign_best(gt, index, affinity.double(), len(anchors.boxes))


def max_distance(similarity: Any, least: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``max_distance`` of a similarity, or ``reach``, as version 0.2 named it."""
    if hasattr(similarity, "max_distance"):
        return similarity.max_distance(least)
    warn(f"{type(similarity).__name__}.reach", "the name max_distance")
    return similarity.reach(least)
