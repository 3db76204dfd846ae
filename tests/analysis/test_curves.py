"""Curves of a training from its metrics.json."""

import json

from atss.analysis import curves
from atss.analysis.curves import read_series, training_curves


def write(tmp_path, *records, end=""):
    file = tmp_path / "metrics.json"
    file.write_text("".join(json.dumps(x) + "\n" for x in records) + end)
    return file


def test_last_line_of_an_iteration_counts(tmp_path):
    file = write(
        tmp_path,
        {"iteration": 1, "loss_cls": 3.0},
        {"iteration": 3, "loss_cls": 2.0},
        {"iteration": 1, "loss_cls": 1.0, "bbox/AP": None},
        end='{"iteration": 5, "lo',
    )
    assert read_series(file) == {"iteration": ([1, 3], [1, 3]), "loss_cls": ([1, 3], [1.0, 2.0])}


def test_charts_have_losses_and_averaged_weights(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "line_chart", lambda lines, *a, **b: drawn.append(lines) or "")
    file = write(
        tmp_path,
        {"iteration": 1, "loss_cls": 3.0, "loss_centerness": 1.0, "lr": 0.1},
        {"iteration": 2, "bbox/AP": 30.0, "bbox_EMA/AP": 40.0},
    )
    charts = dict(training_curves(file))
    assert [*charts] == [
        "Losses, medians of 20 iterations",
        "AP on the test images",
        "Learning rate",
    ]
    losses, scores, rate = drawn
    assert losses == {"class": ([1], [3.0]), "centerness": ([1], [1.0])}
    assert scores == {"AP": ([2], [30.0]), "AP, averaged weights": ([2], [40.0])}
    assert rate == {"rate": ([1], [0.1])}


def test_scores_of_several_data_sets_are_apart(tmp_path):
    file = write(tmp_path, {"iteration": 2, "val/bbox/AP": 30.0, "test/bbox_EMA/AP50": 40.0})
    ((_, chart),) = training_curves(file)
    assert ">val: AP<" in chart
    assert ">test: AP50, averaged weights<" in chart


def test_empty_file_has_no_charts(tmp_path):
    assert training_curves(write(tmp_path)) == []
