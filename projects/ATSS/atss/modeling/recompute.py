"""Activation checkpointing: the backward pass computes activations again, which are not stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import UserError


def recompute(module: nn.Module, function: Callable, *arguments: Any) -> Any:
    """Call a function of a module, and again in the backward pass, which needs its activations.
    Random numbers are the same, and batch norms update their statistics once."""

    def contexts() -> tuple:
        return nullcontext(), _keep_statistics(module)

    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def recompute_blocks(backbone: nn.Module) -> None:
    """Checkpoint, in place, each module of the outermost ``nn.Sequential`` in a backbone: a block
    of a ResNet's stage, a stage of EfficientNet.

    Raises:
        UserError: if the backbone has no ``nn.Sequential``.
    """
    blocks = [block for stage in _outermost(backbone) for block in stage]
    if not blocks:
        raise UserError(
            "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING needs a backbone with blocks in "
            f"nn.Sequential, but {type(backbone).__name__} has none"
        )
    for block in blocks:
        block.forward = partial(_forward_block, block)


def _forward_block(block: nn.Module, *inputs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if block.training and torch.is_grad_enabled():
        return recompute(block, forward, *inputs)
    return forward(*inputs)


def _outermost(module: nn.Module) -> Iterator[nn.Sequential]:
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield child
        else:
            yield from _outermost(child)


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms in training mode."""
    norms = [x for x in module.modules() if isinstance(x, _BatchNorm) and x.training]
    norms = [x for x in norms if x.track_running_stats]
    momenta = [x.momentum for x in norms]
    counts = [x.num_batches_tracked.clone() for x in norms]
    for norm in norms:
        # Statistics that are written back later would change a tensor that autograd has stored.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
