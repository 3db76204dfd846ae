"""Operators on lists of tensors, in place of one operator for each tensor.

A training step of two images on a GPU lasts as long as the launch of its operators; autograd and
autocast launch one for each parameter.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# On CPUs a launch costs nothing, and one operator for each tensor finds its input in the cache:
# with lists a step of R-50 on two images of 128 x 128 pixels takes 1.05 to 1.2 of the time.
ONE_BY_ONE = {"cpu"}


def is_traced() -> bool:
    """Return whether operators are compiled, which fuses them, or traced, without lists."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_grouped(device: torch.device) -> bool:
    """Return whether this device uses operators on lists of tensors."""
    return device.type not in ONE_BY_ONE and not is_traced()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts ``x``, or None."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """Cast tensors, unless the dtype is None."""
    if dtype is None:
        return tensors
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


class ScaleAll(Function):
    """Products of parameters and constants, in the dtype of autocast:
    ``ScaleAll.apply(constants, *parameters)``.

    Constants are no saved tensors: activation checkpointing compares their number, which differs if
    a block is computed again in another group.
    """

    @staticmethod
    def forward(ctx: Any, constants: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        products: Sequence[Tensor] = torch._foreach_mul(list(parameters), constants)
        products = cast_all(products, autocast_dtype(products[0]))
        trained = ctx.needs_input_grad[1:]
        frozen = (x for x, is_trained in zip(products, trained, strict=True) if not is_trained)
        ctx.mark_non_differentiable(*frozen)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(x, y) for x, y in zip(gradients, ctx.constants, strict=True) if x is not None]
        # The product of bfloat16 and float32 is float32.
        products = iter(torch._foreach_mul(*map(list, zip(*pairs, strict=True))) if pairs else ())
        return None, *(None if x is None else next(products) for x in gradients)


class RepeatAll(Function):
    """Aliases of parameters, whose gradients are added for all parameters at once.

    ``RepeatAll.apply(times, dtypes, *parameters)`` returns the first aliases of all parameters,
    cast to dtypes (None: not cast), then the second, and so on. Gradients are added from the last
    alias to the first, in the dtype of the alias, like those of a parameter with several uses.
    """

    @staticmethod
    def forward(
        ctx: Any, times: int, dtypes: Sequence[torch.dtype | None], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = [x.dtype for x in parameters]
        ctx.set_materialize_grads(False)
        cast = list(parameters)
        for dtype, indices in _indices_by_key(dtypes).items():
            for i, x in zip(indices, cast_all([cast[i] for i in indices], dtype), strict=True):
                cast[i] = x
        return tuple(x.detach() for _ in range(times) for x in cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.dtypes)
        # The gradients of each parameter, from its last alias to its first.
        chains = [[x for x in gradients[i::count][::-1] if x is not None] for i in range(count)]
        keys = [(len(x), x[0].dtype, ctx.dtypes[i]) if x else None for i, x in enumerate(chains)]
        result: list[Tensor | None] = [None] * count
        for key, indices in _indices_by_key(keys).items():
            if key is None:
                continue
            total, *others = zip(*(chains[i] for i in indices), strict=True)
            if others:
                total = torch._foreach_add(total, others[0])
            for other in others[1:]:
                torch._foreach_add_(total, other)
            _, alias_dtype, dtype = key
            cast = cast_all(total, None if alias_dtype == dtype else dtype)
            for i, x in zip(indices, cast, strict=True):
                result[i] = x
        return None, None, *result


def _indices_by_key(keys: Sequence[Any]) -> dict[Any, list[int]]:
    indices = defaultdict(list)
    for i, key in enumerate(keys):
        indices[key].append(i)
    return indices
