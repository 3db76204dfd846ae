"""Metadata of exported files, complete, damaged, and of newer versions."""

import json

import pytest
from exported import SETTINGS

from atss_runner import FileError
from atss_runner.settings import CHOICES, DEFAULTS, FIELDS, read_settings


def test_complete_settings_are_read():
    assert read_settings("model.onnx", {"atss": json.dumps(SETTINGS)}) == SETTINGS
    assert {*FIELDS, *CHOICES, *DEFAULTS, "schema"} == {*SETTINGS}
    older = {key: value for key, value in SETTINGS.items() if key not in DEFAULTS}
    assert read_settings("model.onnx", {"atss": json.dumps(older)}) == SETTINGS
    settings = SETTINGS | {"thresholds": [0.5, None]}
    assert read_settings("model.onnx", {"atss": json.dumps(settings)}) == settings


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "null", '"schema"', "{}", '{"schema": []}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(FileError, match=r"^m.onnx has damaged metadata 'atss': no JSON with a sch"):
        read_settings("m.onnx", {"atss": text})


@pytest.mark.parametrize("name", sorted({*FIELDS, *CHOICES} - {*DEFAULTS}))
def test_each_missing_field_is_named(name):
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    with pytest.raises(FileError, match=f"^m.onnx .*{name}"):
        read_settings("m.onnx", {"atss": json.dumps(settings)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 3}, "has metadata of schema 3, this runner reads up to 2: install a newer"),
        ({"tiles": [480]}, r"has damaged metadata 'atss': tiles is \[480\]"),
        ({"input_format": "planes"}, "has damaged metadata 'atss': highest is missing"),
        ({"strides": "8"}, "has damaged metadata 'atss': strides is '8'"),
        ({"divisor": None}, "has damaged metadata 'atss': divisor is None"),
        ({"input_format": "L"}, "needs the input_format 'L', this runner has BGR, RGB"),
        ({"score": "sum"}, "needs the score 'sum', this runner has product, sqrt"),
        ({"suppression": {"name": "soft"}}, "needs the suppression 'soft', this runner has none,"),
        ({"suppression": {}}, "needs the suppression None"),
        ({"thresholds": [0.5]}, r"has damaged metadata 'atss': thresholds is \[0.5\]"),
        ({"thresholds": [0.5, 2]}, r"has damaged metadata 'atss': thresholds is \[0.5, 2\]"),
        ({"thresholds": {"ant": 1}}, "has damaged metadata 'atss': thresholds is {'ant': 1}"),
    ],
)
def test_unknown_values_are_refused(change, sentence):
    with pytest.raises(FileError, match=f"^m.onnx {sentence}"):
        read_settings("m.onnx", {"atss": json.dumps(SETTINGS | change)})
