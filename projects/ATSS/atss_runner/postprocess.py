"""From the outputs of an exported file to detections, in NumPy: filter, rank, clip, suppress.

Shape letters: R anchors over all levels, K classes, M candidates or detections of one image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .detections import Detections


def select(
    outputs: Mapping[str, np.ndarray],
    per_level: list[int],
    size: tuple[int, int],
    settings: Mapping[str, Any],
) -> Detections:
    """Select and suppress detections of one image, in pixels of the resized image.

    Args:
        outputs: boxes (R, 4) in pixels of the canvas, probabilities (R, K), and quality (R,) if the
            head predicts it.
        per_level: number of anchors of each level.
        size: (height, width) of the resized image on the canvas.
        settings: the metadata of the file.
    """
    probabilities, topk = outputs["probabilities"], settings["topk"]
    scores = probabilities
    if "quality" in outputs:
        scores = probabilities * outputs["quality"][:, None]
        scores = np.sqrt(scores) if settings["score"] == "sqrt" else scores
    rank = probabilities if settings["rank_by_class"] else scores
    passing = scores if settings["threshold_on_score"] else probabilities
    passing = passing > np.float32(settings["score_thresh"])
    pairs = []
    for anchors in np.split(np.arange(len(scores)), np.cumsum(per_level)[:-1]):
        if settings["rank_anchors"]:
            anchors = anchors[_best(rank[anchors].max(axis=1), topk)]
        row, classes = np.nonzero(passing[anchors])
        pair = np.stack([anchors[row], classes])
        if not settings["rank_anchors"]:
            pair = pair[:, _best(rank[*pair], topk)]
        pairs.append(pair)
    anchor, classes = np.concatenate(pairs, axis=1)
    found = Detections(outputs["boxes"][anchor], scores[anchor, classes], classes)
    if settings["clip"]:
        found = _clip(found, size)
    arguments = dict(settings["suppression"])
    suppress = SUPPRESSIONS[arguments.pop("name")]
    return suppress(_with_area(found), settings["max_detections"], **arguments)


def in_original(
    found: Detections,
    size: tuple[int, int],
    original: tuple[int, int],
    settings: Mapping[str, Any],
) -> Detections:
    """Scale detections from the resized image to the original.

    Args:
        size, original: (height, width) of both.
        settings: the metadata of the file.
    """
    scale = np.array([original[1] / size[1], original[0] / size[0]] * 2, dtype=np.float32)
    found = found._replace(boxes=found.boxes * scale)
    if settings["clip"]:
        found = _with_area(_clip(found, original))
    if settings["legacy_pixels"]:
        # The last pixel of a box is one pixel of the original image wide.
        last = np.array([0, 0, 1 - scale[0], 1 - scale[1]], dtype=np.float32)
        found = _clip(found._replace(boxes=found.boxes + last), original)
    return found


# ------------------------------------------------------------------------------------------------
# Suppressions: (detections, limit, arguments) -> at most ``limit`` detections, best first
# ------------------------------------------------------------------------------------------------


def keep_all(found: Detections, limit: int | None) -> Detections:
    """No suppression."""
    return found.take(_best(found.scores, limit))


def nms(found: Detections, limit: int, threshold: float) -> Detections:
    """Non-maximum suppression of each class."""
    found = keep_all(found, None)
    boxes, kept = found.boxes.astype(np.float64), []
    left = np.arange(len(boxes))
    while len(left) and len(kept) < limit:
        best, left = left[0], left[1:]
        kept.append(best)
        rivals = np.flatnonzero(found.classes[left] == found.classes[best])
        overlap = _iou(boxes[best], boxes[left[rivals]])
        left = np.delete(left, rivals[overlap > threshold])
    return found.take(np.array(kept, dtype=np.int64))


def score_vote(
    found: Detections, limit: int, threshold: float, spread: float, min_overlap: float
) -> Detections:
    """NMS, then the mean of each box with the boxes of its class, weighted by score and overlap
    (PAA, arXiv 2007.08103, section 3.4)."""
    kept = nms(found, limit, threshold)
    moved = []
    for box, k in zip(kept.boxes, kept.classes, strict=True):
        overlap = _iou(box, found.boxes)
        votes = np.exp(-((1 - overlap) ** 2) / np.float32(spread)) * found.scores
        votes = np.where((overlap > min_overlap) & (found.classes == k), votes, 0).astype(float)
        total = votes.sum()
        moved.append(votes @ found.boxes.astype(float) / total if total > 0 else box)
    return kept._replace(boxes=np.array(moved, dtype=np.float32).reshape(-1, 4))


def vote(found: Detections, limit: int, threshold: float, min_score: float = np.inf) -> Detections:
    """Merge groups of overlapping boxes of a class into their mean, weighted by score.

    Args:
        min_score: voters stay with their scores lowered by their overlap if these are at least
            this (soft voting).
    """
    parts = [found.take(slice(0))]
    for k in np.unique(found.classes):
        left = keep_all(found.take(found.classes == k), None)
        while len(left.scores):
            overlap = _iou(left.boxes[0], left.boxes)
            group = overlap >= threshold
            group[0] = True
            (boxes, scores, _), lowered = left.take(group), (left.scores * (1 - overlap))[group]
            if len(scores) > 1:
                shares = scores if scores.any() else np.ones_like(scores)
                mean = (boxes * shares[:, None]).sum(axis=0) / shares.sum()
                stay = lowered >= min_score
                boxes = np.vstack([mean, boxes[stay]])
                scores = np.append(scores[:1], lowered[stay])
            parts.append(Detections(boxes, scores, np.full(len(scores), k)))
            left = left.take(~group)
    return keep_all(Detections(*map(np.concatenate, zip(*parts, strict=True))), limit)


SUPPRESSIONS: dict[str, Callable[..., Detections]] = {
    "none": keep_all,
    "nms": nms,
    "score_vote": score_vote,
    "vote": vote,
    "soft_vote": vote,
}


def _best(rank: np.ndarray, count: int | None) -> np.ndarray:
    """Return the positions of the ``count`` highest, or of all, highest first."""
    return np.argsort(-rank, kind="stable")[:count]


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(4,) and (M, 4) -> (M,)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersection = sides.clip(0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - intersection
    return intersection / np.maximum(union, np.finfo(union.dtype).tiny)


def _clip(found: Detections, size: tuple[int, int]) -> Detections:
    limits = np.array([size[1], size[0]] * 2, dtype=found.boxes.dtype)
    return found._replace(boxes=found.boxes.clip(0, limits))


def _with_area(found: Detections) -> Detections:
    """Return the detections whose boxes are finite and not empty."""
    boxes = found.boxes
    return found.take((boxes[:, 2:] > boxes[:, :2]).all(axis=1) & np.isfinite(boxes).all(axis=1))
