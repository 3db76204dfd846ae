"""Functions of version 0.2, until version 0.4.0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..anchors import Anchors
from ..structures import GroundTruth
from .conflicts import assign_best
from .matching import select_cheapest
from .sim_ota import dynamic_k


def Cheapest(k: int) -> Callable:
    return partial(select_cheapest, k=k)


def DynamicK(top_k: int) -> Callable:
    return partial(_select_dynamic, top_k=top_k)


def _select_dynamic(pairs: Any, cost: Tensor, top_k: int) -> Tensor:
    return select_cheapest(pairs, cost, dynamic_k(pairs.highest_similarities(top_k)), top_k)


def overlap(pairs: Any) -> Tensor:
    return pairs.similarity


def resolve(anchors: Anchors, gt: GroundTruth, index: Tensor, affinity: Tensor) -> Tensor:
    return assign_best(gt, index, affinity.double(), len(anchors.boxes))
