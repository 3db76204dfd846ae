"""Layers shared by all pyramid levels, as one copy for each level.

Autograd adds the gradients of five levels one at a time: 144 operators in a step of ATSS. Gradients
of the copies' parameters, which are aliases, arrive together, and four operators add them in the
same order (:class:`.foreach.RepeatAll`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .foreach import RepeatAll, autocast_dtype, is_grouped

M = TypeVar("M", bound=nn.Module)


class PerLevel(nn.ModuleList):
    """Modules that levels do not share, one for each."""


def for_levels(
    num_levels: int, *modules: M, precise: Collection[nn.Module] = ()
) -> Sequence[tuple[M, ...]]:
    """Return copies of the modules for each level, with aliases of their parameters.

    Copies live for one forward pass. Gradients of all aliases are kept until the last arrives: five
    times the memory of the parameters. Autocast would cast each alias, so parameters of
    convolutions and linear layers are cast here, once. Without gradients, on CPUs and for compilers
    the modules themselves are returned.

    Args:
        num_levels: L.
        modules: a level may use each of their parameters once, or gradients would be added in
            another order than without copies.
        precise: convolutions and linear layers in ``modules`` that are called without autocast.
    """
    dtypes: dict[Tensor, torch.dtype | None] = {}
    if num_levels > 1 and torch.is_grad_enabled():
        for module in modules:
            _collect(module, precise, dtypes)
    if not dtypes:
        return [modules] * num_levels
    aliases = iter(RepeatAll.apply(num_levels, [*dtypes.values()], *dtypes))
    levels = [dict(zip(dtypes, aliases, strict=False)) for _ in range(num_levels)]
    return [tuple(replace(module, alias) for module in modules) for alias in levels]


def _collect(
    module: nn.Module, precise: Collection[nn.Module], dtypes: dict[Tensor, torch.dtype | None]
) -> None:
    """Add shared trained parameters to ``dtypes``, with the dtype of their aliases or None."""
    is_cast = isinstance(module, nn.Conv2d | nn.Linear) and module not in precise
    for x in module._parameters.values():
        if x is not None and x.requires_grad and is_grouped(x.device):
            dtypes[x] = autocast_dtype(x) if is_cast else None
    for child in module.children():
        if not isinstance(child, PerLevel):
            _collect(child, precise, dtypes)


def replace(module: M, tensors: Mapping[Tensor, Tensor]) -> M:
    """Return a copy of the module with parameters replaced, by {parameter: tensor}, like a replica
    of DataParallel, or the module itself if it has none of them."""
    parameters = module._parameters.items()
    replaced: Any = {k: tensors[x] for k, x in parameters if x is not None and x in tensors}
    children = {k: x and replace(x, tensors) for k, x in module._modules.items()}
    if not replaced and all(x is module._modules[k] for k, x in children.items()):
        return module
    copy = module.__new__(type(module))
    changed = {"_parameters": {**module._parameters, **replaced}, "_modules": children}
    copy.__dict__ = module.__dict__ | changed
    return copy
