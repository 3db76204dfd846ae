"""The page of a data set: findings, counts, and pictures of its oddest images with their labels."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import read_image
from ..errors import UserError
from ..labels.check import EXAMPLES, HEADINGS, Report
from ..labels.coco import Objects, category_names
from ..labels.findings import DROPPED, LEVELS
from ..labels.formats import Labels
from .oddities import Case, choose
from .template import write
from .thumbnails import thumbnail

Row = dict[str, Any]

# Further cases of a finding, and sizes of images, that are listed.
LISTED, IMAGE_SIZES = 50, 10
# Colours of classes; further classes repeat them.
COLOURS = 8
# Objects of a picture up to which they have their names, boxes of a picture, letters of a name.
NAMED, BOXES, LONGEST_NAME = 8, 300, 40
# Share of the image's longer side below which odd objects are shown enlarged, in a part of it
# that is AROUND times as long as they and at least LEAST_PART pixels.
SMALL, AROUND, LEAST_PART = 0.05, 12, 64
# Bytes of all pictures, and of a box in the page.
ROOM, BYTES_OF_BOX = 8_000_000, 200
# Pixels from which a coordinate is far outside every image; float64 can add them.
FAR = 1e9
# Lower bounds of the bins, the last one without an end.
NUMBERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
# By area, as COCO's small, medium and large objects.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}
SHAPES = {
    "below 1 : 4": (0, 1 / 4),
    "1 : 4 to 1 : 2": (1 / 4, 1 / 2),
    "1 : 2 to 4 : 5": (1 / 2, 4 / 5),
    "4 : 5 to 5 : 4": (4 / 5, 5 / 4),
    "5 : 4 to 2 : 1": (5 / 4, 2),
    "2 : 1 to 4 : 1": (2, 4),
    "from 4 : 1": (4, np.inf),
}


@dataclass(frozen=True)
class Part:
    """The part of an image that a picture shows, in pixels."""

    x: int
    y: int
    width: int
    height: int


def write_dataset_page(
    labels: Labels, report: Report, source: tuple[str, str], target: Path
) -> None:
    """Write the page. About 60 images are decoded, whatever the size of the data set.

    Args:
        report: of :func:`~atss.labels.check.check`.
        source: of the labels, annotations and images.

    Raises:
        OSError: if ``target`` cannot be written.
    """
    content, objects = labels.content, report.objects
    groups = show_groups(labels, report)
    sections = [("findings", "Findings")]
    if objects is not None:
        sections += [("pictures", "Pictures"), ("numbers", "Sizes and numbers")]
        sections += [("classes", "Classes")]
    write(
        "dataset.html",
        target,
        title=f"Data set: {':'.join(Path(x).name or x for x in source)}",
        subtitle=(
            f"{':'.join(source)}: {report.images:,} images, {report.annotations:,} annotations, "
            f"{len(content['categories']):,} classes."
        ),
        messages=messages(report),
        sections=sections,
        tiles=tiles(report),
        findings=findings(report),
        classes=[] if objects is None else classes(report, objects),
        tables=[] if objects is None else tables(content, report, objects),
        groups=groups,
        number=sum(len(group["pictures"]) for group in groups),
    )


def messages(report: Report) -> list[str]:
    """Return sentences on errors, and on what leaves the page empty."""
    found = []
    if report.errors:
        found.append(f"Training would stop or go wrong: {report.errors} kinds of errors.")
    if report.objects is None:
        found.append("Objects cannot be counted and drawn before these errors are mended.")
    elif not report.objects.used.any():
        found.append("There are no objects to train on.")
    return found


def tiles(report: Report) -> list[tuple[str, str]]:
    facts = {"images": report.images, "kinds of errors": report.errors}
    if report.objects is not None:
        used, images = report.objects.used, report.objects.image
        facts |= {
            "objects in training": int(used.sum()),
            "objects left out": int((~used).sum()),
            "images without objects": report.images - len(np.unique(images[used])),
        }
    summary = report.to_dict()
    shown = [(f"{value:,}", name) for name, value in facts.items()]
    if "median_side" in summary:
        shown.append((f"{summary['median_side']:.0f} px", "median side in the network's input"))
    if "share_without_positive" in summary:
        shown.append((f"{summary['share_without_positive']:.1%}", "objects without a positive"))
    return shown


def findings(report: Report) -> list[Row]:
    """Return the findings by level; the level of objects left out is there without findings too."""
    by_level: dict[str, list[Row]] = {level: [] for level in LEVELS}
    for finding in report.findings:
        places = finding.examples(EXAMPLES + LISTED)
        row = {"title": finding.title, "count": len(finding.positions)}
        row |= {"places": places[:EXAMPLES], "more": places[EXAMPLES:]}
        by_level[finding.level].append(row)
    return [
        {"title": HEADINGS[level], "rows": rows}
        for level, rows in by_level.items()
        if rows or level == DROPPED
    ]


def classes(report: Report, objects: Objects) -> list[Row]:
    """Return a row for each class, most objects first."""
    count = len(report.classes)
    category, area = objects.category[objects.used], objects.boxes[objects.used, 2:].prod(axis=1)
    columns = {
        size: np.bincount(category[(area >= low) & (area < high)], minlength=count)
        for size, (low, high) in SIZES.items()
    }
    left_out = objects.category[~objects.used]
    columns["left_out"] = np.bincount(left_out[left_out >= 0], minlength=count)
    most = max((number for _, number, _ in report.classes), default=0) or 1
    rows = [
        {
            "name": name,
            "colour": k % COLOURS,
            "objects": number,
            "images": images,
            "share": 100 * number / most,
            **{key: int(values[k]) for key, values in columns.items()},
        }
        for k, (name, number, images) in enumerate(report.classes)
    ]
    return sorted(rows, key=lambda row: -row["objects"])


def tables(content: dict, report: Report, objects: Objects) -> list[Row]:
    """Return tables with a bar for each row: how many images or objects are in a bin."""
    used = objects.boxes[objects.used]
    numbers = np.bincount(objects.image[objects.used], minlength=report.images)
    sizes = Counter((int(e["width"]), int(e["height"])) for e in content["images"])
    common = {f"{w} x {h}": number for (w, h), number in sizes.most_common(IMAGE_SIZES)}
    if rest := len(sizes) - len(common):
        common[f"{rest:,} other sizes"] = len(content["images"]) - sum(common.values())
    side, shape = np.sqrt(used[:, 2] * used[:, 3]), used[:, 2] / used[:, 3]
    return [
        _table("objects of an image", "images", _count(numbers, _bins(NUMBERS, whole=True))),
        _table("side in pixels", "objects", _count(side, _bins(SIDES))),
        _table("width : height", "objects", _count(shape, SHAPES)),
        _table("size of image", "images", common),
    ]


def _bins(bounds: Sequence[int], whole: bool = False) -> dict[str, tuple[float, float]]:
    """Return {label: (first, end)}; labels of whole numbers name the last number inside."""
    bins: dict[str, tuple[float, float]] = {}
    for low, high in pairwise(bounds):
        last = high - 1 if whole else high
        bins[str(low) if low == last else f"{low} to {last}"] = low, high
    return {**bins, f"from {bounds[-1]}": (bounds[-1], np.inf)}


def _count(values: np.ndarray, bins: dict[str, tuple[float, float]]) -> dict[str, int]:
    """Return the numbers of values by bin, without empty bins at both ends."""
    counts = [int(((values >= low) & (values < high)).sum()) for low, high in bins.values()]
    filled = np.flatnonzero(counts)
    kept = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0)
    return dict(list(zip(bins, counts, strict=True))[kept])


def _table(name: str, unit: str, counts: dict[str, int]) -> Row:
    most = max(counts.values(), default=1)
    rows = [{"label": x, "count": n, "share": 100 * n / most} for x, n in counts.items()]
    return {"name": name, "unit": unit, "rows": rows}


def show_groups(labels: Labels, report: Report) -> list[Row]:
    """Return the groups of :func:`choose` with their pictures."""
    if report.objects is None:
        return []
    order = np.argsort(report.objects.image, kind="stable")
    starts = np.searchsorted(report.objects.image[order], np.arange(report.images + 1))
    room, groups = ROOM, []
    for group in choose(labels.content, report):
        pictures = []
        for image, cases in group.images.items():
            members = order[starts[image] : starts[image + 1]].tolist()
            picture = show(labels, report.objects, image, members, cases, room > 0)
            room -= len(picture["source"]) + BYTES_OF_BOX * len(picture["boxes"])
            pictures.append(picture)
        groups.append({"title": group.title, "note": group.note, "pictures": pictures})
    return groups


def show(
    labels: Labels,
    objects: Objects,
    image: int,
    members: Sequence[int],
    cases: Sequence[Case],
    has_room: bool,
) -> Row:
    """Return an image with its labels.

    Args:
        members: all annotations of the image.
        has_room: False draws nothing, because the page is full.
    """
    names = category_names(labels.content)
    file_name = labels.content["images"][image]["file_name"]
    counts = Counter(int(objects.category[i]) for i in members if objects.used[i])
    left_out = sum(not objects.used[i] for i in members)
    picture = {
        "file_name": file_name,
        "reasons": [case.reason for case in cases],
        "counts": [(n, names[k], k % COLOURS) for k, n in counts.most_common(COLOURS)],
        "further": len(counts) - min(len(counts), COLOURS),
        "left_out": left_out,
        "source": "",
        "problem": "",
        "boxes": [],
        "not_drawn": 0,
    }
    if not has_room:
        return {**picture, "problem": "not drawn: the page is full"}
    try:
        pixels = read_image(os.path.join(labels.image_dir, file_name))
    except (OSError, UserError) as error:
        return {**picture, "problem": f"not drawn: {error}"}
    highlighted = dict.fromkeys(i for case in cases for i in case.objects)
    height, width = pixels.shape[:2]
    part = part_of(width, height, objects.boxes[[*highlighted]])
    pixels = pixels[part.y : part.y + part.height, part.x : part.x + part.width]
    boxes = []
    for i in (*highlighted, *(i for i in members if i not in highlighted)):
        named = len(members) <= NAMED or (i in highlighted and len(highlighted) <= NAMED)
        name = names[objects.category[i]] if objects.category[i] >= 0 else "unknown class"
        if box := _box(objects.boxes[i], part):
            kinds = {"odd": i in highlighted, "out": not objects.used[i]}
            colour = int(objects.category[i]) % COLOURS
            at_end = box["x"] > part.x + 0.8 * part.width
            text = {"name": name[:LONGEST_NAME], "named": named, "at_end": at_end}
            boxes.append({**box, **text, "colour": colour, **kinds})
    return {
        **picture,
        "source": thumbnail(pixels, ()),
        "part": part,
        "whole": (width, height) == (part.width, part.height),
        "unit": max(part.width, part.height) / 400,  # about a pixel of the page
        "boxes": boxes[:BOXES],
        "not_drawn": max(len(boxes) - BOXES, 0),
    }


def part_of(width: int, height: int, odd: np.ndarray) -> Part:
    """Return the surroundings of the odd objects if they are small, else the whole image.

    Args:
        odd: (m, 4) boxes of the odd objects.
    """
    if not (len(odd) and odd[:, 2:].max() < SMALL * max(width, height)):  # also if NaN
        return Part(0, 0, width, height)
    low, high = odd[:, :2].min(axis=0), (odd[:, :2] + odd[:, 2:]).max(axis=0)
    side = int(max(AROUND * odd[:, 2:].max(), 1.5 * (high - low).max(), LEAST_PART))
    (x, part_width), (y, part_height) = (
        _stretch(middle, side, length)
        for middle, length in zip((low + high) / 2, (width, height), strict=True)
    )
    return Part(x, y, part_width, part_height)


def _stretch(middle: float, side: int, length: int) -> tuple[int, int]:
    """Return where ``side`` pixels around a point begin, inside ``length``; the point may be
    outside."""
    side = min(side, length)
    return int(np.clip(middle - side / 2, 0, length - side)), side


def _box(box: np.ndarray, part: Part) -> Row | None:
    """Return a box as an svg's rect; None if it is not finite or outside the part."""
    first, end = np.array([part.x, part.y]), np.array([part.width, part.height])
    end += first
    corners = np.cumsum(box.reshape(2, 2).clip(-FAR, FAR), axis=0)  # NaN stays
    low, high = corners.min(axis=0), corners.max(axis=0)
    if not ((low <= end) & (high >= first)).all():  # also if NaN
        return None
    # Far edges are outside the picture anyway.
    low, high = np.maximum(low, 2 * first - end), np.minimum(high, 2 * end - first)
    x, y, width, height = np.concatenate([low, high - low]).round(2).tolist()
    return {"x": x, "y": y, "width": width, "height": height}
