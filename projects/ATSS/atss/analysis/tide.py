"""Kinds of detection errors and their cost in AP at IoU 0.5, as TIDE defines them.

Source: Bolya et al., arXiv 2008.08115, and the authors' program (tidecv 1.0.1); if they differ, the
program decides, but for the order of equal scores. docs/report.md has the definition in full.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask

FOREGROUND, BACKGROUND = 0.5, 0.1
RECALLS = np.array([k / 100 for k in range(101)])
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
RIGHT, CLS, LOC, BOTH, DUPE, BKG = range(-1, 5)


@dataclass(frozen=True)
class Errors:
    """N detections, image by image and by falling score in each, and M objects.

    Attributes:
        index: (N,) int64 position among all detections; those beyond the limit are left out.
        category, score: (N,) int64 and float64.
        kind: (N,) int64 RIGHT or the index of the kind in KINDS.
        ignored: (N,) bool, whether a wrong detection lies in a crowd of its class.
        hero_class: (N,) int64 class of the lost object that the detection finds if its kind of
            error is fixed; -1 if it is removed.
        object_class: (M,) int64 class, crowds left out.
        lost, missed: (M,) bool, whether no detection is right, and whether no Cls or Loc is at it.
    """

    index: np.ndarray
    category: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    ignored: np.ndarray
    hero_class: np.ndarray
    object_class: np.ndarray
    lost: np.ndarray
    missed: np.ndarray


def tide(dataset: dict, detections: list[dict], limit: int = 100) -> dict:
    """Return the kinds of errors of detections.

    Args:
        dataset: ground truth in COCO's format; the order of its images breaks ties of scores.
        detections: in COCO's format of results, of images of ``dataset``.
        limit: detections of an image that count, over all classes.

    Returns:
        ``base_ap50``, ``counts`` and ``dap`` by kind, ``dap_special``. APs are in points of 100;
        None if no class is left to average.
    """
    errors = find_errors(dataset, detections, limit)
    classes = max((x["id"] for x in dataset["categories"]), default=0) + 1
    objects = np.bincount(errors.object_class, minlength=classes)
    right = errors.kind == RIGHT
    category, score, counted = errors.category, errors.score, ~errors.ignored
    base = _mean_ap(category, score, right, objects, counted)

    def cost(*fixed: np.ndarray) -> float | None:
        after = _mean_ap(*fixed)
        return None if base is None or after is None else max(after - base, 0.0)  # rounding

    # Equal scores keep their order. tidecv puts all errors before all right detections, so that a
    # fix without effect would lose AP.
    dap = {}
    for k, name in enumerate(KINDS[:-1]):
        of_kind = errors.kind == k
        hero = of_kind & (errors.hero_class >= 0)
        moved = np.where(hero, errors.hero_class, category)
        dap[name] = cost(moved, score, right | hero, objects, hero | (counted & ~of_kind))
    of_missed = np.bincount(errors.object_class[errors.missed], minlength=classes)
    of_lost = np.bincount(errors.object_class[errors.lost], minlength=classes)
    dap["Miss"] = cost(category, score, right, objects - of_missed, counted)
    special = {
        "FalsePos": cost(category, right.astype(float), right, objects, counted),
        "FalseNeg": cost(category, score, right, objects - of_lost, counted),
    }
    counts = {name: int((errors.kind == k).sum()) for k, name in enumerate(KINDS[:-1])}
    counts["Miss"] = int(errors.missed.sum())
    return {"base_ap50": base, "counts": counts, "dap": dap, "dap_special": special}


def find_errors(dataset: dict, detections: list[dict], limit: int = 100) -> Errors:
    """Match detections with objects, and name the kind of each error; arguments as :func:`tide`."""
    position = {x["id"]: i for i, x in enumerate(dataset["images"])}
    annotations = dataset["annotations"]
    image = np.array([position[x["image_id"]] for x in detections], dtype=np.int64)
    category = np.array([x["category_id"] for x in detections], dtype=np.int64)
    score = np.array([x["score"] for x in detections], dtype=np.float64)
    boxes = np.array([x["bbox"] for x in detections], dtype=np.float64).reshape(-1, 4)
    gt_image = np.array([position[x["image_id"]] for x in annotations], dtype=np.int64)
    gt_class = np.array([x["category_id"] for x in annotations], dtype=np.int64)
    gt_boxes = np.array([x["bbox"] for x in annotations], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([bool(x["iscrowd"]) for x in annotations], dtype=bool)

    kind = np.full(len(detections), RIGHT)
    ignored = np.zeros(len(detections), dtype=bool)
    hero_class = np.full(len(detections), -1)
    lost = ~crowd
    missed = ~crowd
    # By image, then by falling score; lexsort is stable.
    order = np.lexsort((-score, image))
    gt_order = np.argsort(gt_image, kind="stable")
    images = np.arange(len(position) + 1)
    ends, gt_ends = (
        np.searchsorted(image[order], images),
        np.searchsorted(gt_image[gt_order], images),
    )
    kept = []
    for i in range(len(position)):
        found = order[ends[i] : ends[i + 1]][:limit]
        kept.append(found)
        objects = gt_order[gt_ends[i] : gt_ends[i + 1]]
        if not len(found):
            continue
        if not len(objects):
            kind[found] = BKG
            continue
        # The IoU; of a crowd, the part of the detection that lies in it.
        iou = mask.iou(boxes[found], gt_boxes[objects], crowd[objects].astype(np.uint8))
        same = category[found][:, None] == gt_class[objects]
        in_crowd = (same & crowd[objects] & (iou > FOREGROUND)).any(axis=1)
        objects, iou, same = (x[..., ~crowd[objects]] for x in (objects, iou, same))
        right = _match(np.where(same, iou, -1))
        kind[found], target = _kinds(iou, same, right)
        ignored[found] = in_crowd & (right < 0)
        lost[objects[right[right >= 0]]] = False
        is_lost = lost[objects]
        missed[objects] = is_lost
        for k in np.flatnonzero(target >= 0):  # by falling score: the first is the hero
            if missed[objects[target[k]]]:
                hero_class[found[k]] = gt_class[objects[target[k]]]
                missed[objects[target[k]]] = False
    index = np.concatenate(kept) if kept else order
    return Errors(
        index,
        category[index],
        score[index],
        kind[index],
        ignored[index],
        hero_class[index],
        gt_class[~crowd],
        lost[~crowd],
        missed[~crowd],
    )


def _match(iou: np.ndarray) -> np.ndarray:
    """Give each detection in turn the free object of the largest IoU.

    Args:
        iou: (D, G), -1 for other classes; changed in place.

    Returns:
        (D,) int64 object, or -1.
    """
    match = np.full(len(iou), -1)
    for d in np.flatnonzero((iou >= FOREGROUND).any(axis=1)):
        best = int(iou[d].argmax())
        if iou[d, best] >= FOREGROUND:
            match[d] = best
            iou[:, best] = -1
    return match


def _kinds(iou: np.ndarray, same: np.ndarray, match: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (D,) int64 kind of each detection, and the object of each Loc and Cls, or -1."""
    if not iou.shape[1]:
        return np.full(len(iou), BKG), np.full(len(iou), -1)
    of_class, of_others = np.where(same, iou, 0), np.where(same, 0, iou)
    own, other = of_class.max(axis=1), of_others.max(axis=1)
    # The first that fits.
    conditions = {
        RIGHT: match >= 0,
        LOC: (own >= BACKGROUND) & (own <= FOREGROUND),
        CLS: other >= FOREGROUND,
        DUPE: own >= FOREGROUND,
        BKG: np.maximum(own, other) <= BACKGROUND,
    }
    kind = np.select([*conditions.values()], [*conditions], BOTH)
    target = np.where(kind == LOC, of_class.argmax(axis=1), of_others.argmax(axis=1))
    return kind, np.where((kind == LOC) | (kind == CLS), target, -1)


def _mean_ap(
    category: np.ndarray,
    score: np.ndarray,
    right: np.ndarray,
    objects: np.ndarray,
    counted: np.ndarray,
) -> float | None:
    """Return the mean AP of the classes with an object or a detection, or None without any.

    Args:
        category, score, right, counted: (N,) of detections; their order breaks ties.
        objects: (K,) objects of each class.
    """
    category, score, right = category[counted], score[counted], right[counted]
    order = np.lexsort((-score, category))
    ends = np.searchsorted(category[order], np.arange(len(objects) + 1))
    aps = [
        _average_precision(right[order[ends[k] : ends[k + 1]]], objects[k])
        for k in range(len(objects))
        if objects[k] or ends[k + 1] > ends[k]
    ]
    return float(np.mean(aps)) if aps else None


def _average_precision(right: np.ndarray, objects: int) -> float:
    """Return the mean precision at 101 recalls, in points of 100, of detections by falling
    score."""
    if not objects or not len(right):
        return 0.0
    hits = right.cumsum()
    precision = hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, RECALLS)
    return float(100 * np.append(precision, 0.0)[at].mean())
