"""The values of the config that weights were trained with, in their checkpoint."""

from collections.abc import Mapping
from typing import Any

from ..weights import WeightsError

ENTRY = "trained_with"


def refuse_others(stored: Any, values: Mapping[str, Any], path: str) -> None:
    """Compare the values of a checkpoint with those of the config.

    Args:
        stored: ENTRY of the checkpoint, None for older ones.
        values: from :func:`~atss.config.inputs.values_in`; empty if there is no config.

    Raises:
        WeightsError: if they differ.
    """
    stored = stored if isinstance(stored, Mapping) else {}
    differ = [x for x in values if stored.get(x, values[x]) != values[x]]
    if differ:
        theirs = ", ".join(f"{key} {stored[key]}" for key in differ)
        ours = ", ".join(f"{values[key]}" for key in differ)
        raise WeightsError(
            f"the weights {path} were trained with {theirs}, the config has {ours}: set these "
            "keys, or name the config that was written beside the weights first in _BASE_"
        )
