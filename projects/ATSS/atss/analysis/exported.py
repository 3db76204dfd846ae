"""AP of an exported file, by Detectron2's evaluator."""

import tempfile
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from atss_runner import load

from ..config import add_atss_config
from ..data import datasets
from ..engine.evaluation import build_evaluator
from ..errors import UserError

NAME = "exported_file"


def evaluate(file: Path, source: str) -> dict[str, float]:
    """Evaluate an exported file on labelled images.

    Args:
        source: labels.json:images, data.yaml:split or folder:split.

    Returns:
        AP, AP50 and so on, in percent.

    Raises:
        UserError: if the data have other classes than the file.
    """
    detector = load(file)
    name = datasets.register(f"{NAME}={source}")
    try:
        classes = MetadataCatalog.get(name).thing_classes
        if set(detector.names) != set(classes):
            raise UserError(f"{source} has the classes {classes}, the file {detector.names}")
        datasets.follow(name, detector.names)
        cfg = get_cfg()
        add_atss_config(cfg)
        with tempfile.TemporaryDirectory() as folder:
            cfg.OUTPUT_DIR = folder
            cfg.TEST.DETECTIONS_PER_IMAGE = detector.max_detections
            evaluator = build_evaluator(cfg, name)
            evaluator.reset()
            for record in DatasetCatalog.get(name):
                found = detector(record["file_name"])
                instances = Instances((record["height"], record["width"]))
                instances.pred_boxes = Boxes(torch.from_numpy(found.boxes))
                instances.scores = torch.from_numpy(found.scores)
                instances.pred_classes = torch.from_numpy(found.classes)
                evaluator.process([record], [{"instances": instances}])
            return evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
