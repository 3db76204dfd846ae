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


def recompute_stages(backbone: nn.Module) -> None:
    """Checkpoint, in place, each ``nn.Sequential`` in a backbone that is not itself made of them.
    Single blocks would save little: a bottleneck's input is as large as its other activations.

    Raises:
        UserError: if the backbone has no ``nn.Sequential``.
    """
    stages = [*_stages(backbone)]
    if not stages:
        raise UserError(
            "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING needs a backbone with stages in "
            f"nn.Sequential, but {type(backbone).__name__} has none"
        )
    for stage in stages:
        stage.forward = partial(_forward_stage, stage)  # type: ignore[method-assign]


def _forward_stage(stage: nn.Sequential, x: Any) -> Any:
    forward = partial(type(stage).forward, stage)
    if stage.training and torch.is_grad_enabled():
        return recompute(stage, forward, x)
    return forward(x)


def _stages(module: nn.Module) -> Iterator[nn.Sequential]:
    for child in module.children():
        made_of = [type(x) for x in child.children()]
        if isinstance(child, nn.Sequential) and {*made_of} != {nn.Sequential}:
            yield child
        else:
            yield from _stages(child)


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms in training mode."""
    norms = [x for x in module.modules() if isinstance(x, _BatchNorm) and x.training]
    saved = [(x, x.momentum, x.num_batches_tracked) for x in norms]
    for norm, _, count in saved:
        # Statistics that are written back later would change a tensor that autograd has stored.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in saved:
            norm.momentum, norm.num_batches_tracked = momentum, count
