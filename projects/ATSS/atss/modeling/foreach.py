"""One operator for many small tensors, where autograd and autocast start one for each.

A training step of two images on a GPU takes as long as the host needs to launch its operators: what
counts is how many there are, not what they work on.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def is_traced() -> bool:
    """Whether a compiler or tracer reads the operators, which then are better written one by one:
    a compiler fuses them, and exported files have no lists."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision to which autocast casts tensors such as ``x``, or None if it leaves them."""
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The tensors in another precision; None: as they are."""
    if dtype is None:
        return tensors
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


class ScaleAll(Function):
    """Tensors, each multiplied by a constant, in the precision of autocast.

    ``ScaleAll.apply(constants, *tensors)`` with L of both. Constants are not kept as saved tensors,
    because checkpointing compares these between passes that may make groups of other sizes.
    """

    @staticmethod
    def forward(ctx: Any, constants: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        products: Sequence[Tensor] = torch._foreach_mul(list(tensors), constants)
        products = cast_all(products, autocast_dtype(products[0]))
        learned = ctx.needs_input_grad[1:]
        frozen = (x for x, needed in zip(products, learned, strict=True) if not needed)
        ctx.mark_non_differentiable(*frozen)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(x, y) for x, y in zip(gradients, ctx.constants, strict=True) if x is not None]
        # Of bfloat16 and float32 the product is float32.
        products = iter(torch._foreach_mul(*map(list, zip(*pairs, strict=True))) if pairs else ())
        return None, *(None if x is None else next(products) for x in gradients)


class RepeatAll(Function):
    """Each tensor several times, whose gradients are added for all tensors at once.

    ``RepeatAll.apply(times, dtypes, *tensors)`` with P dtypes or None and P tensors returns
    ``times`` * P tensors, first all of the first time. Gradients are added from the last time to
    the first, in the precision in which they come: as autograd would add those of a tensor that is
    used in this order.
    """

    @staticmethod
    def forward(
        ctx: Any, times: int, dtypes: Sequence[torch.dtype | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.set_materialize_grads(False)
        cast = list(tensors)
        for dtype, places in _grouped(dtypes).items():
            for i, x in zip(places, cast_all([tensors[i] for i in places], dtype), strict=True):
                cast[i] = x
        return tuple(x.detach() for _ in range(times) for x in cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        size = len(ctx.dtypes)
        chains = [[x for x in gradients[i::size][::-1] if x is not None] for i in range(size)]
        kinds = [(len(x), x[0].dtype, ctx.dtypes[i]) if x else None for i, x in enumerate(chains)]
        result: list[Tensor | None] = [None] * size
        for kind, places in _grouped(kinds).items():
            if kind is None:
                continue
            total, *others = zip(*(chains[i] for i in places), strict=True)
            if others:
                total = torch._foreach_add(total, others[0])
            for other in others[1:]:
                torch._foreach_add_(total, other)
            _, low, dtype = kind
            for i, x in zip(places, cast_all(total, None if low == dtype else dtype), strict=True):
                result[i] = x
        return None, None, *result


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Where each key stands."""
    places = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    return places
