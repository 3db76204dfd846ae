"""Choice of the images to look at before training: the oddest of a data set, and some others.

Only labels are read, so the choice takes seconds for 100,000 images.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..labels.check import Report
from ..labels.coco import Objects, category_names
from ..labels.findings import Finding

# Pictures of one kind of finding.
OF_A_FINDING = 4
# Share of the mean number of objects of a class below which a class is rare.
RARE = 0.2
# Ratio of width / height of an object to the median of its class from which a shape is unusual.
UNUSUAL = 3.0
# Pictures of images without a reason.
OTHERS = 10


class Case(NamedTuple):
    """A reason to look at an image.

    Attributes:
        image: position in the json.
        reason: sentence.
        objects: positions of annotations in the json.
    """

    image: int
    reason: str
    objects: tuple[int, ...] = ()


class Group(NamedTuple):
    """Images of one kind of reason, oddest first.

    Attributes:
        images: position -> all cases of the image. An image is in the first group that chooses it.
    """

    title: str
    note: str
    images: dict[int, list[Case]]


def choose(content: dict, report: Report) -> list[Group]:
    """Return the groups of images to look at; none if the report has no objects."""
    if report.objects is None:
        return []
    groups: list[Group] = []
    chosen: dict[int, list[Case]] = {}
    for title, note, find, most, share in SOURCES:
        images: dict[int, list[Case]] = {}
        cases = find(content, report, report.objects)
        for case in islice(cases, min(most, math.ceil(share * report.images))):
            if case.image not in chosen:
                images[case.image] = chosen[case.image] = []
            chosen[case.image].append(case)
        groups.append(Group(title, note, images))
    others = [i for i in range(report.images) if i not in chosen]
    index = np.linspace(0, len(others) - 1, min(OTHERS, len(others))).round().astype(int)
    note = "Evenly spaced among the other images, to compare."
    groups.append(Group("Others", note, {others[k]: [] for k in index}))
    return [group for group in groups if group.images]


def of_findings(content: dict, report: Report, objects: Objects) -> Iterator[Case]:
    """Yield the images with most cases of each finding, errors first."""
    for finding in report.findings:
        if finding.entries == "images":
            for i in finding.positions[:OF_A_FINDING]:
                yield Case(int(i), f"{finding.title}: {finding.place(int(i))}")
        elif finding.entries == "annotations":
            yield from _of_annotations(finding, objects)


def _of_annotations(finding: Finding, objects: Objects) -> Iterator[Case]:
    positions = np.asarray(finding.positions)
    image_of = objects.image[positions]
    images, counts = np.unique(image_of[image_of >= 0], return_counts=True)
    for image in images[np.argsort(-counts, kind="stable")][:OF_A_FINDING]:
        cases = tuple(positions[image_of == image].tolist())
        yield Case(int(image), f"{finding.title} ({len(cases)} here)", cases)


def smallest(content: dict, report: Report, objects: Objects) -> Iterator[Case]:
    """Yield the images with the smallest objects, relative to the image."""
    names, used = category_names(content), np.flatnonzero(objects.used)
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    share = (objects.boxes[used, 2:] / sides[objects.image[used]]).prod(axis=1)
    for i in _first_of_images(used[np.argsort(share, kind="stable")], objects):
        name = names[objects.category[i]]
        yield Case(int(objects.image[i]), f"smallest: {name} of {_size(objects, i)} pixels", (i,))


def crowded(content: dict, report: Report, objects: Objects) -> Iterator[Case]:
    """Yield the images with most objects."""
    counts = np.bincount(objects.image[objects.used], minlength=report.images)
    for i in np.argsort(-counts, kind="stable").tolist():
        if counts[i] > 1:
            yield Case(i, f"most objects: {counts[i]}")


def rare(content: dict, report: Report, objects: Objects) -> Iterator[Case]:
    """Yield for each rare class, rarest first, the image with most of its objects."""
    counts = np.array([number for _, number, _ in report.classes])
    for k in np.argsort(counts, kind="stable").tolist():
        name, number, images = report.classes[k]
        if 0 < number < RARE * counts.mean():
            members = np.flatnonzero(objects.used & (objects.category == k))
            image = int(np.bincount(objects.image[members]).argmax())
            here = tuple(members[objects.image[members] == image].tolist())
            yield Case(image, f"rare class: {name}, {number} objects on {images} images", here)


def unusual_shapes(content: dict, report: Report, objects: Objects) -> Iterator[Case]:
    """Yield the images with objects whose width / height is farthest from the median of their
    class."""
    names, used = category_names(content), np.flatnonzero(objects.used)
    ratio = np.log(objects.boxes[used, 2] / objects.boxes[used, 3])
    category = objects.category[used]
    order = np.argsort(category, kind="stable")
    median = np.zeros(len(names))
    for members in np.split(order, np.flatnonzero(np.diff(category[order])) + 1):
        if len(members):
            median[category[members[0]]] = np.median(ratio[members])
    distance = np.abs(ratio - median[category])
    order = np.argsort(-distance, kind="stable")
    for i in _first_of_images(used[order[distance[order] > math.log(UNUSUAL)]], objects):
        width, height = objects.boxes[i, 2:]
        usual = math.exp(median[objects.category[i]])
        reason = (
            f"unusual shape: {names[objects.category[i]]} of {_size(objects, i)} pixels, width / "
            f"height {width / height:.2g}, the median of the class {usual:.2g}"
        )
        yield Case(int(objects.image[i]), reason, (i,))


def _size(objects: Objects, i: int) -> str:
    return "{:.3g} x {:.3g}".format(*objects.boxes[i, 2:])


def _first_of_images(order: np.ndarray, objects: Objects) -> Iterator[int]:
    """Yield the first object of each image."""
    _, first = np.unique(objects.image[order], return_index=True)
    yield from order[np.sort(first)].tolist()


# Title, note, cases in order, the most cases, and the most as a share of the images.
SOURCES: tuple[tuple[str, str, Callable[[dict, Report, Objects], Iterator[Case]], int, float], ...]
SOURCES = (
    ("Findings", "Images of the findings above, errors first.", of_findings, 20, 4.0),
    ("Smallest objects", "Relative to their image.", smallest, 8, 0.1),
    ("Most objects", "", crowded, 6, 0.1),
    (
        "Rare classes",
        f"Classes with less than {RARE:g} of the mean number of objects of a class.",
        rare,
        8,
        1.0,
    ),
    (
        "Unusual shapes",
        f"Width / height is more than {UNUSUAL:g} times the median of the class, or less than "
        f"1 / {UNUSUAL:g} of it.",
        unusual_shapes,
        8,
        0.1,
    ),
)
