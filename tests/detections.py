"""Detections made of ground truth, and comparisons of detections."""

import numpy as np
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from atss.engine.evaluation import build_evaluator


def truth_as_detections(name: str, classes: list[str], folder, only: str = "") -> dict:
    """Evaluate perfect detections of a data set.

    Args:
        classes: the model's, in its order.
        only: if not empty, the one class that is detected.

    Returns:
        the evaluator's results.
    """
    names = MetadataCatalog.get(name).thing_classes
    evaluator = build_evaluator(make_cfg("OUTPUT_DIR", str(folder)), name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((record["height"], record["width"]))
        boxes = np.array([x["bbox"] for x in record["annotations"]], dtype=np.float32)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(torch.from_numpy(boxes))
        found.scores = torch.ones(len(boxes))
        labels = [names[x["category_id"]] for x in record["annotations"]]
        found.pred_classes = torch.tensor([classes.index(x) for x in labels], dtype=torch.long)
        if only:
            found = found[[i for i, x in enumerate(labels) if x == only]]
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def compare(boxes, scores, classes, their_boxes, their_scores, their_classes):
    """Compare two sets of detections, in any order: each has one equal in the other set."""
    assert len(boxes) == len(their_boxes)
    free = np.ones(len(boxes), bool)
    for box, score, k in zip(their_boxes, their_scores, their_classes, strict=True):
        near = (np.abs(boxes - box).max(axis=1) <= 0.05) & (np.abs(scores - score) <= 1e-3)
        match = np.flatnonzero(near & (classes == k) & free)
        assert len(match), f"no detection of class {k} at {box}"
        free[match[0]] = False
