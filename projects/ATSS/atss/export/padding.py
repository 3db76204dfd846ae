"""Padding of timm's "same" convolutions, made constant for export."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import functional as F


@contextmanager
def static_padding(model: nn.Module) -> Iterator[None]:
    """Replace the padding of timm's "same" convolutions, which depends on the size, by the one that
    sides which the stride divides get."""
    try:
        from timm.layers import Conv2dSame
    except ImportError:
        yield
        return
    replaced: list[Any] = [x for x in model.modules() if isinstance(x, Conv2dSame)]
    before = [vars(conv).pop("forward", None) for conv in replaced]
    for conv in replaced:
        sides: list[int] = []
        for kernel, stride, dilation in zip(
            *(reversed(x) for x in (conv.kernel_size, conv.stride, conv.dilation)), strict=True
        ):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            sides += [total // 2, total - total // 2]
        conv.forward = _padded(conv, sides)
    try:
        yield
    finally:
        for conv, forward in zip(replaced, before, strict=True):
            del conv.forward
            if forward is not None:
                conv.forward = forward


def _padded(conv: Any, sides: Sequence[int]) -> Any:
    geometry = (conv.stride, 0, conv.dilation, conv.groups)
    return lambda x: F.conv2d(F.pad(x, sides), conv.weight, conv.bias, *geometry)
