"""Detections of one image: filtered, drawn, and as COCO records."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from .media import draw_boxes


class Detections(NamedTuple):
    """Detections on one image, highest score first.

    Attributes:
        boxes: (M, 4) float32 (x1, y1, x2, y2) in pixels of the image.
        scores: (M,) float32.
        classes: (M,) int64, indices into the detector's names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def above(self, threshold: float | np.ndarray) -> "Detections":
        """Return the detections with at least this score, or with that of their class (K,)."""
        least = threshold[self.classes] if isinstance(threshold, np.ndarray) else threshold
        return self.take(self.scores >= least)

    def take(self, index: "np.ndarray | slice") -> "Detections":
        """Return the detections of an index or a mask."""
        return Detections(*(x[index] for x in self))


def draw_detections(
    image: np.ndarray, found: Detections, names: Sequence[str], least_side: int = 0
) -> np.ndarray:
    """Return a copy of a BGR image with boxes, class names and scores.

    Args:
        least_side: of the copy, in pixels: an image whose longer side is shorter is enlarged.
    """
    scale = max(least_side / max(image.shape[:2]), 1.0)
    if scale > 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    labels = [
        f"{names[k] if names else k} {score:.2f}"
        for k, score in zip(found.classes, found.scores, strict=True)
    ]
    return draw_boxes(image, found.boxes * scale, found.classes, labels)


def explain_none(highest: float, threshold: float | np.ndarray, option: str) -> str:
    """Return a message for images on which no detection is drawn.

    Args:
        highest: score of all detections; 0 if there is none.
        threshold: of all classes, or (K,) of each.
        option: that sets the threshold.
    """
    if not highest:
        return (
            "No score is above MODEL.ATSS.SCORE_THRESH_TEST: the detector is of other data, or its "
            "training was too short (docs/troubleshooting.md)"
        )
    # Rounded down: a threshold equal to the printed score draws it.
    shown = math.floor(highest * 1000) / 1000
    if isinstance(threshold, np.ndarray):
        return (
            f"The highest score is {shown:.3f}, below the threshold of its class: pass a lower "
            f"{option} instead of thresholds by class"
        )
    return f"The highest score is {shown:.3f}: pass a lower {option} than {threshold:g}"


def as_records(
    detections: Detections, ids: Sequence[int], names: Sequence[str], **fields: object
) -> list:
    """Return detections in COCO's format of results (``COCO.loadRes``).

    Args:
        ids: of the classes in the training data; if empty, classes count from 1.
        names: of the classes; may be empty.
        fields: further fields of each record.
    """
    return [
        {
            **fields,
            "category_id": ids[k] if len(ids) else int(k) + 1,
            **({"category_name": names[k]} if len(names) else {}),
            "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 4),
        }
        for (x1, y1, x2, y2), score, k in zip(*detections, strict=True)
    ]
