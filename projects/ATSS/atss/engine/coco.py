"""COCO's evaluation of boxes, by hotcoco or pycocotools."""

import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval_opt as COCOeval
from pycocotools.coco import COCO

try:
    import hotcoco
except ImportError:  # it is not in install_requires
    hotcoco = None  # type: ignore[assignment]

# Detections of an image and class that COCO counts. A lower limit of the detector has no effect.
COCO_LIMIT = 100
# hotcoco's warning of another limit, which the log names anyway.
warnings.filterwarnings("ignore", "hotcoco: max_dets differ", UserWarning)


def evaluate_boxes(
    dataset: dict,
    detections: list[dict],
    images: list[int] | None = None,
    max_detections: Sequence[int] = (1, 10, 100),
    by_class: bool = True,
) -> Any:
    """Return an accumulated COCO evaluation: by hotcoco if it is installed and no object is
    difficult, which it cannot express, else by pycocotools.

    Args:
        dataset: as from :class:`~atss.labels.numbering.GroundTruth`.
        images: ids of the images to evaluate; None for all.
        max_detections: of a class in an image; AP takes the last.
        by_class: False takes all classes for one.
    """
    difficult = any(x["difficult"] for x in dataset["annotations"])
    logger = logging.getLogger(__name__)
    if hotcoco is None or difficult:
        reason = "the data set has difficult objects" if difficult else "hotcoco is not installed"
        logger.info("Evaluation by pycocotools: %s", reason)
        evaluation = _by_pycocotools(dataset, detections)
    else:
        logger.info("Evaluation by hotcoco, whose results equal those of pycocotools")
        truth = hotcoco.COCO(dataset)
        evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox")
    if images is not None:
        evaluation.params.imgIds = images
    evaluation.params.maxDets = list(max_detections)
    evaluation.params.useCats = int(by_class)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _by_pycocotools(dataset: dict, detections: list[dict]) -> COCOeval:
    truth = COCO()
    truth.dataset = dataset
    with redirect_stdout(StringIO()):
        truth.createIndex()
        return _DifficultIgnored(truth, truth.loadRes(detections), "bbox")


def class_ap(evaluation: Any, threshold: int | slice = slice(None), area: int = 0) -> list[float]:
    """Return the AP of each class in points of 100, NaN without objects.

    Args:
        threshold: index of the IoU, 0 for 0.5; all by default.
        area: index of the sizes: 0 for all, then small, medium and large.
    """
    precision = evaluation.eval["precision"][threshold, ..., area, -1]
    of_classes = precision.reshape(-1, precision.shape[-1])
    has_objects = of_classes.min(axis=0) > -1
    return np.where(has_objects, 100 * of_classes.mean(axis=0), np.nan).tolist()


class _DifficultIgnored(COCOeval):
    """COCO evaluation in which any number of detections may match a difficult object, for any limit
    of detections."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for x in objects:
                if x["difficult"]:
                    x["ignore"], x["iscrowd"] = 1, 0

    def computeIoU(self, imgId: int, catId: int) -> Any:
        overlaps = super().computeIoU(imgId, catId)
        for x in self._gts[imgId, catId]:
            if x["difficult"]:  # pycocotools lets any number of detections match a crowd
                x["iscrowd"] = 1
        return overlaps

    def summarize(self) -> None:
        with redirect_stdout(StringIO()):  # its AP is of 100 detections, and -1 with another limit
            super().summarize()
        precision = self.eval["precision"][..., 0, -1]
        precision = precision[precision > -1]
        self.stats[0] = precision.mean() if len(precision) else -1
