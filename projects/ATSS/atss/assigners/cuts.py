"""Functions of version 0.2, for rules that were written with them. They go with version 0.4.0."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..anchors import Anchors
from ..deprecated import renamed
from ..structures import GroundTruth
from .conflicts import assign_best
from .matching import select_cheapest
from .sim_ota import dynamic_k

_PAGE = "the method select, as docs/own_assigner.md shows, with"
__getattr__ = renamed(
    __name__,
    Cheapest=f"{__name__}._cheapest {_PAGE} atss.assigners.matching.select_cheapest",
    DynamicK=f"{__name__}._dynamic_k {_PAGE} atss.assigners.sim_ota.dynamic_k",
)


def _cheapest(k: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda pairs, cost: select_cheapest(pairs, cost, k)


def _dynamic_k(top_k: int) -> Callable[[Any, Tensor], Tensor]:
    def select(pairs: Any, cost: Tensor) -> Tensor:
        return select_cheapest(pairs, cost, dynamic_k(pairs.highest_overlaps(top_k)), top_k)

    return select


def _resolve(anchors: Anchors, gt: GroundTruth, index: Tensor, affinity: Tensor) -> Tensor:
    return assign_best(gt, index, affinity.double(), len(anchors.boxes))


def _overlap(pairs: Any) -> Tensor:
    return pairs.overlap
