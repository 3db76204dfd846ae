"""What rules give to the objects of a data set."""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from ..anchors import Anchors
from ..assigners import ASSIGNER_REGISTRY, ATSS
from ..assigners.locations import all_anchors, nearest_locations
from ..config import (
    Sampling,
    build_sampling,
    candidates_per_object,
    load_config,
    with_rule,
)
from ..errors import UserError
from ..geometry import area, centres, iou
from ..labels.check import Fit
from ..labels.coco import Objects, find_in_json, read_coco
from ..labels.findings import ERROR
from ..predictor import Predictor
from ..structures import GroundTruth, Predictions

Progress = Callable[..., Iterable]
# Positions among a json's images that share a canvas -> what a model says of them.
Predict = Callable[[Sequence[int]], Predictions]
# Images assigned at a time, and of those that a model looks at; which bounds memory.
CHUNK, LOOKED_AT = 64, 4
# name -> (what an object is sorted by, [(label, lower end, upper end)]).
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


def on_canvases(
    content: dict,
    objects: Objects,
    sizes: Sequence[tuple[int, int]],
    divisibility: int,
    progress: Progress = lambda items, **_: items,
    chunk: int = CHUNK,
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray, GroundTruth, np.ndarray]]:
    """The objects that training uses as a rule sees them: images resized, those of one canvas
    together.

    Args:
        content, objects: of a json.
        sizes: (shorter side, longest side); every image comes once for each.
        divisibility: canvases are padded to multiples of it.
        progress: wraps the batches, as tqdm does.
        chunk: images of a batch.
    Yields:
        (height, width) of the canvas; positions of the images in the json; (m,) positions among the
        M objects that are used; the ground truth of these; (m, 2) pixels of the canvas per pixel of
        the image, (x, y).
    """
    used = np.flatnonzero(objects.used)
    image_of = objects.image[used]
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    boxes = objects.boxes[used]
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, np.tile(sides, 2)[image_of])
    order = np.argsort(image_of, kind="stable")
    starts = np.searchsorted(image_of[order], np.arange(len(sides) + 1))
    batches = _batches(np.unique(image_of), sides, sizes, divisibility, chunk)
    for canvas, some, zoom in progress(batches, unit="batch", desc="anchors"):
        of_batch = np.concatenate([order[starts[i] : starts[i + 1]] for i in some])
        index = np.repeat(np.arange(len(some)), starts[some + 1] - starts[some])
        gt = GroundTruth(
            boxes=torch.from_numpy(boxes[of_batch] * np.tile(zoom, 2)[index]).float(),
            classes=torch.from_numpy(objects.category[used][of_batch].astype(np.int64)),
            image_index=torch.from_numpy(index),
            num_images=len(some),
        )
        yield canvas, some, of_batch, gt, zoom[index]


def match(
    content: dict,
    objects: Objects,
    sampling: Sampling,
    sizes: Sequence[tuple[int, int]],
    progress: Progress = lambda items, **_: items,
) -> Fit:
    """How the objects that training uses fare with the anchors, among the others of their images,
    without crops, on the size that suits each best."""
    asked = not looks_at_predictions(sampling.assigner)
    count = int(objects.used.sum())
    best_iou, side = np.zeros(count), np.zeros(count)
    positives = np.zeros(count, dtype=np.int64)
    canvases = on_canvases(content, objects, sizes, sampling.divisibility, progress)
    for canvas, _, of_batch, gt, _ in canvases:
        anchors = sampling.anchors(canvas)
        if asked:
            given = sampling.assigner(anchors, gt).positives_per_object(len(gt)).numpy()
            positives[of_batch] = np.maximum(positives[of_batch], given)
        best_iou[of_batch] = np.maximum(best_iou[of_batch], _best_iou(anchors, gt.boxes))
        side[of_batch] = np.maximum(side[of_batch], area(gt.boxes).double().sqrt().numpy())
    return Fit(best_iou, positives if asked else None, side)


def looks_at_predictions(assigner: Callable) -> bool:
    """Whether a rule cannot do without."""
    return getattr(assigner, "looks_at_predictions", False)


def measure(
    content: dict,
    objects: Objects,
    samplings: dict[str, Sampling],
    size: tuple[int, int],
    progress: Progress = lambda items, **_: items,
    predict: Predict | None = None,
) -> list[dict]:
    """One record per object that training uses, in the order of the json: what it is, how many
    positives each of ``samplings`` gives it on images of ``size`` (shorter side, longest side), and
    the mean and standard deviation of its candidates' IoUs where one of the rules is ATSS.

    Args:
        predict: what a model says of images, for rules that look at it.
    """
    used = np.flatnonzero(objects.used)
    x, y, w, h = objects.boxes[used].T
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    width, height = sides[objects.image[used]].T
    columns = {
        "image_id": np.array(
            [content["images"][i]["id"] for i in objects.image[used]], dtype=object
        ),
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
    chunk = CHUNK if predict is None else LOOKED_AT
    canvases = on_canvases(content, objects, [size], divisibility, progress, chunk)
    for canvas, images, of_batch, gt, zoom in canvases:
        seen = None if predict is None else predict(images.tolist())
        columns["side"][of_batch] = np.sqrt(columns["area"][of_batch] * zoom.prod(axis=1))
        for name, sampling in samplings.items():
            anchors = sampling.anchors(canvas)
            counts = sampling.assigner(anchors, gt, seen).positives_per_object(len(gt))
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
    """Counts what rules give on one config's anchors, or several configs each by their own.

    Args:
        content, objects: of a json, as from :func:`read_objects`.
        rules: of one config; by default all that are registered, and without weights those of them
            that do not look at predictions.
        weights: of a model of the one config, which rules may look at.
        image_dir: where its images lie.
    Returns:
        the records of :func:`measure`; the names of the columns; k * L, or None where the configs
        differ in it.

    Raises:
        ValueError: naming what is wrong with the configs or the rules.
    """
    cfgs: dict[str, CfgNode] = {}
    if len(config_files) == 1:
        cfg = load_config(*config_files, opts=opts)
        for rule in rules or [name for name, _ in ASSIGNER_REGISTRY]:
            cfgs[rule] = with_rule(cfg, rule)
    elif rules or weights:
        wrong = "--rules" if rules else "--weights"
        raise UserError(f"{wrong} is for one config; several have each their own")
    for file in config_files if len(config_files) > 1 else ():
        name = Path(file).stem
        if name in cfgs:
            raise UserError(f"two configs are called {name}: the columns would be, too")
        cfgs[name] = load_config(file, opts=opts)
    first = next(iter(cfgs.values()))
    size = (first.INPUT.MIN_SIZE_TEST, first.INPUT.MAX_SIZE_TEST)
    samplings = {name: build_sampling(cfg) for name, cfg in cfgs.items()}
    if not weights:
        blind = [name for name, s in samplings.items() if looks_at_predictions(s.assigner)]
        if blind and (rules or len(config_files) > 1):
            raise UserError(
                f"{blind[0]} looks at what a model predicts: --weights names one's, and --images "
                "where its images lie"
            )
        samplings = {name: s for name, s in samplings.items() if name not in blind}
    predict = _predict(first, weights, content, image_dir) if weights else None
    records = measure(content, objects, samplings, size, progress, predict)
    reach = {candidates_per_object(cfg) for cfg in cfgs.values()}
    return records, list(samplings), reach.pop() if len(reach) == 1 else None


def read_objects(annotations: str) -> tuple[dict, Objects]:
    """The content of a json, and its objects.

    Raises:
        ValueError: where it has errors, or no objects.
    """
    content = read_coco(annotations)
    findings, objects = find_in_json(content)
    for finding in findings:
        if finding.level == ERROR:
            raise UserError(f"{annotations} has {finding.sentence()}")
    if objects is None or not objects.used.any():
        raise UserError(f"{annotations} has no objects")
    return content, objects


def _predict(cfg: CfgNode, weights: str, content: dict, image_dir: str) -> Predict:
    """
    Raises:
        ValueError: where the weights are not of the json's classes.
    """
    predictor = Predictor(cfg, weights)
    names = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    known = predictor.names or [""] * predictor.model.num_classes
    if len(known) != len(names) or (predictor.names and list(predictor.names) != names):
        raise UserError(
            f"{weights} is of other classes than the annotations: of {len(known)}, "
            f"{list(known[:3])} and so on, which have {len(names)}, {names[:3]} and so on"
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
    """What the authors of similarities for tiny objects would choose for these: NWD's constant, the
    mean side of an object in pixels of the canvas; and SimD's m and n, the means over all objects
    and anchors of the distance of their centres along x and y over the sum of both sides."""
    cfg = load_config(config_file, opts=opts)
    sampling, size = build_sampling(cfg), (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
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
    """(2,) sums over all pairs of |dx| / (w + w_anchor), and of the same for y and h. Anchors of a
    column have one x, those of a row one y."""
    boxes, total = boxes.double(), np.zeros(2)
    middle, side = centres(boxes), boxes[:, 2:] - boxes[:, :2]
    of_levels = anchors.boxes.double().split(anchors.per_level)
    for stride, size, level in zip(anchors.strides, anchors.sizes, of_levels, strict=True):
        for cell in level[: anchors.num_anchors]:
            for axis, count in enumerate(size[::-1]):
                at = (torch.arange(count, dtype=torch.float64) + anchors.offset) * stride
                apart = (middle[:, axis, None] - at).abs().sum(dim=1)
                together = side[:, axis] + cell[2 + axis] - cell[axis]
                total[axis] += float((apart / together).sum()) * size[axis]
    return total


def groups(objects: list[dict]) -> dict[str, list[dict]]:
    """{label: the objects of that kind}, all of them first, without empty ones."""
    found = {"all": objects}
    for group, (key, bins) in GROUPS.items():
        for label, low, high in bins:
            found[f"{group}: {label}"] = [o for o in objects if low <= o[key] < high]
    return {label: some for label, some in found.items() if some}


def positives(objects: list[dict], column: str) -> str:
    """Mean of a column's counts, and in brackets the share that is 0."""
    counts = np.array([o[column] for o in objects])
    return f"{counts.mean():.1f} ({(counts == 0).mean():.1%})"


def table(objects: list[dict], columns: list[str], top: int | None) -> str:
    """Markdown: positives per object and objects without any, by group; a line for each group, or,
    where there are many columns, a line for each of these."""
    lines = ["Positives per object, and in brackets the objects without any.", ""]
    if top is not None:
        lines[0] += f" 0.2 * k * L would be {0.2 * top:.1f}."
    kinds = groups(objects)
    if len(columns) > 6 and "mean" not in objects[0]:
        rows = [["", *(f"{label} ({len(some)})" for label, some in kinds.items())]]
        rows += [[c, *(positives(some, c) for some in kinds.values())] for c in columns]
    else:
        rows = [["objects", "count", *columns]]
        rows += [
            [label, str(len(some)), *(positives(some, c) for c in columns)]
            for label, some in kinds.items()
        ]
        if "mean" in objects[0]:
            rows[0] += ["IoU of candidates: mean", "std", "threshold"]
            for row, some in zip(rows[1:], kinds.values(), strict=True):
                mean, std = (np.mean([o[key] for o in some]) for key in ("mean", "std"))
                row += [f"{mean:.3f}", f"{std:.3f}", f"{mean + std:.3f}"]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def write_csv(objects: list[dict], target: Path) -> None:
    """A line per object."""
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, objects[0])
        writer.writeheader()
        writer.writerows(objects)


def _batches(
    images: np.ndarray,
    sides: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    divisibility: int,
    count: int,
) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Images in batches of one canvas, so many at a time: its (height, width), positions of the
    images, and what their (width, height) are multiplied by."""
    batches = []
    for short, longest in sizes:
        by_canvas = defaultdict(list)
        for i in images:
            width, height = map(int, sides[i])
            resized = ResizeShortestEdge.get_output_shape(height, width, short, longest)
            if min(resized) > 0:
                canvas = tuple(-(-x // divisibility) * divisibility for x in resized)
                by_canvas[canvas].append((i, resized[1] / width, resized[0] / height))
        for canvas, some in by_canvas.items():
            for start in range(0, len(some), count):
                chunk = np.array(some[start : start + count])
                batches.append((canvas, chunk[:, 0].astype(np.int64), chunk[:, 1:]))
    return batches


def _best_iou(anchors: Anchors, boxes: torch.Tensor) -> np.ndarray:
    """(G,) IoU of each box with the anchor that overlaps it most: on each level one at the location
    nearest to its centre, because anchors of a level differ in nothing else but shape."""
    boxes = boxes.double()
    index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(boxes), 1))
    overlap = iou(anchors.boxes[index].double(), boxes) * valid
    return overlap.amax(dim=0).numpy()
