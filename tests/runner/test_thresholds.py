"""Thresholds of classes from a report."""

import json
import logging

import numpy as np
import pytest

from atss_runner import FileError
from atss_runner.thresholds import class_thresholds, per_class


@pytest.fixture
def report(tmp_path):
    def report(content):
        text = content if isinstance(content, str) else json.dumps({"thresholds": content})
        (tmp_path / "report.json").write_text(text)
        return tmp_path / "report.json"

    return report


def test_classes_are_matched_by_name(report, caplog):
    """Null and missing classes have none; an unknown one is named in a sentence."""
    file = report({"bee": {"score": 0.7, "f1": 0.9}, "ant": {"score": 0}, "cat": None, "dog": None})
    names = ["ant", "bee", "cat", "eel"]
    assert class_thresholds(file, names) == [0, 0.7, None, None]
    (record,) = caplog.records
    sentence = f"{file} has classes that the detector does not have: dog"
    assert (record.levelno, record.getMessage()) == (logging.WARNING, sentence)
    assert per_class([0, 0.7, None], 0.4).tolist() == np.float32([0, 0.7, 0.4]).tolist()


def test_thresholds_may_be_a_dictionary(caplog):
    assert class_thresholds({"bee": 0.5}, ["ant", "bee"]) == [None, 0.5]
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"dog": {"score": 0.5}}, "has thresholds of dog, the detector has ant, bee"),
        ({}, "has thresholds of no class, the detector has ant, bee"),
        (dict.fromkeys("uvwxyz"), "has thresholds of u, v, w and 3 more, the detector has"),
        ("{", "is not valid json: Expecting"),
        ("[1]", "has no 'thresholds': pass a file of tools/report.py --json"),
        ('{"thresholds": 0.5}', "has no 'thresholds'"),
        ({"ant": {"score": 40}}, "the score of 'ant' must be between 0 and 1, got 40"),
        ({"ant": {"score": "0.5"}}, "the score of 'ant' must be between 0 and 1, got '0.5'"),
        ({"ant": {"score": float("nan")}}, "the score of 'ant' must be between 0 and 1, got nan"),
        ({"ant": True}, "the score of 'ant' must be between 0 and 1, got True"),
    ],
)
def test_unusable_thresholds_end_in_a_sentence(report, content, sentence):
    with pytest.raises(FileError, match=f"^.*report.json:? {sentence}"):
        class_thresholds(report(content), ["ant", "bee"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"^cannot read the thresholds .*x.json: No such file"):
        class_thresholds(tmp_path / "x.json", ["ant"])
