"""Checks of single values in COCO's json."""

import numpy as np


def is_empty(text: object) -> bool:
    return not isinstance(text, str) or not text.strip()


def is_length(x: object) -> bool:
    """Return whether a value is a positive whole number, such as 640 or 640.0."""
    return (type(x) is int or type(x) is float) and 0 < x < 2**31 and x == int(x)


def is_segmentation(value: object) -> bool:
    if not value:
        return True
    if isinstance(value, list):
        return any(is_polygon(x) for x in value) and all(isinstance(x, list) for x in value)
    return isinstance(value, dict) and _are_run_lengths(**value)


def is_polygon(value: object) -> bool:
    return isinstance(value, list) and len(value) % 2 == 0 and len(value) >= 6


def _are_run_lengths(counts: object = None, size: object = None, **_: object) -> bool:
    """Return whether pycocotools can compress them."""
    if not (isinstance(size, list) and len(size) == 2 and all(map(is_length, size))):
        return False
    if isinstance(counts, list):
        return all(type(x) in (int, float) and 0 <= x < 2**32 for x in counts)
    return isinstance(counts, str)


def are_keypoints(value: object) -> bool:
    """Return whether key points are missing, or Detectron2 can move x and y by half a pixel, as it
    does even if only boxes are used. It ignores visibilities."""
    if not value:
        return True
    return isinstance(value, list) and all(is_number(x) for i, x in enumerate(value) if i % 3 < 2)


# Fields of an object besides its box -> whether Detectron2 can read them.
SHAPES = {"segmentation": is_segmentation, "keypoints": are_keypoints}


def is_difficult(annotation: dict) -> bool:
    """Return whether evaluation ignores an object by Pascal VOC's rule. Crowds have COCO's."""
    return annotation.get("difficult") == 1 and not annotation.get("iscrowd")


def is_area(x: object) -> bool:
    return type(x) in (int, float) and 0 < x < np.inf  # type: ignore[operator]


def is_number(x: object) -> bool:
    """Return whether float64 represents a value, NaN included."""
    return type(x) is float or (type(x) is int and abs(x) < 2**53)
