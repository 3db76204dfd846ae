"""Depthwise convolutions whose gradients are fast on CPUs.

In bfloat16, oneDNN (of torch 2.14) takes up to 100 times as long for the gradient of a 5 x 5 kernel
as for that of a 3 x 3 kernel, and with a stride up to 50 times as long for the gradient of the
input. These were half of the time of a training step of EfficientNet-Lite0.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .foreach import autocast_dtype, is_traced

Pair: TypeAlias = tuple[int, int]

# Rows and columns of the largest kernel with a fast gradient.
FAST = 3


def speed_up_gradients(net: nn.Module) -> None:
    """Give the depthwise convolutions of a network, in place, faster gradients in bfloat16 on
    CPUs."""
    for conv in net.modules():
        if (
            isinstance(conv, nn.Conv2d)
            and 1 < conv.groups == conv.in_channels == conv.out_channels
            and conv.dilation == (1, 1)
            and not isinstance(conv.padding, str)
            and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
            and (max(conv.kernel_size) > FAST or max(conv.stride) > 1)
        ):
            conv.forward = partial(_forward, conv)  # type: ignore[method-assign]


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    forward = partial(type(conv).forward, conv)
    if x.device.type != "cpu" or is_traced() or not torch.is_grad_enabled():
        return forward(x)
    # Subclasses pad the input in their own way, so the function that they call is replaced.
    with _Replaced():
        return forward(x)


class _Replaced(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        function = _convolve if func is F.conv2d else func
        return function(*args, **(kwargs or {}))


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    is_bfloat16 = all((autocast_dtype(x) or x.dtype) == torch.bfloat16 for x in tensors)
    is_depthwise = input.ndim == 4 and groups == len(weight) and _pair(dilation) == (1, 1)
    if not (is_bfloat16 and is_depthwise):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    cast = (x if x is None else x.to(torch.bfloat16) for x in (input, weight, bias))
    return Depthwise.apply(*cast, stride, padding)


class Depthwise(Function):
    """A depthwise convolution: ``Depthwise.apply(x, weight, bias, stride, padding)``, (N, C, H, W)
    and (C, 1, h, w), as ``F.conv2d``. The padding is less than the kernel. It has no second
    derivatives."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = _pair(stride), _pair(padding)
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            _of_input(gradient, x, weight, *ctx.geometry) if of_x else None,
            _of_weight(gradient, x, weight, *ctx.geometry) if of_weight else None,
            gradient.sum(dim=(0, 2, 3)) if of_bias else None,
            None,
            None,
        )


def _of_input(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient of the input: with a stride, a convolution of the output's gradient with
    zeros in between and the mirrored kernel."""
    if max(stride) == 1:
        return _backward(gradient, x, weight, stride, padding, (True, False, False))[0]
    (n, c, *size), kernel = x.shape, weight.shape[2:]
    height, width = (side + k - 1 for side, k in zip(size, kernel, strict=True))
    spread = gradient.new_zeros(n, height, width, c).permute(0, 3, 1, 2)
    rows, columns = (
        slice(first := k - 1 - p, first + s * (length - 1) + 1, s)
        for k, p, s, length in zip(kernel, padding, stride, gradient.shape[2:], strict=True)
    )
    spread[:, :, rows, columns] = gradient
    return F.conv2d(spread, weight.flip(2, 3), groups=c)


def _of_weight(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient of the kernel, from those of parts of at most FAST x FAST, for each of
    which the input begins at another place."""
    if max(weight.shape[2:]) <= FAST:
        return _backward(gradient, x, weight, stride, padding, (False, True, False))[1]
    found = torch.empty_like(weight)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    (top, left), (down, right) = padding, stride
    x = F.pad(x, (left, left, top, top))
    rows, columns = (gradient.shape[2] - 1) * down, (gradient.shape[3] - 1) * right
    for (i, h), (j, w) in product(*map(_parts, weight.shape[2:])):
        seen = x[:, :, i : i + rows + h, j : j + columns + w]
        seen = seen.contiguous(memory_format=torch.channels_last)
        part = weight[:, :, i : i + h, j : j + w].contiguous()
        of_part = _backward(gradient, seen, part, stride, (0, 0), (False, True, False))[1]
        found[:, :, i : i + h, j : j + w] = of_part
    return found


def _parts(length: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of at most FAST that cover a side of a kernel; the last may overlap the
    one before."""
    size = min(length, FAST)
    for start in range(0, length, size):
        yield min(start, length - size), size


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, of: tuple
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and bias by torch; None where ``of`` is False."""
    backward = torch.ops.aten.convolution_backward
    geometry = (stride, padding, (1, 1), False, (0, 0), len(weight))
    return backward(gradient, x, weight, None, *geometry, of)


def _pair(value: Any) -> Pair:
    return value if isinstance(value, tuple) else (value, value)
