"""Check of a data set before training: annotations, image files, fit of objects and anchors."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from atss_runner.planes import Planes
from atss_runner.tiles import SHARE, tile_size

from .coco import Objects, find_in_json
from .findings import DROPPED, ERROR, LEVELS, NOTE, WARNING, Finding, place_of
from .folders import THREADS
from .formats import Labels
from .headers import header_of, open_file, problems, read_header, verify
from .values import is_empty, is_length

# Best IoU below which an object is poorly matched: the best anchor has more than ten times its
# area, covers less than a tenth of it, or has another shape.
POOR_IOU = 0.1
# Median side, in pixels of the network's input, below which objects are tiny (AI-TOD's term), and
# the recommended one.
TINY, FAIR = 16.0, 32.0

EXAMPLES = 3
# Number of the most frequent classes shown, and of the rarest.
CLASSES = 10
HEADINGS = {
    ERROR: "Errors: training or evaluation stops, or would be silently wrong",
    DROPPED: "Left out of training",
    WARNING: "Worth a look",
    NOTE: "Good to know",
}


class Fit(NamedTuple):
    """Match of M objects used in training and a config's anchors.

    Attributes:
        best_iou: (M,) IoU with the best anchor.
        positives: (M,) positive anchors at the best input size; None if they depend on predictions.
        side: (M,) square root of the area, in pixels of the largest input.
        anchor_sides: the least and the greatest of the anchors.
    """

    best_iou: np.ndarray
    positives: np.ndarray | None
    side: np.ndarray
    anchor_sides: tuple[float, float]


Match = Callable[[dict, Objects], Fit]


@dataclass(frozen=True)
class Report:
    """Result of a check.

    Attributes:
        findings: errors first.
        classes: (name, objects used in training, their images) of each class.
        fit: None if not checked.
        objects: None if required fields or ids are missing or invalid.
    """

    images: int
    annotations: int
    findings: list[Finding]
    classes: list[tuple[str, int, int]]
    fit: Fit | None
    objects: Objects | None

    @property
    def errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.findings)

    def to_dict(self) -> dict:
        counts = {"images": self.images, "annotations": self.annotations, "errors": self.errors}
        findings = [
            {
                "kind": f.kind,
                "level": f.level,
                "what": f.title,
                "count": len(f.positions),
                "where": f.examples(),
            }
            for f in self.findings
        ]
        keys = ("name", "objects", "images")
        classes = [dict(zip(keys, c, strict=True)) for c in self.classes]
        result: dict = counts | {"findings": findings, "classes": classes}
        if self.objects is not None and self.objects.used.any():
            areas = self.objects.boxes[self.objects.used, 2:].prod(axis=1)
            result["tile_size"] = tile_size(float(areas.mean()))
        if self.fit is not None and len(self.fit.best_iou):
            best_iou, positives, side, _ = self.fit
            result["best_iou"] = {
                f"p{q}": float(np.percentile(best_iou, q)) for q in (1, 5, 25, 50)
            }
            result["median_side"] = float(np.median(side))
            if positives is not None:
                result["positives_per_object"] = float(positives.mean())
                result["share_without_positive"] = float((positives == 0).mean())
        return result


def check(
    labels: Labels,
    sizes: Sequence[tuple[int, int]],
    filter_empty: bool,
    match: Match | None = None,
    deep: bool = False,
    progress: Callable[..., Iterable] = lambda items, **_: items,
    limit: float = math.inf,
    planes: Planes | None = None,
) -> Report:
    """Check a data set.

    Args:
        sizes: (shorter side, longest side) of the resized images; the ends of a range.
        filter_empty: whether training leaves out images without annotations.
        match: matches objects and anchors; None to skip this.
        deep: decode every image, not only those without their format's end marker.
        progress: wraps long loops, as tqdm does.
        limit: TEST.DETECTIONS_PER_IMAGE.
        planes: of INPUT.FORMAT planes; every image is decoded.
    """
    content, image_dir = labels.content, labels.image_dir
    findings, objects = find_in_json(content)
    findings = [*labels.findings, *findings]
    has_errors = any(finding.level == ERROR for finding in findings)
    findings += find_in_files(content, image_dir, sizes, deep, progress, planes)
    classes: list[tuple[str, int, int]] = []
    fit = None
    if objects is not None:
        classes = _classes(content, objects)
        findings += _find_in_objects(content, objects, filter_empty, limit, findings)
    if not has_errors and objects is not None and match is not None:
        used = np.flatnonzero(objects.used)
        fit = match(content, objects)
        place = place_of(content, "annotations")
        unmatched = np.zeros(len(used), bool) if fit.positives is None else fit.positives == 0
        if unmatched.any():
            cases = used[unmatched]
            findings.append(Finding("object_without_positive", cases, place, "", "annotations"))
        aspects = np.sort(objects.boxes[used, 2:], axis=1)
        longer = fit.side * np.sqrt(aspects[:, 1] / aspects[:, 0])
        findings += _find_poorly_matched(fit, longer, used, place, max(sizes))
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    counts = len(content["images"]), len(content["annotations"])
    return Report(*counts, findings, classes, fit, objects)


def _find_poorly_matched(
    fit: Fit,
    longer: np.ndarray,
    used: np.ndarray,
    place: Callable[[int], str],
    size: tuple[int, int],
) -> list[Finding]:
    """Find objects with a low best IoU, by reason.

    Args:
        longer: (M,) longer side, in pixels of the largest input.
        size: (shorter side, longest side) of the network's largest input.
    """
    poor = fit.best_iou < POOR_IOU
    least, greatest = fit.anchor_sides
    small, large = poor & (longer < least), poor & (fit.side > greatest)
    # An object inside an anchor covers four times as much of it in an input twice as large.
    left = int((4 * fit.best_iou[small] < POOR_IOU).sum())
    at = f", INPUT.MIN_SIZE_TRAIN {size[0]}, MAX_SIZE_TRAIN {size[1]} (bbox: pixels of the file)"
    kinds = (
        ("object_too_small", small, f" {POOR_IOU}{at}; with both twice as large about {left}"),
        ("object_too_large", large, f" {POOR_IOU}{at}"),
        ("object_too_long", poor & ~small & ~large, f" {POOR_IOU}{at}"),
    )
    return [
        Finding(kind, used[x], place, detail, "annotations") for kind, x, detail in kinds if x.any()
    ]


def find_in_files(
    content: dict,
    image_dir: str,
    sizes: Sequence[tuple[int, int]],
    deep: bool,
    progress: Callable[..., Iterable],
    planes: Planes | None = None,
) -> list[Finding]:
    images = [e for e in content["images"] if not is_empty(e.get("file_name"))]
    check_file = partial(_check_file, image_dir=image_dir, sizes=sizes, deep=deep, planes=planes)
    places: dict[str, dict[int, str]] = defaultdict(dict)
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(check_file, images)
        done = progress(results, total=len(images), unit="image", desc="images")
        for i, problems_of_image in enumerate(done):
            for kind, problem in problems_of_image:
                places[kind][i] = f"{images[i]['file_name']} {problem}"
    return [
        Finding(kind, sorted(cases), cases.__getitem__, entries="images")
        for kind, cases in places.items()
    ]


def _check_file(
    entry: dict,
    image_dir: str,
    sizes: Sequence[tuple[int, int]],
    deep: bool,
    planes: Planes | None,
) -> list[tuple[str, str]]:
    path = os.path.join(image_dir, entry["file_name"])
    try:
        if planes is None:
            header = read_header(path)
        else:
            with open_file(path) as file:
                pixels = planes.read(file.read())
            planes.check(pixels)
            header = header_of(pixels)
    except (OSError, ValueError, ImportError) as error:
        return [("file_unreadable", f"cannot be read: {error}")]
    labelled: tuple[Any, Any] = (entry.get("width"), entry.get("height"))
    faults = list(problems(header, labelled if all(map(is_length, labelled)) else None, sizes))
    if planes is None and (deep or not header.complete):
        try:
            verify(path)
            read_header(path, decode=True)
        except OSError as error:
            faults.append(("file_truncated", f"cannot be decoded: {error}"))
    return faults


def _classes(content: dict, objects: Objects) -> list[tuple[str, int, int]]:
    categories = sorted(content["categories"], key=lambda c: c["id"])
    category, image = objects.category[objects.used], objects.image[objects.used]
    counts = np.bincount(category, minlength=len(categories))
    pairs = np.unique(category * len(content["images"]) + image)
    images = np.bincount(pairs // len(content["images"]), minlength=len(categories))
    return [(c["name"], int(n), int(m)) for c, n, m in zip(categories, counts, images, strict=True)]


def _find_in_objects(
    content: dict,
    objects: Objects,
    filter_empty: bool,
    limit: float,
    findings: Sequence[Finding],
) -> list[Finding]:
    more = []

    def add(kind: str, key: str, positions: Sequence[int] | np.ndarray, detail: str = "") -> None:
        if len(positions):
            more.append(Finding(kind, positions, place_of(content, key), detail, key))

    used = np.flatnonzero(objects.used)
    if not len(used) and all(finding.level != ERROR for finding in findings):
        add("nothing_to_learn", "annotations", range(len(content["annotations"])))
    rows = np.column_stack([objects.image, objects.category, objects.boxes])[used]
    order = np.lexsort(rows.T)
    same = (rows[order][1:] == rows[order][:-1]).all(axis=1)
    add("object_twice", "annotations", np.sort(used[order[1:][same]]))

    categories = sorted(
        range(len(content["categories"])), key=lambda i: content["categories"][i]["id"]
    )
    counts = np.bincount(objects.category[used], minlength=len(categories))
    if counts.any():
        empty = [categories[i] for i in np.flatnonzero(counts == 0)]
        add("category_without_objects", "categories", empty)

    number = len(content["images"])
    counts = np.bincount(objects.image[used], minlength=number)
    over = f" {limit}: set it to {counts.max(initial=0)} or more"
    add("image_over_limit", "images", np.flatnonzero(counts > limit), over)
    with_objects = counts > 0
    dropped = ~with_objects & filter_empty
    if not content["annotations"]:
        add("nothing_annotated", "images", range(number))
    else:
        add("image_dropped", "images", np.flatnonzero(dropped))
        add("image_without_objects", "images", np.flatnonzero(~with_objects & ~dropped))
    return more


def format_report(report: Report) -> str:
    lines = [f"{report.images:,} images, {report.annotations:,} annotations"]
    for level in LEVELS:
        findings = [f for f in report.findings if f.level == level]
        if findings:
            lines += ["", HEADINGS[level]]
        for finding in findings:
            count = len(finding.positions)
            lines.append(f"{count:>9,}  {finding.title}")
            lines += [f"{'':13}{example}" for example in finding.examples(EXAMPLES)]
            if count > EXAMPLES:
                lines.append(f"{'':13}and {count - EXAMPLES:,} more")
    if report.classes:
        lines += ["", "  objects     images  class"]
        by_objects = sorted(report.classes, key=lambda c: -c[1])
        rows = [f"{n:>9,}  {m:>9,}  {name}" for name, n, m in by_objects]
        if len(rows) > 2 * CLASSES:
            rows[CLASSES:-CLASSES] = [f"{'':22} ... {len(rows) - 2 * CLASSES} more classes ..."]
        lines += rows
    summary = report.to_dict()
    if "best_iou" in summary:
        quantiles = summary["best_iou"]
        lines += [
            "",
            f"IoU of an object with its best anchor: median {quantiles['p50']:.2f}, "
            f"5 % below {quantiles['p5']:.2f}, 1 % below {quantiles['p1']:.2f}; "
            + (
                f"{summary['positives_per_object']:.1f} positives per object"
                if "positives_per_object" in summary
                else "the number of positives depends on predictions"
            ),
        ]
        if summary["median_side"] < TINY:
            lines += [
                "",
                _about_tiny(summary["median_side"], summary.get("share_without_positive")),
            ]
    if "tile_size" in summary:
        lines += [
            "",
            f"Size of tiles, if images are much larger: {summary['tile_size']} pixels, of which "
            f"an object covers {SHARE:.0%} on average (TEST.TILES)",
        ]
    lines += ["", f"Kinds of errors: {report.errors}" if report.errors else "No errors"]
    return "\n".join(lines)


def _about_tiny(side: float, without: float | None) -> str:
    """Return advice, by median side and share of objects without a positive."""
    share = "" if without is None else f", and {without:.1%} get no positive"
    return (
        f"Tiny objects: half of them have sides below {side:.1f} pixels of the network's input"
        f"{share}. With INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TEST and MAX_SIZE_TEST "
        f"{FAIR / side:.1f} times as large, that becomes {FAIR:.0f}; "
        'docs/assignment_statistics.md, "Similarities for tiny objects".'
    )
