"""The report of a run: figures as json, and a page."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import build_sampling, input_size, load_config
from ..engine.coco import COCO_LIMIT
from ..errors import UserError
from ..labels.coco import find_in_json
from ..predictor import find_weights
from .figures import compare, figures
from .galleries import Run
from .page import write_page
from .results import Files, Results, find_results, read_annotations, read_detections
from .statistics import looks_at_predictions, measure, predict_with

SCORE = 0.3


def load_run(files: Files, name: str, folder: Path | None = None, score: float = SCORE) -> Run:
    """Read results and compute their figures.

    Args:
        name: in headings.
        folder: of the training, whose curves and config are shown.
        score: least score in the confusion matrix.

    Raises:
        UserError: if a file is malformed.
    """
    content = read_annotations(files.annotations)
    detections, others = read_detections(files.detections, content)
    results = Results(content, detections, files.count_difficult, files.limit)
    about = {"annotations": files.source or files.annotations, "detections": files.detections}
    if results.limit != COCO_LIMIT:
        about["detections of an image and class"] = f"{results.limit} count, COCO counts 100"
    if others:
        about["detections of other images"] = f"{others}, left out"
    positives = None
    if folder is not None:
        positives = positives_of(folder, content, files.image_dir)
        if positives is not None and len(positives) != len(results.crowd):
            positives = None
    return Run(name, results, figures(results, score), files.image_dir, folder, positives, about)


def report_run(folder: str | Path) -> Path:
    """Write report.html and report.json into the folder of a training. Return the page.

    Raises:
        UserError: if it has no results, or hotcoco is missing.
    """
    folder = Path(folder)
    run = load_run(find_results(str(folder)), folder.resolve().name, folder)
    (folder / "report.json").write_text(json.dumps(all_figures([run]), allow_nan=False))
    write_page([run], folder / "report.html")
    return folder / "report.html"


def all_figures(runs: Sequence[Run]) -> dict:
    """Return the figures of one run, or of two with their differences."""
    content = dict(runs[0].figures)
    if len(runs) == 2:
        content["other"] = runs[1].figures
        content["difference"] = compare(runs[0].results, runs[1].results)
    return content


def positives_of(folder: Path, content: dict, image_dir: str) -> np.ndarray | None:
    """Return the positives that the rule of a run gives each object and crowd of the annotations,
    0 for crowds; None if the rule needs predictions and the images or weights are missing."""
    objects = find_in_json(content)[1]
    if objects is None or not objects.used.any():
        return None
    cfg = load_config(folder / "config.yaml")
    sampling, predict = build_sampling(cfg), None
    if looks_at_predictions(sampling.assigner):
        if not image_dir:
            return None
        try:
            predict = predict_with(cfg, str(find_weights(folder)), content, image_dir)
        except UserError:
            return None
    size = input_size(cfg)
    records = measure(content, objects, {"positives": sampling}, size, predict=predict)
    shown = (objects.used | objects.crowd) & (objects.image >= 0) & (objects.category >= 0)
    counts = np.zeros(len(shown), dtype=np.int64)
    counts[objects.used] = [x["positives"] for x in records]
    return counts[shown]
