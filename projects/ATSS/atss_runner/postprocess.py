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
    top, threshold = settings["topk"], np.float32(settings["score_thresh"])

    def score(probability: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        if quality is None:
            return probability
        own = quality[anchor]
        product = probability * (own[:, None] if probability.ndim == 2 else own)
        return np.sqrt(product) if settings["score"] == "sqrt" else product

    parts, first = [], 0
    for count in per_level:
        anchors = np.arange(first, first + count)
        first += count
        if settings["rank_anchors"]:
            of_level = probabilities[anchors]
            rank = of_level if settings["rank_by_class"] else score(of_level, anchors)
            anchors = anchors[_best(rank.max(axis=1), top)]
        passing = probabilities[anchors]
        if settings["threshold_on_score"]:
            passing = score(passing, anchors)
        row, classes = np.nonzero(passing > threshold)
        anchor = anchors[row]
        probability = probabilities[anchor, classes]
        scores = score(probability, anchor)
        if not settings["rank_anchors"]:
            kept = _best(probability if settings["rank_by_class"] else scores, top)
            anchor, classes, scores = anchor[kept], classes[kept], scores[kept]
        parts.append((anchor, scores, classes))
    anchor, scores, classes = (np.concatenate(x) for x in zip(*parts, strict=True))
    return anchor, scores, classes


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
    box = boxes[anchor]
    if settings["clip"]:
        box = _clip(box, size)
    found = Detections(box, scores, classes.astype(np.int64))
    found = found.take(_has_area(box))
    suppression = settings["suppression"]
    arguments = {k: v for k, v in suppression.items() if k != "name"}
    found = SUPPRESSIONS[suppression["name"]](found, settings["max_detections"], **arguments)
    scale = np.array([original[1] / size[1], original[0] / size[0]] * 2, dtype=np.float32)
    box = found.boxes * scale
    if settings["clip"]:
        box = _clip(box, original)
        found, box = found.take(_has_area(box)), box[_has_area(box)]
    if settings["legacy_pixels"]:
        # The last pixel of a box is one pixel of the original image wide.
        box = _clip(box + np.array([0, 0, 1 - scale[0], 1 - scale[1]], dtype=np.float32), original)
    return found._replace(boxes=box.astype(np.float32))


# ------------------------------------------------------------------------------------------------
# Suppressions: (detections, limit, arguments) -> at most ``limit`` detections, best first
# ------------------------------------------------------------------------------------------------


def keep_all(found: Detections, limit: int) -> Detections:
    """No suppression."""
    return found.take(np.argsort(-found.scores, kind="stable")[:limit])


def nms(found: Detections, limit: int, threshold: float) -> Detections:
    """Non-maximum suppression of each class."""
    kept = []
    for k in np.unique(found.classes):
        index = np.flatnonzero(found.classes == k)
        order = index[np.argsort(-found.scores[index], kind="stable")]
        boxes, count = found.boxes.astype(np.float64), 0
        while len(order) and count < limit:
            kept.append(order[0])
            count += 1
            rest = order[1:]
            order = rest[~(_iou(boxes[order[0]], boxes[rest]) > threshold)]
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
        left = left.take(np.argsort(-left.scores, kind="stable"))
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
    if len(rank) > count:
        chosen = np.argpartition(-rank, count - 1)[:count]
        return chosen[np.argsort(-rank[chosen], kind="stable")]
    return np.argsort(-rank, kind="stable")


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
