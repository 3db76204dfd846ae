"""Classes of checkpoints: rows of a class layer are matched by name."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..weights import WeightsError

logger = logging.getLogger(__name__)

# Key of a checkpoint for its class names; an empty list if unknown.
KEY = "class_names"


def names_in(checkpoint: Mapping[str, Any], path: str | Path) -> list[str]:
    """Return the class names of a checkpoint, or [].

    Raises:
        WeightsError: if they are no list of names.
    """
    names = checkpoint.get(KEY, [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{path} has {KEY} that are no list of names")
    return list(names)


def equal_names(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Match two lists of names: {index in ``ours``: index in ``theirs``}.

    Exact spellings match first; then case, outer blanks, and differences between blanks, "_" and
    "-" are ignored. Equal names match in order.
    """
    matches: dict[int, int] = {}
    for spelling in (str, _normalise):
        unmatched = defaultdict(list)
        for i, name in enumerate(theirs):
            if i not in matches.values():
                unmatched[spelling(name)].append(i)
        for i, name in enumerate(ours):
            if i not in matches and unmatched[spelling(name)]:
                matches[i] = unmatched[spelling(name)].pop(0)
    return matches


def _normalise(name: str) -> str:
    return name.strip().casefold().translate(str.maketrans("_-", "  "))


def class_tensors(model: nn.Module) -> dict[str, int]:
    """Return {tensor of the state dict: A} of the layers in heads' ``class_layers``. Row a * K + k
    belongs to anchor a and class k."""
    tensors = {}
    for path, module in model.named_modules():
        for layer, num_anchors in getattr(module, "class_layers", {}).items():
            for name in module.get_submodule(layer).state_dict():
                tensors[f"{path}.{layer}.{name}".removeprefix(".")] = num_anchors
    return tensors


def warn_of_others(theirs: Sequence[str], ours: Sequence[str], path: str) -> None:
    """Warn of weights with as many but other classes, which shapes do not reveal."""
    matches = equal_names(theirs, ours)
    differing = [i for i in range(len(ours)) if matches.get(i) != i]
    if len(theirs) == len(ours) and differing:
        k = differing[0]
        logger.warning(
            f"Class {k} is {theirs[k]!r} in the weights {path}, but {ours[k]!r} in this run "
            f"({len(differing)} of {len(ours)} classes differ): detections get wrong names"
        )


def take_rows(
    weights: dict[str, Any], theirs: Sequence[str], model: nn.Module, ours: Sequence[str]
) -> None:
    """Adapt the class layers of weights, in place, to a model with other classes: rows of common
    classes are kept, other rows are the model's; the log lists both.

    Without names on either side nothing changes. Layers without one row for each anchor and name,
    or with rows of another size, are removed.
    """
    state = model.state_dict()
    layers = {name: count for name, count in class_tensors(model).items() if name in weights}
    if not layers:
        return
    if not (theirs and ours):
        misfits = [name for name in layers if weights[name].shape != state[name].shape]
        reason = f"{'This run has' if theirs else 'The weights have'} no class names"
        if misfits:
            _warn_of_misfit(reason, misfits[0], weights)
        else:
            logger.warning("%s: the class layer is loaded unchanged, row by row", reason)
        return

    rows = {name: state[name].clone() for name in layers}
    misfits = []
    for name, num_anchors in layers.items():
        shape = (num_anchors * len(theirs), *rows[name].shape[1:])
        if weights[name].shape != shape or len(rows[name]) != num_anchors * len(ours):
            misfits.append(name)
    if misfits:
        _warn_of_misfit(f"The weights have {len(theirs)} class names", misfits[0], weights)
        for name in layers:
            del weights[name]
        return
    matches = equal_names(theirs, ours)
    for name, num_anchors in layers.items():
        old = torch.as_tensor(weights[name]).to(rows[name]).unflatten(0, (num_anchors, -1))
        new = rows[name].unflatten(0, (num_anchors, -1))
        new[:, list(matches)] = old[:, list(matches.values())]
    weights.update(rows)
    common = ", ".join(ours[i] for i in sorted(matches)) or "none"
    added = ", ".join(name for i, name in enumerate(ours) if i not in matches)
    suffix = f"; new: {added}" if added else ""
    logger.info(f"Classes in the weights: {common} ({len(matches)} of {len(ours)}){suffix}")


def _warn_of_misfit(reason: str, name: str, weights: Mapping[str, Any]) -> None:
    shape = tuple(weights[name].shape)
    logger.warning(f"{reason}, and {name} is {shape}, which does not fit: its layer stays random")
