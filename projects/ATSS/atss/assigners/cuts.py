"""Functions of version 0.2, for rules that were written with them. They go with version 0.4.0."""

from functools import partial

from ..deprecated import renamed
from .conflicts import assign_best
from .matching import select_cheapest
from .sim_ota import dynamic_k

_METHOD = "the method select, as docs/own_assigner.md shows, with"
__getattr__ = renamed(
    __name__,
    Cheapest=f"{__name__}._cheapest {_METHOD} atss.assigners.matching.select_cheapest",
    DynamicK=f"{__name__}._dynamic_k {_METHOD} atss.assigners.sim_ota.dynamic_k",
)


def _cheapest(k):
    return partial(select_cheapest, k=k)


def _dynamic_k(top_k):
    return partial(_select_dynamic, top_k=top_k)


def _select_dynamic(pairs, cost, top_k):
    return select_cheapest(pairs, cost, dynamic_k(pairs.highest_overlaps(top_k)), top_k)


def _overlap(pairs):
    return pairs.overlap


def _resolve(anchors, gt, index, affinity):
    return assign_best(gt, index, affinity.double(), len(anchors.boxes))
