"""Curves of a training: losses, learning rate and AP over iterations, from metrics.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from .charts import Line, line_chart

# Losses by their short names; the others lose their prefix.
LOSSES = {"loss_cls": "class", "loss_box_reg": "box"}


# Suffixes of metrics by task.
TASKS = {"bbox": "", "bbox_EMA": ", averaged weights"}


def training_curves(metrics_file: Path) -> list[tuple[str, str]]:
    """Return captions and charts (svg) of a training; none of a file without iterations."""
    series = read_series(metrics_file)
    losses, scores = loss_curves(series), {}
    for key, line in series.items():
        data, _, task = key.rpartition("/")[0].rpartition("/")
        metric = key.rpartition("/")[2]
        if task in TASKS and metric in ("AP", "AP50"):
            scores[f"{f'{data}: ' if data else ''}{metric}{TASKS[task]}"] = line
    charts = []
    if losses:
        chart = line_chart(losses, "iteration", "loss", (0, None), (0, None))
        charts.append(("Losses, medians of 20 iterations", chart))
    if scores:
        chart = line_chart(scores, "iteration", "AP", (0, None), (0, 100), markers=True)
        charts.append(("AP on the test images", chart))
    if "lr" in series:
        chart = line_chart({"rate": series["lr"]}, "iteration", "rate", (0, None), (0, None))
        charts.append(("Learning rate", chart))
    return charts


def loss_curves(series: Mapping[str, Line]) -> dict[str, Line]:
    """Return the losses of :func:`read_series` by their short names."""
    return {
        LOSSES.get(key, key.replace("loss_", "")): series[key]
        for key in sorted(series, key=len)
        if key.rpartition("/")[2].startswith("loss_")
    }


def read_series(metrics_file: Path) -> dict[str, Line]:
    """Return the finite values of each metric over iterations. A resumed run writes some iterations
    twice: the last line counts. An incomplete last line is left out."""
    points: dict[str, dict[int, float]] = {}
    for line in metrics_file.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, {})[record["iteration"]] = value
    return {
        key: (sorted(values), [values[i] for i in sorted(values)]) for key, values in points.items()
    }
