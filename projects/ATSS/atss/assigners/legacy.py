"""Rules of version 0.2, whose steps are functions, until version 0.4.0. Functions import the engine
when called, because it imports this module."""

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
    """Call a similarity's ``max_distance``, or ``reach``, its name in version 0.2."""
    if hasattr(similarity, "max_distance"):
        return similarity.max_distance(least)
    warn(f"{type(similarity).__name__}.reach", "the name max_distance")
    return similarity.reach(least)
