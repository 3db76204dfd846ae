"""Results as strict json: null in place of NaN and infinity."""

import json
import math
import os
from collections import defaultdict
from typing import Any

from detectron2.utils.events import JSONWriter, get_event_storage


def strict(value: Any) -> Any:
    """Copy dictionaries, lists and numbers; those that are not finite become None."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_scalars(window: int, last: int) -> dict[int, dict[str, float]]:
    """Return {iteration: {name: value}} of the scalars after iteration ``last``: a median over
    ``window`` iterations, if Detectron2 smooths the scalar."""
    new: dict[int, dict[str, float]] = defaultdict(dict)
    latest = get_event_storage().latest_with_smoothing_hint(window)
    for name, (value, iteration) in latest.items():
        if iteration > last:
            new[iteration][name] = value
    return new


class StrictJSONWriter(JSONWriter):
    """JSONWriter without NaN, such as the AP of a class without objects."""

    _last_write: int

    def write(self) -> None:
        new = new_scalars(self._window_size, self._last_write)
        self._last_write = max([self._last_write, *new])
        for iteration, values in new.items():
            line = strict({**values, "iteration": iteration})
            self._file_handle.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
        self._file_handle.flush()
        os.fsync(self._file_handle.fileno())
