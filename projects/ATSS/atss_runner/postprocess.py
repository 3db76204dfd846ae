"""From the outputs of an exported file to detections, in NumPy: filter, rank, clip, suppress.

Shape letters: R anchors over all levels, K classes, M candidates or detections of one image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .detections import Detections


def candidates(
    probabilities: np.ndarray,
    quality: np.ndarray | None,
    per_level: list[int],
    settings: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select pairs of anchor and class, level by level.

    Args:
        probabilities: (R, K).
        quality: (R,).
        per_level: number of anchors of each level.
        settings: score_thresh, topk, score ("sqrt" or "product"), threshold_on_score,
            rank_by_class and rank_anchors of the metadata.

    Returns:
        (M,) anchor, score and class.
    """
    scores = probabilities
    if quality is not None:
        scores = probabilities * quality[:, None]
        scores = np.sqrt(scores) if settings["score"] == "sqrt" else scores
    rank = probabilities if settings["rank_by_class"] else scores
    passing = scores if settings["threshold_on_score"] else probabilities
    passing = passing > np.float32(settings["score_thresh"])
    parts, first = [], 0
    for count in per_level:
        anchors = np.arange(first, first + count)
        first += count
        if settings["rank_anchors"]:
            anchors = anchors[_best(rank[anchors].max(axis=1), settings["topk"])]
        row, classes = np.nonzero(passing[anchors])
        anchor = anchors[row]
        if not settings["rank_anchors"]:
            kept = _best(rank[anchor, classes], settings["topk"])
            anchor, classes = anchor[kept], classes[kept]
        parts.append((anchor, classes))
    anchor, classes = (np.concatenate(x) for x in zip(*parts, strict=True))
    return anchor, scores[anchor, classes], classes


def detect(
    boxes: np.ndarray,
    probabilities: np.ndarray,
    quality: np.ndarray | None,
    per_level: list[int],
    size: tuple[int, int],
    original: tuple[int, int],
    settings: Mapping[str, Any],
) -> Detections:
    """Make the detections of one image.

    Args:
        boxes: (R, 4) in pixels of the canvas.
        probabilities, quality, per_level: as in :func:`candidates`.
        size: (height, width) of the resized image on the canvas.
        original: (height, width) of the image.
        settings: the metadata of the file.
    """
    anchor, scores, classes = candidates(probabilities, quality, per_level, settings)
    found = Detections(boxes[anchor], scores, classes)
    if settings["clip"]:
        found = found._replace(boxes=_clip(found.boxes, size))
    found = found.take(_has_area(found.boxes))
    arguments = dict(settings["suppression"])
    suppress = SUPPRESSIONS[arguments.pop("name")]
    found = suppress(found, settings["max_detections"], **arguments)
    return in_original(found, size, original, settings)


def in_original(
    found: Detections,
    size: tuple[int, int],
    original: tuple[int, int],
    settings: Mapping[str, Any],
) -> Detections:
    """Scale detections from the resized image to the original; arguments as :func:`detect`."""
    scale = np.array([original[1] / size[1], original[0] / size[0]] * 2, dtype=np.float32)
    found = found._replace(boxes=found.boxes * scale)
    if settings["clip"]:
        found = found._replace(boxes=_clip(found.boxes, original))
        found = found.take(_has_area(found.boxes))
    if settings["legacy_pixels"]:
        # The last pixel of a box is one pixel of the original image wide.
        widened = found.boxes + np.array([0, 0, 1 - scale[0], 1 - scale[1]], dtype=np.float32)
        found = found._replace(boxes=_clip(widened, original))
    return found


# ------------------------------------------------------------------------------------------------
# Suppressions: (detections, limit, arguments) -> at most ``limit`` detections, best first
# ------------------------------------------------------------------------------------------------


def keep_all(found: Detections, limit: int) -> Detections:
    """No suppression."""
    return found.take(_best(found.scores, limit))


def nms(found: Detections, limit: int, threshold: float) -> Detections:
    """Non-maximum suppression of each class."""
    boxes, kept = found.boxes.astype(np.float64), []
    for k in np.unique(found.classes):
        index = np.flatnonzero(found.classes == k)
        order = index[_best(found.scores[index], len(index))]
        for _ in range(limit):
            if not len(order):
                break
            best, rest = order[0], order[1:]
            kept.append(best)
            order = rest[~(_iou(boxes[best], boxes[rest]) > threshold)]
    return keep_all(found.take(np.sort(np.array(kept, dtype=np.int64))), limit)


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


def vote(
    found: Detections, limit: int, threshold: float, min_score: float | None = None
) -> Detections:
    """Merge groups of overlapping boxes of a class into their mean, weighted by score.

    Args:
        min_score: voters stay with their scores lowered by their overlap if these are at least
            this (soft voting); None: voters go.
    """
    boxes, scores, classes = [], [], []
    for k in np.unique(found.classes):
        left = found.take(found.classes == k)
        left = keep_all(left, len(left.boxes))
        while len(left.boxes):
            overlap = _iou(left.boxes[0], left.boxes)
            group = overlap >= threshold
            group[0] = True
            members, weights = left.boxes[group], left.scores[group]
            merged, kept = members, weights
            if len(members) > 1:
                shares = weights if weights.any() else np.ones_like(weights)
                merged = (members * shares[:, None]).sum(axis=0)[None] / shares.sum()
                kept = weights[:1]
                if min_score is not None:
                    lowered = weights * (1 - overlap[group])
                    stay = lowered >= min_score
                    merged = np.concatenate([merged, members[stay]])
                    kept = np.concatenate([kept, lowered[stay]])
            boxes.append(merged)
            scores.append(kept)
            classes.append(np.full(len(kept), k))
            left = left.take(~group)
    if not boxes:
        return found
    return keep_all(Detections(*map(np.concatenate, (boxes, scores, classes))), limit)


SUPPRESSIONS: dict[str, Callable[..., Detections]] = {
    "none": keep_all,
    "nms": nms,
    "score_vote": score_vote,
    "vote": vote,
    "soft_vote": vote,
}


def _best(rank: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the ``count`` highest, highest first."""
    return np.argsort(-rank, kind="stable")[:count]


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(4,) and (M, 4) -> (M,)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersection = sides.clip(0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - intersection
    return intersection / np.maximum(union, np.finfo(union.dtype).tiny)


def _clip(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return boxes.clip(0, np.array([width, height] * 2, dtype=boxes.dtype))


def _has_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & np.isfinite(boxes).all(axis=1)
