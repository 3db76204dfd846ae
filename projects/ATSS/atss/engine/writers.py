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


class StrictJSONWriter(JSONWriter):
    """JSONWriter without NaN, such as the AP of a class without objects."""

    _last_write: int

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                new[iteration][name] = value
        self._last_write = max([self._last_write, *new])
        for iteration, values in new.items():
            line = strict({**values, "iteration": iteration})
            self._file_handle.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
        self._file_handle.flush()
        os.fsync(self._file_handle.fileno())
