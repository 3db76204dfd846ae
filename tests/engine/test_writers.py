"""metrics.json is strict json with Detectron2's content."""

import json
import math

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from atss.engine.writers import StrictJSONWriter, strict


def written(kind, path, *steps):
    """Return the lines after each step has put its scalars."""
    writer = kind(str(path))
    with EventStorage() as storage:
        for iteration, scalars in steps:
            storage.iter = iteration
            storage.put_scalars(**scalars, smoothing_hint=False)
            writer.write()
            writer.write()  # nothing new
    writer.close()
    return [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]


def test_numbers_equal_detectron2s(tmp_path):
    steps = [(0, {"lr": 0.1, "loss": 2.0}), (3, {"loss": 1.5}), (7, {"bbox/AP": 40.25})]
    ours = written(StrictJSONWriter, tmp_path / "ours.json", *steps)
    assert ours == written(JSONWriter, tmp_path / "theirs.json", *steps)


def test_nan_and_infinity_are_null(tmp_path):
    """For example the AP of a class without objects."""
    steps = [(4, {"bbox/AP-cat": math.nan, "bbox/AP-dog": 50.0, "loss": math.inf})]
    (line,) = written(StrictJSONWriter, tmp_path / "metrics.json", *steps)
    assert line == {"bbox/AP-cat": None, "bbox/AP-dog": 50.0, "loss": None, "iteration": 4}
    nested = {"a": [1, (math.nan, "NaN", True)], "b": {"c": -math.inf}}
    assert strict(nested) == {"a": [1, [None, "NaN", True]], "b": {"c": None}}
