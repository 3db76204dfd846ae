"""A picture of the anchors that several rules assign on one image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from atss_runner.images import resized

from ..config import build_sampling, input_size, load_config, with_rule
from ..data.images import read_image
from ..errors import UserError, check_range
from ..geometry import centres
from ..predictor import Predictor
from ..structures import GroundTruth
from .explain import explain
from .plots import plot_assignments


def draw_assignment(
    dataset: str,
    image: str,
    rules: Sequence[str],
    config: str,
    target: Path,
    weights: str = "",
    opts: Sequence[Any] = (),
    objects: Sequence[int] = (),
) -> None:
    """Draw the positives of rules on an image of a registered data set.

    Args:
        rules: names, with arguments as in "ATSS TOP_K=3".
        image: its file name, or the end of its path.
        config: file or name; sets the anchors and the size of the image.
        weights: of a detector with this config, for rules that need predictions.
        objects: numbers of those to draw, in the order of the labels, from 0; empty for all.

    Raises:
        UserError: for an unknown image, rule or object, an image without objects, or missing
            weights.
    """
    record = find_record(dataset, image)
    cfg = load_config(config, opts=opts)
    samplings = {name: build_sampling(with_rule(cfg, name)) for name in rules}
    pixels = read_image(record["file_name"])
    height, width = resized(*pixels.shape[:2], *input_size(cfg))
    zoom = np.array([width / pixels.shape[1], height / pixels.shape[0]])
    gt = _ground_truth(record, zoom)
    if not len(gt):
        raise UserError(f"{record['file_name']} has no objects: rules assign anchors to them")
    if objects:
        check_range("objects", [*objects], 0, len(gt) - 1)
    needing = [n for n, s in samplings.items() if getattr(s.assigner, "looks_at_predictions", 0)]
    if needing and not weights:
        raise UserError(
            f"{needing[0]} needs predictions: pass weights= (--weights) of a trained detector, and "
            "config= (--config-file), its config"
        )
    predictions = Predictor(cfg, weights).at_anchors(record["file_name"]) if needing else None
    divisor = max(s.divisibility for s in samplings.values())
    canvas = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
    anchors = samplings[rules[0]].anchors(canvas)
    found = {n: explain(s.assigner, anchors, gt, predictions) for n, s in samplings.items()}
    plot_assignments(
        cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA),
        gt.boxes.numpy(),
        centres(anchors.boxes).numpy(),
        anchors.stride.numpy(),
        found,
        target,
        objects,
    )


def find_record(dataset: str, image: str) -> dict:
    """Find an image by the end of its path.

    Raises:
        UserError: if no image, or more than one, has this end, or the data set is not registered.
    """
    if dataset not in DatasetCatalog:
        raise UserError(
            f"unknown data set {dataset!r}: register it first, as in "
            "atss.data.datasets.register('mine=data.yaml:train'), and pass its name 'mine'"
        )
    wanted = Path(image).parts
    records = [
        x
        for x in DatasetCatalog.get(dataset)
        if Path(x["file_name"]).parts[-len(wanted) :] == wanted
    ]
    if len(records) != 1:
        count = f"{len(records)} images" if records else "no image"
        raise UserError(f"{dataset} has {count} called {image}")
    return records[0]


def _ground_truth(record: dict, zoom: np.ndarray) -> GroundTruth:
    objects = [x for x in record["annotations"] if not x.get("iscrowd")]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    scaled = np.array(boxes, dtype=np.float64).reshape(-1, 4) * np.tile(zoom, 2)
    classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.long)
    index = torch.zeros(len(objects), dtype=torch.long)
    return GroundTruth(torch.from_numpy(scaled), classes, index, 1)
