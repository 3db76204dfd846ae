"""One operator for many small tensors, in place of one for each that autograd and autocast launch.

A training step of two images on a GPU takes as long as the host needs to launch its operators.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# A CPU launches nothing, and fresh results are still in its caches: a step of R-50 on
# two images of 128 x 128 pixels takes 1.05 to 1.2 of the time if weights and gradients must wait.
ONE_BY_ONE = {"cpu"}


def is_traced() -> bool:
    """Whether a compiler or tracer records the operators: compilers fuse them, and what is exported
    knows no lists of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_grouped(device: torch.device) -> bool:
    """Whether operators on many tensors at once are faster on this device."""
    return device.type not in ONE_BY_ONE and not is_traced()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the precision to which autocast casts ``x``, None if it leaves it as it is."""
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """Return the tensors in another precision; None: as they are."""
    if dtype is None:
        return tensors
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


class ScaleAll(Function):
    """Products of tensors with constants, in the precision of autocast.

    ``ScaleAll.apply(constants, *tensors)`` takes as many constants as tensors, of as many
    dimensions. The constants are not saved by ``save_for_backward``: activation checkpointing
    compares the number of saved tensors, and groups differ if a block is computed again.
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
    """Aliases of tensors, whose gradients are added for all tensors at once.

    ``RepeatAll.apply(times, dtypes, *tensors)`` returns ``times`` aliases of P tensors, cast to P
    dtypes (None: not cast): the first aliases of all tensors, then the second, and so on. Gradients
    are added from the last alias to the first, in the dtype of the alias, as autograd adds those of
    a tensor that is used in this order.
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
    """Return the positions of each key."""
    places = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    return places
