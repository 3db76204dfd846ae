"""The report of a run, or of two side by side, as one html page without outside addresses."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .charts import Line, line_chart
from .curves import training_curves
from .figures import METRICS, lost_objects
from .galleries import Run, suspects, worst
from .template import write

# Classes of a confusion matrix, if it has more; confused pairs.
MATRIX, PAIRS = 20, 10
# Positives of an object in training: from the first to the second.
POSITIVES = {
    "0": (0, 0),
    "1 to 3": (1, 3),
    "4 to 8": (4, 8),
    "9 to 15": (9, 15),
    "16 and more": (16, math.inf),
}
MEANINGS = {
    "Cls": "at an object (IoU from 0.5), but of another class",
    "Loc": "of the right class, but misplaced (IoU from 0.1 to 0.5)",
    "Both": "misplaced and of another class",
    "Dupe": "a further detection of an object that has one",
    "Bkg": "where nothing is labelled",
    "Miss": "objects that no Cls or Loc is at",
    "FalsePos": "all wrong detections",
    "FalseNeg": "all objects without a right detection",
}
PACKAGES = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools")

Row = dict[str, Any]


def write_page(
    runs: Sequence[Run], target: Path, difference: Mapping[str, Any] | None = None
) -> None:
    """Write the page of one run, or of two.

    Args:
        difference: of two runs, from :func:`~atss.analysis.figures.compare`.

    Raises:
        OSError: if ``target`` cannot be written.
    """
    shown = [show(run) for run in runs]
    sections = shown[0]["sections"]
    if difference:
        tops = [(f"r{i}-top", run.name) for i, run in enumerate(runs, start=1)]
        sections = [("comparison", "Both runs"), *tops]
    names = " and ".join(run.name for run in runs)
    data = runs[0].figures["data"]
    write(
        "report.html",
        target,
        title=f"Report: {names}",
        subtitle=(
            f"{data['images']:,} images, {data['objects']:,} objects, {len(runs[0].results.names)} "
            "classes."
        ),
        messages=messages(runs[0]),
        comparison=comparison(runs, difference) if difference else None,
        runs=shown,
        sections=sections,
    )


def messages(run: Run) -> list[str]:
    """Return sentences on what leaves the page empty."""
    found, data = [], run.figures["data"]
    if not data["objects"]:
        found.append("The annotations have no objects, so there is no AP.")
    if not data["detections"]:
        found.append("There are no detections.")
    return found


def show(run: Run) -> Row:
    """Return the values that the template shows of a run."""
    figures = run.figures
    galleries = [g for g in (worst(run), suspects(run)) if g["pictures"]]
    curves, config = [], ""
    if run.folder is not None:
        metrics, config_file = run.folder / "metrics.json", run.folder / "config.yaml"
        curves = training_curves(metrics) if metrics.is_file() else []
        config = config_file.read_text() if config_file.is_file() else ""
    sections = [
        *([("training", "Training")] if curves else []),
        ("classes", "Classes"),
        ("curves", "Precision and recall"),
        ("errors", "Errors"),
        ("confusion", "Confusion"),
        ("missed", "Missed objects"),
        *((g["anchor"], g["title"]) for g in galleries),
        ("about", "Run and data"),
    ]
    return {
        "name": run.name,
        "tiles": [(name, figures.get(name)) for name in METRICS],
        "curves": curves,
        "classes": classes(figures),
        "precision": precision(figures),
        "errors_note": errors_note(figures),
        "errors": errors(figures),
        "confusion": confusion(figures["confusion"]),
        "missed": missed(run),
        "galleries": galleries,
        "about": about(run),
        "config": config,
        "sections": [(f"r1-{anchor}", title) for anchor, title in sections],
    }


def classes(figures: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, entry in figures["per_class"].items():
        best = figures["thresholds"][name] or {}
        shares = {key: _percent(best.get(key)) for key in ("f1", "precision", "recall")}
        rows.append({"name": name, **entry, "threshold": best.get("score"), **shares})
    return rows


def precision(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return captions and charts: precision over recall, and calibration."""
    recall = (np.arange(101)).tolist()
    lines: dict[str, Line] = {}
    points = {}
    for name, curve in figures["curves"].items():
        if curve is None:
            continue
        values = 100 * np.array(curve["precision50"])
        reached = int(np.flatnonzero(values).max(initial=0)) + 1  # it is 0 beyond the last recall
        lines[name] = recall[:reached], values[:reached].tolist()
        if best := figures["thresholds"][name]:
            points[name] = 100 * best["recall"], 100 * best["precision"]
    charts = []
    if lines:
        charts.append(
            (
                "Precision over recall at IoU 0.5 by class; dots: the thresholds of the table",
                line_chart(lines, "recall", "precision", (0, 100), (0, 101), points=points),
            )
        )
    if calibration := figures["calibration"]:
        bins = [x for x in calibration["bins"] if x["count"]]
        shown = {
            "detections": ([x["avg_confidence"] for x in bins], [x["avg_accuracy"] for x in bins]),
            "equal": ([0, 1], [0, 1]),
        }
        axes = ("score (mean of ten bins)", "share of right detections")
        charts.append(
            (
                f"Calibration at IoU 0.5; the expected error is {calibration['ece']:.3f}",
                line_chart(shown, *axes, (0, 1), (0, 1), bold="detections"),
            )
        )
    return charts


def errors_note(figures: Mapping[str, Any]) -> str:
    base, ap50 = figures["errors"]["base_ap50"], figures["AP50"]
    note = (
        "Kinds of errors as TIDE defines them, and the AP50 that mending one kind alone would "
        "gain; gains do not add up."
    )
    if base is None:
        return f"{note} Nothing can be computed without objects and detections."
    same = ap50 is not None and abs(base - ap50) < 0.05
    reason = (
        f"They start from TIDE's own AP50 of {base:.1f}. It takes at most "
        f"{figures['data']['max_detections']} detections of an image over all classes and counts "
        "a class with detections but no objects as 0"
    )
    return f"{note} {reason}{'.' if same else f'; AP50 by COCO is {_text(ap50)}.'}"


def errors(figures: Mapping[str, Any]) -> list[Row]:
    found = figures["errors"]
    gains = {**found["dap"], **found["dap_special"]}
    most = max((x for x in gains.values() if x is not None), default=0) or 1
    return [
        {
            "kind": kind,
            "count": found["counts"].get(kind),
            "dap": gain,
            "share": 100 * max(gain or 0, 0) / most,
            "meaning": MEANINGS[kind],
        }
        for kind, gain in gains.items()
    ]


def confusion(found: Mapping[str, Any]) -> Row:
    """Return the matrix, of the most confused classes if they are many, and the worst pairs."""
    names, matrix = found["names"], np.array(found["matrix"])
    count = len(names) - 1
    off = matrix[:count, :count] * ~np.eye(count, dtype=bool)
    pairs = [
        {"true": names[i], "predicted": names[j], "count": int(off[i, j])}
        for i, j in zip(*np.unravel_index(np.argsort(-off, axis=None), off.shape), strict=True)
    ][:PAIRS]
    chosen = np.arange(count)
    note = (
        f"Detections of a score from {found['score']:g}, matched at an IoU from {found['iou']:g}, "
        "first within classes, as AP does. Rows are true classes, columns detected ones, cells "
        "shares of the row, with the count under the pointer. Last column: missed objects. Last "
        "row: the number of detections where nothing is labelled."
    )
    if count > MATRIX:
        weight = off.sum(axis=0) + off.sum(axis=1)
        chosen = np.sort(np.argsort(-weight, kind="stable")[:MATRIX])
        note += f" Of {count} classes, the {MATRIX} that are confused most."
    index = [*chosen.tolist(), count]
    rows = []
    for i in index if matrix.any() else ():
        total = matrix[i].sum()
        cells = []
        for j in index:
            # The background has no total of which a share could be taken.
            share = float(matrix[i, j] / total) if i < count and total else None
            text = ("<1%" if share < 0.005 else f"{share:.0%}") if share else ""
            if i == count and j < count:
                text = str(matrix[i, j])
            cell = {"name": names[j], "count": int(matrix[i, j]), "share": share, "text": text}
            cells.append({**cell, "right": i == j})
        rows.append({"name": names[i], "cells": cells})
    return {
        "names": [names[j] for j in index],
        "rows": rows,
        "note": note,
        "pairs": [x for x in pairs if x["count"]],
    }


def missed(run: Run) -> Row:
    """Return shares of objects without a right detection."""
    found = run.figures["missed"]
    tables = [
        _table("size (COCO's)", found["by_size"]),
        _table("IoU with another object", found["by_crowding"]),
    ]
    note = "Objects without a right detection at IoU 0.5, at the threshold of their class (above)."
    if run.positives is not None:
        lost = lost_objects(run.results, run.limits)
        rows = {}
        for label, (low, high) in POSITIVES.items():
            inside = (run.positives >= low) & (run.positives <= high) & ~run.results.crowd
            rows[label] = {"objects": int(inside.sum()), "lost": int((inside & lost).sum())}
        tables.append(_table("positives in training", rows))
        note += " Positives: the anchors that the rule would give the object in training."
    return {"note": note, "tables": tables}


def _table(name: str, groups: Mapping[str, Row]) -> Row:
    rows = [
        {
            "label": label,
            "objects": row["objects"],
            "missed": row["lost"],
            "share": 100 * row["lost"] / row["objects"],
        }
        for label, row in groups.items()
        if row["objects"]
    ]
    return {"name": name, "rows": rows}


def comparison(runs: Sequence[Run], found: Mapping[str, Any]) -> Row:
    """Return the rows of the table of two runs; differences without objects are None."""
    undefined = dict.fromkeys(("difference", "low", "high"))
    rows = [
        {
            "name": name,
            "values": [run.figures.get(name) for run in runs],
            **found["metrics"].get(name, undefined),
        }
        for name in METRICS
    ]
    for name, difference in found["per_class"].items():
        values = [run.figures["per_class"][name]["AP"] for run in runs]
        row = {"name": f"AP, {name}", "values": values, "difference": difference}
        rows.append({**undefined, **row})
    return {"samples": found["samples"], "rows": rows}


def about(run: Run) -> list[tuple[str, str]]:
    data = run.figures["data"]
    facts = {key: f"{value:,}" for key, value in data.items()}
    versions = {name: _version(name) for name in PACKAGES}
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return [*run.about.items(), *facts.items(), ("versions", f"atss {__version__}, {listed}")]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
