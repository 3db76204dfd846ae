"""Records of the pairs that a rule compares, for pictures of its choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Most pairs of one record; of a larger one, only those that the rule chooses are kept.
LIMIT = 1 << 18


@dataclass
class Trace:
    """Pairs and values of objects that a call of a rule records.

    Attributes:
        rule: other rules, which it calls, record nothing.
        pairs: records of (M,) "owner", "index", bool "chosen" and values. A chosen pair is positive
            unless another object gets the anchor.
        objects: records of (g,) "ids" and values.
    """

    rule: Any
    pairs: list[dict[str, Tensor]] = field(default_factory=list)
    objects: list[dict[str, Tensor]] = field(default_factory=list)
    num_columns: int = 0


_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)


@contextmanager
def trace_rule(rule: Any) -> Iterator[Trace]:
    """Record the pairs of a rule that this thread calls within the context, on CPUs."""
    trace = Trace(rule)
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


def active_trace(rule: Any = None) -> Trace | None:
    """Return the trace of a rule, by default of any; None if there is none."""
    if torch.compiler.is_compiling():
        return None
    trace = _trace.get()
    return trace if trace is not None and (rule is None or trace.rule is rule) else None


def record_pairs(
    trace: Trace, owner: Tensor, index: Tensor, chosen: Tensor, possible: Tensor, **values: Tensor
) -> None:
    """Record the possible ones of (...) pairs, with (...) values."""
    if possible.sum() > LIMIT:
        possible = possible & chosen
    pairs = {"owner": owner, "index": index, "chosen": chosen, **values}
    trace.pairs.append({k: x.expand(possible.shape)[possible] for k, x in pairs.items()})


def record_columns(
    trace: Trace, index: Tensor, chosen: Tensor, possible: Tensor, **values: Tensor
) -> Tensor:
    """Record the (C, g) candidates of the next g objects, whose (g,) indices are returned."""
    ids = trace.num_columns + torch.arange(index.shape[1], device=index.device)
    trace.num_columns += len(ids)
    record_pairs(trace, ids, index, chosen, possible, **values)
    return ids
