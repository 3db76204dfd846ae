"""Detections beside the ground truth."""

from collections.abc import Sequence

import numpy as np

from ..data.images import read_image
from ..deprecated import renamed_names
from ..predictor import Predictor

__getattr__ = renamed_names(__name__)


def beside_truth(
    predictor: Predictor, records: Sequence[dict], threshold: float
) -> tuple[list[np.ndarray], list[list], list[list]]:
    images = [read_image(record["file_name"]) for record in records]
    truth, predicted = [], []
    for record, detections in zip(records, predictor(images), strict=True):
        objects = [(a["bbox"], str(a["category_id"])) for a in record["annotations"]]
        truth.append([((x, y, x + w, y + h), text) for (x, y, w, h), text in objects])
        best = zip(*detections.above(threshold), strict=True)
        predicted.append([(box, f"{k} {score:.2f}") for box, score, k in best])
    return images, truth, predicted
