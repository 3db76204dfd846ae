"""Figures of a detector's results: AP, kinds of errors, confusion matrix, thresholds, worst images.

APs are in points of 100; None stands for what cannot be computed. docs/report.md defines each.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask

from ..engine.coco import class_ap, hotcoco
from ..errors import UserError
from .results import RIGHT, WRONG, Results
from .tide import tide

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IOU = 0.5
# Sizes by the area in pixels, both ends inside: an area of exactly 32² is small and medium.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}
# Largest IoU with another object of the image: from the first on, below the second.
CROWDING = {"0": (0, 1e-9), "0 to 0.2": (1e-9, 0.2), "0.2 to 0.5": (0.2, 0.5), "0.5 to 1": (0.5, 2)}
# Images and suspected labels that are listed.
LISTED = 100


def figures(results: Results, score: float = 0.3) -> dict[str, Any]:
    """Return all figures of a run, as written to json.

    Args:
        score: threshold of the confusion matrix. Lost objects and worst images are those at the
            thresholds of :func:`limits`.
    """
    dataset, best = results.dataset, thresholds(results)
    limit = limits(results, best, score)
    stats = dict(zip(METRICS, results.evaluation.stats, strict=False))
    return {
        **{name: None if x < 0 else 100 * float(x) for name, x in stats.items()},
        "per_class": per_class(results),
        "errors": tide(dataset, results.detections, results.limit),
        "confusion": {
            "names": [*results.names, "background"],
            "matrix": confusion(results, score).tolist(),
            "score": score,
            "iou": IOU,
        },
        "curves": curves(results),
        "thresholds": best,
        "calibration": calibration(results),
        "missed": missed(results, limit),
        "images": images(results, limit),
        "suspected_labels": suspected_labels(results),
        "data": {
            "images": len(dataset["images"]),
            "objects": int((~results.crowd).sum()),
            "crowds": int(results.crowd.sum()),
            "detections": len(results.detections),
            "max_detections": results.limit,
        },
    }


def per_class(results: Results) -> dict[str, dict]:
    """Return AP, AP50, AP75 and the number of objects of each class, all and by size."""
    evaluation = results.evaluation
    columns = {
        "AP": class_ap(evaluation),
        "AP50": class_ap(evaluation, threshold=0),
        "AP75": class_ap(evaluation, threshold=5),
        **{f"AP{size[0]}": class_ap(evaluation, area=i) for i, size in enumerate(SIZES, start=1)},
    }
    count = len(results.names)
    area = _areas(results)
    objects = {"objects": np.bincount(results.gt_category[~results.crowd], minlength=count)}
    for size, (low, high) in SIZES.items():
        inside = ~results.crowd & (area >= low) & (area <= high)
        objects[f"objects_{size}"] = np.bincount(results.gt_category[inside], minlength=count)
    return {
        name: {
            **{key: _defined(values[k]) for key, values in columns.items()},
            **{key: int(values[k]) for key, values in objects.items()},
        }
        for k, name in enumerate(_unique(results.names))
    }


def confusion(results: Results, score: float) -> np.ndarray:
    """Return (K + 1, K + 1) int64 counts: rows true, columns predicted, background last.

    Detections are matched within classes first, as AP does; then lost objects and wrong detections
    by falling score, whatever the class. Crowds and ignored detections are left out.
    """
    count = len(results.names)
    matrix = np.zeros((count + 1, count + 1), dtype=np.int64)
    right = _right(results, score)
    np.add.at(matrix, (results.category[right], results.category[right]), 1)
    wrong = np.flatnonzero((results.status == WRONG) & (results.score >= score))
    wrong = wrong[np.argsort(-results.score[wrong], kind="stable")]
    true, predicted = _match_across(results, wrong, np.flatnonzero(lost_objects(results, score)))
    np.add.at(matrix, (true, predicted), 1)
    return matrix


def _match_across(results: Results, wrong: np.ndarray, lost: np.ndarray) -> tuple[list, list]:
    """Return the true and the predicted class of each pair, and of each unmatched object or
    detection with K, the background."""
    background = len(results.names)
    boxes = np.array([results.detections[i]["bbox"] for i in wrong]).reshape(-1, 4)
    by_image: dict[int, list[int]] = {}
    for j, image in zip(lost.tolist(), results.gt_image[lost].tolist(), strict=True):
        by_image.setdefault(image, []).append(j)
    true, predicted = [], results.category[wrong].tolist()
    for i, box in zip(wrong.tolist(), boxes, strict=True):
        free = by_image.get(int(results.image[i]), [])
        overlap = mask.iou(box[None], results.gt_boxes[free], [0] * len(free))[0] if free else [0]
        best = int(np.argmax(overlap))
        true.append(results.gt_category[free.pop(best)] if overlap[best] >= IOU else background)
    left = [j for free in by_image.values() for j in free]
    return [*true, *results.gt_category[left]], [*predicted, *[background] * len(left)]


def curves(results: Results) -> dict[str, dict | None]:
    """Return precision at 101 recalls at IoU 0.5 and 0.75, and the score there, by class; None
    without objects."""
    precision = results.evaluation.eval["precision"][..., 0, -1]
    scores = results.evaluation.eval["scores"][..., 0, -1]
    return {
        name: None
        if precision[0, 0, k] < 0
        else {
            "precision50": precision[0, :, k].round(6).tolist(),
            "precision75": precision[5, :, k].round(6).tolist(),
            "score50": scores[0, :, k].round(6).tolist(),
        }
        for k, name in enumerate(_unique(results.names))
    }


def thresholds(results: Results) -> dict[str, dict | None]:
    """Return the score of the best F1 at IoU 0.5 of each class, the highest on a tie; None without
    a right detection."""
    best: dict[str, dict | None] = {}
    objects = np.bincount(results.gt_category[~results.crowd], minlength=len(results.names))
    order = np.lexsort((-results.score, results.category))
    order = order[results.status[order] >= WRONG]
    ends = np.searchsorted(results.category[order], np.arange(len(results.names) + 1))
    for k, name in enumerate(_unique(results.names)):
        found = order[ends[k] : ends[k + 1]]
        right = (results.status[found] == RIGHT).cumsum()
        # Detections of equal score pass a threshold together.
        last = np.flatnonzero(np.diff(results.score[found], append=-np.inf))
        best[name] = None
        if len(found) and right[-1]:
            f1 = 2 * right[last] / (last + 1 + objects[k])
            at = int(f1.argmax())
            tp, count = int(right[last[at]]), int(last[at]) + 1
            best[name] = {
                "score": float(results.score[found[last[at]]]),
                "f1": float(f1[at]),
                "precision": tp / count,
                "recall": tp / int(objects[k]),
            }
    return best


def limits(results: Results, best: Mapping[str, dict | None], otherwise: float) -> np.ndarray:
    """Return (N,) the threshold of each detection's class.

    Args:
        best: of :func:`thresholds`.
        otherwise: the threshold of classes without one.
    """
    by_class = [otherwise if x is None else x["score"] for x in best.values()]
    return np.array(by_class)[results.category]


def calibration(results: Results) -> dict | None:
    """Return expected and largest errors of calibration, and ten bins of scores; None without
    detections, or if scores are no probabilities."""
    score = results.score
    if not len(score) or score.min() < 0 or score.max() > 1:
        return None
    found = results.matching.calibration(n_bins=10, iou_threshold=IOU)
    return {key: found[key] for key in ("ece", "mce", "bins", "num_detections")}


def missed(results: Results, limit: np.ndarray) -> dict[str, dict]:
    """Return objects, those without a right detection of a score from ``limit`` (N,) on, and those
    without any, by size and by the largest IoU with another object of the image."""
    lost, never = lost_objects(results, limit), lost_objects(results, -math.inf)
    area, overlap = _areas(results), _crowding(results)

    def row(inside: np.ndarray) -> dict:
        inside = inside & ~results.crowd
        parts = {"objects": inside, "lost": inside & lost, "never_found": inside & never}
        return {key: int(x.sum()) for key, x in parts.items()}

    return {
        "by_size": {x: row((area >= a) & (area <= b)) for x, (a, b) in SIZES.items()},
        "by_crowding": {x: row((overlap >= a) & (overlap < b)) for x, (a, b) in CROWDING.items()},
    }


def images(results: Results, limit: np.ndarray) -> dict[str, list[dict]]:
    """Return the worst images: by lost objects and wrong detections, by lost objects, by the sum of
    the scores of wrong detections, and by the mean IoU of right ones; detections of a score from
    ``limit`` (N,) on."""
    count = len(results.image_ids)
    right = _right(results, limit)
    wrong = (results.status == WRONG) & (results.score >= limit)
    name = _file_names(results)
    boxes = np.array([results.detections[i]["bbox"] for i in np.flatnonzero(right)]).reshape(-1, 4)
    ious = _pair_iou(boxes, results.gt_boxes[results.match[right]])
    hits = np.bincount(results.image[right], minlength=count)
    columns: dict[str, np.ndarray] = {
        "lost": np.bincount(results.gt_image[lost_objects(results, limit)], minlength=count),
        "wrong": np.bincount(results.image[wrong], minlength=count),
        "wrong_score": np.bincount(results.image[wrong], results.score[wrong], minlength=count),
        "right": hits,
        "mean_iou": np.bincount(results.image[right], ious, minlength=count) / np.maximum(hits, 1),
    }
    columns["cost"] = columns["lost"] + columns["wrong"]

    def worst(key: np.ndarray, shown: np.ndarray) -> list[dict]:
        order = np.argsort(-key, kind="stable")  # ties by image id
        return [
            {
                "image_id": results.image_ids[i],
                "file_name": name[i],
                **{k: x[i].item() for k, x in columns.items()},
                "mean_iou": columns["mean_iou"][i].item() if hits[i] else None,
            }
            for i in order[shown[order]][:LISTED]
        ]

    by_key = {key: worst(columns[key], columns[key] > 0) for key in ("cost", "lost", "wrong_score")}
    return {**by_key, "mean_iou": worst(-columns["mean_iou"], hits > 0)}


def suspected_labels(results: Results) -> list[dict]:
    """Return detections of a score from 0.5 on that hint at errors of labels: on a lost object of
    another class, or far from all objects. An object is listed once."""
    suspects: list[dict] = []
    seen, name = set(), _file_names(results)
    ids = [c["id"] for c in sorted(results.dataset["categories"], key=lambda c: c["id"])]
    for x in sorted(results.labels, key=lambda x: (-x["dt_score"], x["dt_id"])):
        if x["gt_id"] in seen:
            continue
        seen |= {x["gt_id"]} - {None}
        labelled = x["gt_category_id"]
        suspects.append(
            {
                "kind": x["type"],
                "image_id": results.image_ids[x["image_id"] - 1],
                "file_name": name[x["image_id"] - 1],
                "score": x["dt_score"],
                "bbox": results.detections[x["dt_id"] - 1]["bbox"],
                "predicted": results.names[ids.index(x["dt_category_id"])],
                "labelled": None if labelled is None else results.names[ids.index(labelled)],
                "annotation_id": None if x["gt_id"] is None else results.truth.ids[x["gt_id"] - 1],
            }
        )
        if len(suspects) == LISTED:
            break
    return suspects


def compare(first: Results, second: Results, samples: int = 200) -> dict[str, Any]:
    """Return the differences (second - first) of AP and so on, with 95 % intervals of a bootstrap
    over images, the same for both.

    Raises:
        UserError: if the runs were evaluated on different annotations.
    """
    if first.truth.dataset != second.truth.dataset:
        raise UserError("the two runs were evaluated on different annotations")
    found = hotcoco.compare(first.matching, second.matching, n_bootstrap=samples)
    defined = {k: found["deltas"][k] for k in METRICS if found["metrics_a"].get(k, -1) >= 0}
    # hotcoco's list of classes is in the order of their differences.
    of_classes = np.subtract(class_ap(second.evaluation), class_ap(first.evaluation)).tolist()
    return {
        "samples": samples,
        "metrics": {
            key: {
                "difference": 100 * delta,
                "low": 100 * found["ci"][key]["lower"],
                "high": 100 * found["ci"][key]["upper"],
            }
            for key, delta in defined.items()
        },
        "per_class": {
            name: _defined(x) for name, x in zip(_unique(first.names), of_classes, strict=True)
        },
    }


def _file_names(results: Results) -> dict[int, str | None]:
    """Return {position in ``image_ids``: file name}; the json may have another order."""
    return {x["id"] - 1: x.get("file_name") for x in results.dataset["images"]}


def _right(results: Results, limit: np.ndarray | float) -> np.ndarray:
    return (results.status == RIGHT) & (results.score >= limit)


def lost_objects(results: Results, limit: np.ndarray | float) -> np.ndarray:
    """Return (M,) bool, whether no right detection of a score from ``limit`` on is at an object;
    crowds are not lost."""
    lost = ~results.crowd
    lost[results.match[_right(results, limit)]] = False
    return lost


def _areas(results: Results) -> np.ndarray:
    return np.array([x["area"] for x in results.dataset["annotations"]], dtype=np.float64)


def _crowding(results: Results) -> np.ndarray:
    """Return (M,) largest IoU with another object of the image; crowds are no objects."""
    largest = np.zeros(len(results.crowd))
    order = np.argsort(results.gt_image, kind="stable")
    order = order[~results.crowd[order]]
    ends = np.flatnonzero(np.diff(results.gt_image[order])) + 1
    for objects in np.split(order, ends):
        if len(objects) > 1:
            boxes = results.gt_boxes[objects]
            iou = mask.iou(boxes, boxes, [0] * len(boxes))
            np.fill_diagonal(iou, 0)
            largest[objects] = iou.max(axis=1)
    return largest


def _pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    inter = (high - low).clip(min=0).prod(axis=1)
    return inter / (a[:, 2:].prod(axis=1) + b[:, 2:].prod(axis=1) - inter)


def _defined(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _unique(names: list[str]) -> list[str]:
    """Return names for the keys of a json: a repeated name gets its class's number."""
    return [x if names.count(x) == 1 else f"{x} ({k})" for k, x in enumerate(names)]
