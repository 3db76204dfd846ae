"""Checks a data set before it costs days of training: its annotations, its image files, and whether
its objects suit the config's anchors."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge

from ..assigners.pairs import all_anchors, nearest_locations
from ..geometry import centres, iou
from ..structures import Anchors, GroundTruth
from .coco_json import Objects, find_in_json, is_empty, is_length, place_of
from .findings import ERROR, LEVELS, Finding
from .images import problems, read_header, verify

# An object is poorly matched where no anchor overlaps it by this IoU: then the best one has more
# than ten times its area, or covers less than a tenth of it, or lies across.
POOR_IOU = 0.1
# Images assigned at a time, which bounds memory.
CHUNK = 64


@dataclass(frozen=True)
class Training:
    """What a check has to know of the config.

    Attributes:
        sizes: (shorter side, longest side) to which images are resized; of a range, its ends.
        anchors: (height, width) of a canvas -> its anchors.
        assigner: the rule.
        divisibility: canvases are padded to multiples of it.
        filter_empty: whether images without annotations are left out.
    """

    sizes: tuple[tuple[int, int], ...]
    anchors: Callable[[tuple[int, int]], Anchors]
    assigner: Callable
    divisibility: int
    filter_empty: bool


@dataclass(frozen=True)
class Report:
    """What a check has found.

    Attributes:
        images, annotations: how many the json has.
        findings: the gravest first.
        classes: name, objects and images with such an object, of each class; of what training uses.
        best_iou: (M,) of each object that training uses with the best anchor; None where not
            looked at.
        positives: (M,) of each, on the size of INPUT that gives it most; None likewise.
    """

    images: int
    annotations: int
    findings: list[Finding]
    classes: list[tuple[str, int, int]]
    best_iou: np.ndarray | None
    positives: np.ndarray | None

    @property
    def errors(self) -> int:
        """Number of kinds of errors."""
        return sum(finding.level == ERROR for finding in self.findings)

    def to_dict(self) -> dict:
        """For a json; every case of every finding by name."""
        counts = {"images": self.images, "annotations": self.annotations, "errors": self.errors}
        findings = [
            {
                "kind": f.kind,
                "level": f.level,
                "what": f.what,
                "count": len(f.positions),
                "where": f.examples(),
            }
            for f in self.findings
        ]
        keys = ("name", "objects", "images")
        classes = [dict(zip(keys, c, strict=True)) for c in self.classes]
        result = counts | {"findings": findings, "classes": classes}
        if self.best_iou is not None and len(self.best_iou):
            quantiles = {f"p{q}": float(np.percentile(self.best_iou, q)) for q in (1, 5, 25, 50)}
            result["best_iou"] = quantiles
            result["positives_per_object"] = float(self.positives.mean())
        return result


def check(
    content: dict,
    image_dir: str,
    training: Training,
    deep: bool = False,
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> Report:
    """Everything that is to be said of a data set.

    Args:
        content: of its json, as from :func:`~atss.data.coco_json.read_coco`.
        image_dir: the folder that file names begin in.
        training: what the config makes of it.
        deep: decode every image; else only those that do not end as their format ends.
        progress: wraps what takes long, as tqdm does.
    """
    findings, objects = find_in_json(content)
    sound = all(finding.level != ERROR for finding in findings)
    findings += find_in_files(content, image_dir, training.sizes, deep, progress)
    classes, best_iou, positives = [], None, None
    if objects is not None:
        classes = _classes(content, objects)
        findings += _find_in_objects(content, objects, training, findings)
    if sound:
        used = np.flatnonzero(objects.used)
        best_iou, positives = match(content, objects, training, progress)
        place = place_of(content, "annotations")
        for kind, where, detail in (
            ("object_without_positive", positives == 0, ""),
            ("object_poorly_matched", best_iou < POOR_IOU, f" {POOR_IOU}"),
        ):
            if where.any():
                findings.append(Finding(kind, used[where], place, detail))
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    counts = len(content["images"]), len(content["annotations"])
    return Report(*counts, findings, classes, best_iou, positives)


def find_in_files(
    content: dict,
    image_dir: str,
    sizes: tuple[tuple[int, int], ...],
    deep: bool,
    progress: Callable[..., Iterable],
) -> list[Finding]:
    """What is wrong with the image files, each looked at once."""
    images = [e for e in content["images"] if not is_empty(e.get("file_name"))]
    look = partial(_look, image_dir=image_dir, sizes=sizes, deep=deep)
    found: dict[str, dict[int, str]] = defaultdict(dict)
    # Mostly waiting for a disk: more threads than processors.
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        looks = progress(pool.map(look, images), total=len(images), unit="image", desc="images")
        for i, problems_of_image in enumerate(looks):
            for kind, problem in problems_of_image:
                found[kind][i] = f"{images[i]['file_name']} {problem}"
    return [Finding(kind, sorted(where), where.get) for kind, where in found.items()]


def _look(
    entry: dict, image_dir: str, sizes: tuple[tuple[int, int], ...], deep: bool
) -> list[tuple[str, str]]:
    """Kind and sentence's end of each problem of an image."""
    path = os.path.join(image_dir, entry["file_name"])
    try:
        header = read_header(path)
    except OSError as error:
        return [("file_unreadable", f"cannot be read: {error}")]
    labelled = (entry.get("width"), entry.get("height"))
    found = list(problems(header, labelled if all(map(is_length, labelled)) else None, sizes))
    if deep or not header.complete:
        try:
            verify(path)
            read_header(path, decode=True)
        except OSError as error:
            found.append(("file_truncated", f"cannot be decoded: {error}"))
    return found


def _classes(content: dict, objects: Objects) -> list[tuple[str, int, int]]:
    categories = sorted(content["categories"], key=lambda c: c["id"])
    category, image = objects.category[objects.used], objects.image[objects.used]
    counts = np.bincount(category, minlength=len(categories))
    pairs = np.unique(category * len(content["images"]) + image)
    images = np.bincount(pairs // len(content["images"]), minlength=len(categories))
    return [(c["name"], int(n), int(m)) for c, n, m in zip(categories, counts, images, strict=True)]


def _find_in_objects(
    content: dict, objects: Objects, training: Training, findings: Sequence[Finding]
) -> list[Finding]:
    """Objects there twice, classes without any, images without any."""
    found = []

    def add(kind: str, key: str, positions: Sequence[int]) -> None:
        if len(positions):
            found.append(Finding(kind, positions, place_of(content, key)))

    used = np.flatnonzero(objects.used)
    what = np.column_stack([objects.image, objects.category, objects.boxes])[used]
    order = np.lexsort(what.T)
    same = (what[order][1:] == what[order][:-1]).all(axis=1)
    add("object_twice", "annotations", np.sort(used[order[1:][same]]))

    categories = sorted(
        range(len(content["categories"])), key=lambda i: content["categories"][i]["id"]
    )
    counts = np.bincount(objects.category[used], minlength=len(categories))
    if counts.any():
        empty = [categories[i] for i in np.flatnonzero(counts == 0)]
        add("category_without_objects", "categories", empty)

    # Detectron2's filter counts annotations that are no crowds, be they dropped later.
    unread = next((f.positions for f in findings if f.kind == "segmentation_empty"), [])
    counted = ~objects.crowd & (objects.image >= 0)
    counted[list(unread)] = False
    number = len(content["images"])
    annotated = np.bincount(objects.image[counted], minlength=number) > 0
    with_objects = np.bincount(objects.image[used], minlength=number) > 0
    dropped = ~annotated & training.filter_empty
    if len(content["annotations"]):
        add("image_dropped", "images", np.flatnonzero(dropped))
        add("image_without_objects", "images", np.flatnonzero(~with_objects & ~dropped))
    return found


def match(
    content: dict, objects: Objects, training: Training, progress: Callable[..., Iterable]
) -> tuple[np.ndarray, np.ndarray]:
    """How the objects that training uses fare with the anchors, on the size that suits each best.

    Returns:
        (M,) IoU with the best anchor, and (M,) positives that the rule gives it among the others
        of its image, without crops.
    """
    used = np.flatnonzero(objects.used)
    best_iou, positives = np.zeros(len(used)), np.zeros(len(used), dtype=np.int64)
    image_of = objects.image[used]
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    boxes = objects.boxes[used]
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, np.tile(sides, 2)[image_of])
    order = np.argsort(image_of, kind="stable")
    starts = np.searchsorted(image_of[order], np.arange(len(sides) + 1))
    batches = _batches(np.unique(image_of), sides, training)
    for canvas, some, zoom in progress(batches, unit="batch", desc="anchors"):
        of_batch = np.concatenate([order[starts[i] : starts[i + 1]] for i in some])
        index = np.repeat(np.arange(len(some)), starts[some + 1] - starts[some])
        gt = GroundTruth(
            boxes=torch.from_numpy(boxes[of_batch] * np.tile(zoom, 2)[index]).float(),
            classes=torch.zeros(len(index), dtype=torch.long),
            image_index=torch.from_numpy(index),
            num_images=len(some),
        )
        anchors = training.anchors(canvas)
        given = training.assigner(anchors, gt).positives_per_object(len(gt)).numpy()
        positives[of_batch] = np.maximum(positives[of_batch], given)
        best_iou[of_batch] = np.maximum(best_iou[of_batch], _best_iou(anchors, gt.boxes))
    return best_iou, positives


def _batches(
    images: np.ndarray, sides: np.ndarray, training: Training
) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Images in batches of one canvas each: its (height, width), positions of the images, and what
    their (width, height) are multiplied by."""
    batches = []
    for short, longest in training.sizes:
        by_canvas = defaultdict(list)
        for i in images:
            width, height = map(int, sides[i])
            resized = ResizeShortestEdge.get_output_shape(height, width, short, longest)
            if min(resized) > 0:
                canvas = tuple(
                    -(-x // training.divisibility) * training.divisibility for x in resized
                )
                by_canvas[canvas].append((i, resized[1] / width, resized[0] / height))
        for canvas, some in by_canvas.items():
            for start in range(0, len(some), CHUNK):
                chunk = np.array(some[start : start + CHUNK])
                batches.append((canvas, chunk[:, 0].astype(np.int64), chunk[:, 1:]))
    return batches


def _best_iou(anchors: Anchors, boxes: torch.Tensor) -> np.ndarray:
    """(G,) IoU of each box with the anchor that overlaps it most: on each level one at the location
    nearest to its centre, because anchors of a level differ in nothing else but shape."""
    boxes = boxes.double()
    index, valid = all_anchors(anchors, *nearest_locations(anchors, centres(boxes), 1))
    overlap = iou(anchors.boxes[index].double(), boxes) * valid
    return overlap.amax(dim=0).numpy()
