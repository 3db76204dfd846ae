"""Classes have names: the rows of a class layer follow these, not their places."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..weights import WeightsError

logger = logging.getLogger(__name__)

# In a checkpoint, beside the weights; an empty list where they are not known.
KEY = "class_names"


def names_in(checkpoint: Mapping[str, Any], path: str | Path) -> list[str]:
    """The names of the classes that a checkpoint knows; [] where it does not say.

    Raises:
        WeightsError: where they are no names.
    """
    names = checkpoint.get(KEY, [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{path} has {KEY} that are no list of names")
    return list(names)


def equal_names(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """{place in ours: place in theirs} of the classes that both have.

    Names that differ in case, in blanks around them, or in blanks, "_" and "-" within are equal,
    unless there is one that is spelled alike. Of a name that stands several times, the first is the
    first there, and so on.
    """
    places: dict[int, int] = {}
    for spelling in (str, _loosely):
        free = defaultdict(list)
        for i, name in enumerate(theirs):
            if i not in places.values():
                free[spelling(name)].append(i)
        for i, name in enumerate(ours):
            if i not in places and free[spelling(name)]:
                places[i] = free[spelling(name)].pop(0)
    return places


def _loosely(name: str) -> str:
    return name.strip().casefold().translate(str.maketrans("_-", "  "))


def class_tensors(model: nn.Module) -> dict[str, int]:
    """{name of a tensor in the state dict: A} of the layers that have rows of classes, as heads say
    in their attribute ``class_layers``: {name of a layer: A}. A row is that of anchor a and class k
    where its number is a * K + k."""
    found = {}
    for path, module in model.named_modules():
        for layer, num_anchors in getattr(module, "class_layers", {}).items():
            for name in module.get_submodule(layer).state_dict():
                found[f"{path}.{layer}.{name}".removeprefix(".")] = num_anchors
    return found


def warn_of_others(theirs: Sequence[str], ours: Sequence[str], path: str) -> None:
    """Says where as many classes are not the same ones: nothing else would show it."""
    places = equal_names(theirs, ours)
    others = [i for i in range(len(ours)) if places.get(i) != i]
    if len(theirs) == len(ours) and others:
        first = others[0]
        logger.warning(
            "Class %d is %r to the weights %s, but %r here (%d of %d differ): what is found of it "
            "is called by the wrong name",
            *(first, theirs[first], path, ours[first], len(others), len(ours)),
        )


def take_rows(
    weights: dict[str, Any], theirs: Sequence[str], model: nn.Module, ours: Sequence[str]
) -> None:
    """Makes the class layers of weights, in place, those of a model with other classes: they keep
    the rows of classes that both have, and the other rows are as the model has them. The log says
    which classes these are.

    Where either does not name its classes, nothing is changed. Where the layers have not a row for
    each anchor and name, or rows of another size, they are taken out.

    Args:
        weights: a state dict.
        theirs, ours: names of the classes, of the weights and of the model.
    """
    state = model.state_dict()
    layers = {name: count for name, count in class_tensors(model).items() if name in weights}
    if not layers:
        return
    if not (theirs and ours):
        wrong = [name for name in layers if weights[name].shape != state[name].shape]
        said = f"{'This run does' if theirs else 'The weights do'} not name classes"
        if wrong:
            _say_anew(said, wrong[0], weights)
        else:
            logger.warning("%s: the class layer is taken over as it is, row by row", said)
        return

    rows = {name: state[name].clone() for name in layers}
    wrong = []
    for name, num_anchors in layers.items():
        shape = (num_anchors * len(theirs), *rows[name].shape[1:])
        if weights[name].shape != shape or len(rows[name]) != num_anchors * len(ours):
            wrong.append(name)
    if wrong:
        _say_anew(f"The weights name {len(theirs)} classes", wrong[0], weights)
        for name in layers:
            del weights[name]
        return
    places = equal_names(theirs, ours)
    for name, num_anchors in layers.items():
        known = torch.as_tensor(weights[name]).to(rows[name]).unflatten(0, (num_anchors, -1))
        by_anchor = rows[name].unflatten(0, (num_anchors, -1))
        by_anchor[:, list(places)] = known[:, list(places.values())]
    weights.update(rows)
    said = ", ".join(ours[i] for i in sorted(places)) or "none"
    new = ", ".join(name for i, name in enumerate(ours) if i not in places)
    logger.info(
        "Classes known to the weights: %s (%d of %d)%s",
        *(said, len(places), len(ours), f"; new: {new}" if new else ""),
    )


def _say_anew(said: str, name: str, weights: Mapping[str, Any]) -> None:
    logger.warning(
        "%s, and %s is %s, which does not fit: the class layer begins anew",
        *(said, name, tuple(weights[name].shape)),
    )
