"""Numbers of positives that assigners give the objects of a data set."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from atss_runner.images import Size

from ..anchors import Anchors
from ..assigners import ASSIGNER_REGISTRY, ATSS
from ..assigners.locations import all_anchors, nearest_locations
from ..config import (
    Sampling,
    build_sampling,
    candidates_per_object,
    input_size,
    load_config,
    with_rule,
)
from ..data.datasets import split_source
from ..errors import UserError
from ..geometry import area, centres, iou
from ..labels.check import Fit
from ..labels.coco import Objects, category_names, find_in_json, read_coco
from ..labels.findings import ERROR
from ..labels.formats import Labels, read_labels
from ..predictor import Predictor
from ..structures import Predictions
from .canvases import CHUNK, Progress, on_canvases

# Positions of images that share a canvas, in a json -> predictions on them.
Predict = Callable[[Sequence[int]], Predictions]
# Images predicted at a time, which bounds memory.
PREDICTED = 4
# More classes than these have no lines in the table, only a column in objects.csv.
MAX_CLASSES = 20
# name -> (key of an object's record, [(label, lower bound, upper bound)]).
GROUPS: dict[str, tuple[str, list[tuple[str, float, float]]]] = {
    "size in the image (COCO's)": (
        "area",
        [("small, < 32²", 0, 32**2), ("medium", 32**2, 96**2), ("large, ≥ 96²", 96**2, np.inf)],
    ),
    "longer / shorter side": (
        "aspect",
        [("< 1.5", 1, 1.5), ("1.5 to 3", 1.5, 3), ("≥ 3", 3, np.inf)],
    ),
    "place": (
        "border",
        [("at the image's border", -np.inf, 2), ("elsewhere", 2, np.inf)],
    ),
}


def match(
    content: dict,
    objects: Objects,
    sampling: Sampling,
    sizes: Sequence[Size],
    progress: Progress = lambda items, **_: items,
) -> Fit:
    """Match the used objects with the anchors, together with the others of their images, without
    crops, at the best of several sizes."""
    has_positives = not looks_at_predictions(sampling.assigner)
    count = int(objects.used.sum())
    best_iou, side = np.zeros(count), np.zeros(count)
    positives, least, greatest = np.zeros(count, dtype=np.int64), np.inf, 0.0
    canvases = on_canvases(content, objects, sizes, sampling.divisibility, progress)
    for canvas, _, of_batch, gt, _ in canvases:
        anchors = sampling.anchors(canvas)
        if has_positives:
            counts = sampling.assigner(anchors, gt).positives_per_object(len(gt)).numpy()
            positives[of_batch] = np.maximum(positives[of_batch], counts)
        best_iou[of_batch] = np.maximum(best_iou[of_batch], _best_iou(anchors, gt.boxes))
        side[of_batch] = np.maximum(side[of_batch], area(gt.boxes).double().sqrt().numpy())
        sides = area(anchors.boxes).sqrt()
        least, greatest = min(least, float(sides.min())), max(greatest, float(sides.max()))
    return Fit(best_iou, positives if has_positives else None, side, (least, greatest))


def looks_at_predictions(assigner: Callable) -> bool:
    return getattr(assigner, "looks_at_predictions", False)


def measure(
    content: dict,
    objects: Objects,
    samplings: dict[str, Sampling],
    size: Size,
    progress: Progress = lambda items, **_: items,
    predict: Predict | None = None,
) -> list[dict]:
    """Return a record for each used object, in the order of the json: properties, positives under
    each of ``samplings`` on images of ``size``, as of ``input_size``, and, if exactly one
    assigner is ATSS, mean and standard deviation of the candidates' IoUs."""
    used = np.flatnonzero(objects.used)
    x, y, w, h = objects.boxes[used].T
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    width, height = sides[objects.image[used]].T
    names = category_names(content)
    columns = {
        "image_id": np.array(
            [content["images"][i]["id"] for i in objects.image[used]], dtype=object
        ),
        "class": np.array([names[k] for k in objects.category[used]], dtype=object),
        "area": w * h,
        "side": np.zeros(len(used)),
        "aspect": np.maximum(w, h) / np.minimum(w, h),
        "border": np.stack([x, y, width - x - w, height - y - h]).min(axis=0),
    }
    columns |= {name: np.zeros(len(used), dtype=np.int64) for name in samplings}
    adaptive = [
        name
        for name, s in samplings.items()
        if isinstance(s.assigner, ATSS) and not looks_at_predictions(s.assigner)
    ]
    if len(adaptive) == 1:
        columns |= {"mean": np.zeros(len(used)), "std": np.zeros(len(used))}
    divisibility = max(s.divisibility for s in samplings.values())
    chunk = CHUNK if predict is None else PREDICTED
    canvases = on_canvases(content, objects, [size], divisibility, progress, chunk)
    for canvas, images, of_batch, gt, scale in canvases:
        predictions = None if predict is None else predict(images.tolist())
        columns["side"][of_batch] = np.sqrt(columns["area"][of_batch] * scale.prod(axis=1))
        for name, sampling in samplings.items():
            anchors = sampling.anchors(canvas)
            counts = sampling.assigner(anchors, gt, predictions).positives_per_object(len(gt))
            columns[name][of_batch] = counts.numpy()
            if [name] == adaptive and isinstance(sampling.assigner, ATSS):
                mean, std = sampling.assigner.statistics(anchors, gt.boxes)
                columns["mean"][of_batch], columns["std"][of_batch] = mean.numpy(), std.numpy()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def compare(
    content: dict,
    objects: Objects,
    config_files: Sequence[str],
    rules: Sequence[str] | None,
    opts: Sequence[str],
    progress: Progress = lambda items, **_: items,
    weights: str = "",
    image_dir: str = "",
) -> tuple[list[dict], list[str], int | None]:
    """Count positives of several assigners on one config's anchors, or of several configs.

    Args:
        rules: assigners; None for all, without weights all that need no predictions.
        weights, image_dir: of a model of the one config, and its images.

    Returns:
        the records of :func:`measure`; the names of their counts; k * L, or None for several
            configs.

    Raises:
        UserError: naming the config or the assigner.
    """
    cfgs: dict[str, CfgNode] = {}
    if len(config_files) == 1:
        cfg = load_config(*config_files, opts=opts)
        for rule in rules or [name for name, _ in ASSIGNER_REGISTRY]:
            cfgs[rule] = with_rule(cfg, rule)
    elif rules or weights:
        option = "--rules" if rules else "--weights"
        raise UserError(f"{option} needs a single --config-file, got {len(config_files)}")
    for file in config_files if len(config_files) > 1 else ():
        name = Path(file).stem
        if name in cfgs:
            raise UserError(f"two configs are called {name}: rename one, for the names of columns")
        cfgs[name] = load_config(file, opts=opts)
    first = next(iter(cfgs.values()))
    size = input_size(first)
    samplings = {name: build_sampling(cfg) for name, cfg in cfgs.items()}
    if not weights:
        predicting = [name for name, s in samplings.items() if looks_at_predictions(s.assigner)]
        if predicting and (rules or len(config_files) > 1):
            raise UserError(
                f"{predicting[0]} needs a model's predictions: set --weights, and --images to the "
                "folder of the images"
            )
        samplings = {name: s for name, s in samplings.items() if name not in predicting}
    predict = predict_with(first, weights, content, image_dir) if weights else None
    records = measure(content, objects, samplings, size, progress, predict)
    candidates = {candidates_per_object(cfg) for cfg in cfgs.values()}
    return records, list(samplings), candidates.pop() if len(candidates) == 1 else None


def read_objects(source: str) -> tuple[dict, Objects, str]:
    """Return the labels in COCO's format, the objects and the image folder, "" for a json alone.

    Args:
        source: a json in COCO's format, or ``annotations:images`` of any format.

    Raises:
        UserError: if the labels have errors or no objects.
    """
    if source.lower().endswith(".json"):
        labels = Labels(read_coco(source), "")
    else:
        labels = read_labels(*split_source(source, "--annotations"))
    findings, objects = find_in_json(labels.content)
    for finding in [*labels.findings, *findings]:
        if finding.level == ERROR:
            raise UserError(f"{source} has {finding.sentence()}")
    if objects is None or not objects.used.any():
        raise UserError(f"{source} has no objects")
    return labels.content, objects, labels.image_dir


def predict_with(cfg: CfgNode, weights: str, content: dict, image_dir: str) -> Predict:
    predictor = Predictor(cfg, weights)
    names = category_names(content)
    predicted = predictor.names or [""] * predictor.model.num_classes
    if len(predicted) != len(names) or (predictor.names and list(predictor.names) != names):
        raise UserError(
            f"{weights} has other classes than the annotations: {len(predicted)} classes "
            f"{list(predicted[:3])}, ..., but the annotations {len(names)} classes {names[:3]}, ..."
        )

    def predict(images: Sequence[int]) -> Predictions:
        names = (content["images"][i]["file_name"] for i in images)
        return predictor.at_anchors(str(Path(image_dir) / name) for name in names)

    return predict


def constants(
    content: dict,
    objects: Objects,
    config_file: str,
    opts: Sequence[str] = (),
    progress: Progress = lambda items, **_: items,
) -> dict[str, float]:
    """Return NWD's CONSTANT, the mean side of an object on the canvas, and SimD's M and N, the mean
    distance of centres of object and anchor along x and y, relative to their sides' sum."""
    cfg = load_config(config_file, opts=opts)
    sampling, size = build_sampling(cfg), input_size(cfg)
    sides, distances, pairs = 0.0, np.zeros(2), 0
    for canvas, _, _, gt, _ in on_canvases(
        content, objects, [size], sampling.divisibility, progress
    ):
        anchors = sampling.anchors(canvas)
        sides += float(area(gt.boxes).double().sqrt().sum())
        distances += _relative_distances(anchors, gt.boxes)
        pairs += len(gt) * len(anchors.boxes)
    m, n = distances / pairs
    return {"CONSTANT": sides / int(objects.used.sum()), "M": float(m), "N": float(n)}


def _relative_distances(anchors: Anchors, boxes: torch.Tensor) -> np.ndarray:
    """Return the sums over all pairs of |dx| / (w + w_anchor) and |dy| / (h + h_anchor), (2,)."""
    boxes, total = boxes.double(), np.zeros(2)
    middle, side = centres(boxes), boxes[:, 2:] - boxes[:, :2]
    of_levels = anchors.boxes.double().split(anchors.per_level)
    for stride, size, level in zip(anchors.strides, anchors.sizes, of_levels, strict=True):
        for cell in level[: anchors.num_anchors]:
            for axis, count in enumerate(size[::-1]):
                grid = (torch.arange(count, dtype=torch.float64) + anchors.offset) * stride
                distances = (middle[:, axis, None] - grid).abs().sum(dim=1)
                sides = side[:, axis] + cell[2 + axis] - cell[axis]
                total[axis] += float((distances / sides).sum()) * size[axis]
    return total


def groups(objects: list[dict]) -> dict[str, list[dict]]:
    """Return the objects of each of GROUPS that is not empty, and of each of at most MAX_CLASSES
    classes, after all objects."""
    by_label = {"all": objects}
    for group, (key, bins) in GROUPS.items():
        for label, low, high in bins:
            by_label[f"{group}: {label}"] = [o for o in objects if low <= o[key] < high]
    names = sorted({o["class"] for o in objects})
    for name in names if 1 < len(names) <= MAX_CLASSES else ():
        by_label[f"class: {name}"] = [o for o in objects if o["class"] == name]
    return {label: members for label, members in by_label.items() if members}


def positives(objects: list[dict], column: str) -> str:
    counts = np.array([o[column] for o in objects])
    return f"{counts.mean():.1f} ({(counts == 0).mean():.1%})"


def table(objects: list[dict], columns: list[str], top: int | None) -> str:
    lines = ["Positives per object, and in brackets the objects without any.", ""]
    if top is not None:
        lines[0] += f" 0.2 * k * L would be {0.2 * top:.1f}."
    by_label = groups(objects)
    if len(columns) > 6 and "mean" not in objects[0]:
        rows = [["", *(f"{label} ({len(members)})" for label, members in by_label.items())]]
        rows += [[c, *(positives(members, c) for members in by_label.values())] for c in columns]
    else:
        rows = [["objects", "count", *columns]]
        rows += [
            [label, str(len(members)), *(positives(members, c) for c in columns)]
            for label, members in by_label.items()
        ]
        if "mean" in objects[0]:
            rows[0] += ["IoU of candidates: mean", "std", "threshold"]
            for row, members in zip(rows[1:], by_label.values(), strict=True):
                mean, std = (np.mean([o[key] for o in members]) for key in ("mean", "std"))
                row += [f"{mean:.3f}", f"{std:.3f}", f"{mean + std:.3f}"]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def write_csv(objects: list[dict], target: Path) -> None:
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, objects[0])
        writer.writeheader()
        writer.writerows(objects)


def _best_iou(anchors: Anchors, boxes: torch.Tensor) -> np.ndarray:
    """Return (G,) the greatest IoU with an anchor. Anchors of a level differ only in shape, so the
    nearest location has the level's."""
    boxes = boxes.double()
    index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(boxes), 1))
    overlap = iou(anchors.boxes[index].double(), boxes) * valid
    return overlap.amax(dim=0).numpy()
