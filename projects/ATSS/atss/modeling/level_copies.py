"""Layers that all levels of a pyramid share, as copies with aliases of their parameters."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .foreach import RepeatAll, autocast_dtype, is_grouped

M = TypeVar("M", bound=nn.Module)


class PerLevel(nn.ModuleList):
    """A module for each level, in place of one that the levels share."""


def for_levels(
    num_levels: int, *modules: M, precise: Collection[nn.Module] = ()
) -> Sequence[tuple[M, ...]]:
    """Return the modules once for each level, as copies whose parameters are aliases.

    Autograd adds the gradients that five levels give to a parameter one at a time: 144 operators
    in a step of ATSS, and a step of two images on a GPU takes as long as the host needs to launch
    its operators. The gradients of aliases arrive together, and four operators add those of all
    parameters in the same order. Until then all of them are held: five times the parameters.
    Autocast casts a parameter once for all levels, but an alias for each; so the parameters of
    convolutions and linear layers are cast here.

    Copies live for one forward pass, and have the buffers and hooks of the modules. The modules
    themselves are returned if no gradient is computed, on CPUs, and to compilers.

    Args:
        num_levels: L.
        modules: a level uses each of their parameters at most once; otherwise the order in which
            gradients are added changes.
        precise: convolutions and linear layers among them, or in them, that are called outside of
            autocast.

    Returns:
        L tuples of as many modules.
    """
    dtypes: dict[Tensor, torch.dtype | None] = {}
    if num_levels > 1 and torch.is_grad_enabled():
        for module in modules:
            _collect(module, precise, dtypes)
    if not dtypes:
        return [modules] * num_levels
    aliases = iter(RepeatAll.apply(num_levels, [*dtypes.values()], *dtypes))
    levels = [dict(zip(dtypes, aliases, strict=False)) for _ in range(num_levels)]
    return [tuple(replace(module, own) for module in modules) for own in levels]


def _collect(
    module: nn.Module, precise: Collection[nn.Module], dtypes: dict[Tensor, torch.dtype | None]
) -> None:
    """Add each shared parameter that is trained, and the precision to which it is cast or None."""
    is_cast = isinstance(module, nn.Conv2d | nn.Linear) and module not in precise
    for x in module._parameters.values():
        if x is not None and x.requires_grad and is_grouped(x.device):
            dtypes[x] = autocast_dtype(x) if is_cast else None
    for child in module.children():
        if not isinstance(child, PerLevel):
            _collect(child, precise, dtypes)


def replace(module: M, tensors: Mapping[Tensor, Tensor]) -> M:
    """Return a copy of the module with other tensors in place of some of its parameters, as torch's
    DataParallel makes its replicas; the module itself if it has none of these."""
    parameters = module._parameters.items()
    own: Any = {k: tensors[x] for k, x in parameters if x is not None and x in tensors}
    children = {k: x and replace(x, tensors) for k, x in module._modules.items()}
    if not own and all(x is module._modules[k] for k, x in children.items()):
        return module
    copy = module.__new__(type(module))
    changed = {"_parameters": {**module._parameters, **own}, "_modules": children}
    copy.__dict__ = module.__dict__ | changed
    return copy
