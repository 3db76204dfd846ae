"""Reader and check of COCO's format. Only entries with unusual values are examined one by one, so a
million annotations take seconds."""

import json
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .findings import FAULTY_FIELDS, Finding, place_of
from .folders import refuse_unknown_format
from .values import (
    SHAPES,
    are_keypoints,
    is_area,
    is_difficult,
    is_empty,
    is_length,
    is_number,
    is_segmentation,
)

# Required fields. Files for a test server have no annotations.
FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
# Fewer boxes do not show whether they are [x1, y1, x2, y2].
MIN_BOXES_FOR_CORNERS = 10
# Pixels beyond the image up to which a box is not clipped, because of rounding.
BEYOND = 1.0
# Sides, in pixels of the image, below which a box is empty after the image is resized.
SHORTEST = 1e-3
# MB of a json above which a terminal shows that it is read: about two seconds.
NOTED_SIZE = 50


@dataclass(frozen=True)
class Objects:
    """M annotations as arrays, in the order of the json.

    Attributes:
        image: (M,) int64 position in the json's images, -1 if unknown.
        category: (M,) int64 position among the categories sorted by id, -1 if unknown.
        boxes: (M, 4) float64 (x, y, width, height) in pixels; NaN if malformed; clipped if used and
            more than BEYOND outside the image.
        crowd: (M,) bool.
        used: (M,) bool, whether training uses it.
    """

    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    used: np.ndarray


def read_coco(json_file: str) -> dict:
    """Read "images", "categories" and "annotations" (empty if missing) of a json.

    Raises:
        UserError: if the file cannot be read or has another structure.
    """
    try:
        size = os.path.getsize(json_file) >> 20
        note = f"reading {json_file} ({size} MB)" if size >= NOTED_SIZE else ""
        with (
            tqdm(desc=note, bar_format="{desc}", disable=None if note else True, leave=False),
            open(json_file, encoding="utf-8-sig") as file,  # with or without a byte-order mark
        ):
            content = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the annotations {json_file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        refuse_unknown_format(json_file)
        raise UserError(f"{json_file} is not valid json: {error}") from error
    if problem := _wrong_structure(content):
        raise UserError(f"{json_file} is not in COCO's format: {problem}")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{json_file} has an empty list of {key!r}")
    return content | {"annotations": content.get("annotations", [])}


def _wrong_structure(content: object) -> str:
    if not isinstance(content, dict):
        return (
            "expected a dict with images, annotations and categories, got a "
            f"{type(content).__name__}"
        )
    for key in FIELDS:
        if key not in content and key != "annotations":
            return f"it has no {key!r}"
        entries = content.get(key, [])
        if not isinstance(entries, list):
            return f"expected {key!r} to be a list, got a {type(entries).__name__}"
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                return (
                    f"expected entry {position} of {key!r} to be a dict, got {reprlib.repr(entry)}"
                )
    return ""


def category_names(content: dict) -> list[str]:
    """Return the names of the categories by id, Detectron2's order."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def find_in_json(content: dict) -> tuple[list[Finding], Objects | None]:
    """Find faults without opening images.

    Returns:
        findings, and objects; None if required fields or ids are missing or invalid.
    """
    findings = _Findings(content)
    _find_in_fields(content, findings)
    if findings.items:
        return findings.items, None
    objects = _objects(content, findings)
    findings.add("category_name_similar", "categories", _similar_names(content["categories"]))
    return findings.items, objects


class _Findings:
    def __init__(self, content: dict):
        self.content = content
        self.items: list[Finding] = []

    def add(
        self, kind: str, key: str, positions: Iterable[int], place: Callable | None = None
    ) -> None:
        positions = list(positions)
        if positions:
            place = place or place_of(self.content, key, FAULTY_FIELDS.get(kind, ()))
            self.items.append(Finding(kind, positions, place, entries=key))


def _find_in_fields(content: dict, findings: _Findings) -> None:
    for key, fields in FIELDS.items():
        places: dict[int, str] = {}
        for field in fields:
            for i, entry in enumerate(content[key]):
                if field not in entry:
                    places.setdefault(i, f"entry {i} of {key!r} has no {field!r}")
        findings.add("field_missing", key, sorted(places), places.get)
    if findings.items:
        return
    for key, kind in (
        ("images", "image_id_twice"),
        ("categories", "category_id_twice"),
        ("annotations", "annotation_id_twice"),
    ):
        ids = [entry["id"] for entry in content[key]]
        # Evaluation sorts ids of images and categories, but computes with those of annotations.
        text = key != "annotations" and all(type(x) is str for x in ids)
        malformed = _of_other_types(ids, {str} if text else {int})
        findings.add("id_malformed", key, malformed)
        if not malformed:
            findings.add(kind, key, _repeated(ids))

    images, categories = content["images"], content["categories"]
    nameless = [i for i, e in enumerate(images) if is_empty(e["file_name"])]
    findings.add("file_name_malformed", "images", nameless)
    nameless = [i for i, e in enumerate(categories) if is_empty(e["name"])]
    findings.add("category_name_malformed", "categories", nameless)
    sizes = {
        i: f"image {e['id']} ({e['file_name']}), {e['width']!r} x {e['height']!r}"
        for i, e in enumerate(images)
        if not (is_length(e["width"]) and is_length(e["height"]))
    }
    findings.add("image_size_malformed", "images", sizes, sizes.get)


def _objects(content: dict, findings: _Findings) -> Objects:
    images, categories = content["images"], content["categories"]
    annotations = content["annotations"]

    def add(kind: str, is_case: np.ndarray | Sequence[bool]) -> None:
        findings.add(kind, "annotations", np.flatnonzero(is_case))

    image = _look_up(annotations, "image_id", [e["id"] for e in images])
    category = _look_up(annotations, "category_id", sorted(e["id"] for e in categories))
    add("image_unknown", image < 0)
    add("category_unknown", category < 0)
    add("crowd_malformed", [e.get("iscrowd", 0) not in (0, 1) for e in annotations])
    crowd = np.array([e.get("iscrowd", 0) == 1 for e in annotations], dtype=bool)
    add("ignore", [e.get("ignore", 0) != 0 for e in annotations])
    add("segmentation_unusable", [not is_segmentation(e.get("segmentation")) for e in annotations])
    add("keypoints_unusable", [not are_keypoints(e.get("keypoints")) for e in annotations])
    add("object_difficult", list(map(is_difficult, annotations)))

    boxes, malformed = _boxes([e["bbox"] for e in annotations])
    add("box_malformed", malformed)
    finite = np.isfinite(boxes).all(axis=1)
    add("box_not_finite", ~finite & ~malformed)
    add("box_negative", finite & (boxes[:, 2:] < 0).any(axis=1))

    x, y, w, h = np.where(finite[:, None], boxes, 0).T
    sizes = np.array([(e["width"], e["height"]) for e in images], dtype=np.float64)
    width, height = sizes[image].T if len(annotations) else np.zeros((2, 0))
    valid = finite & (image >= 0)
    # A box of one pixel in a corner is rare; if all boxes are such, they are normalised.
    small = finite & (np.maximum(np.maximum(x, y), np.maximum(x + w, y + h)) <= 1)
    small &= ~((w <= 0) | (h <= 0)) & (np.maximum(width, height) > 1)
    all_small = small.any() and bool((small | (w <= 0) | (h <= 0))[finite].all())
    add("box_units" if all_small else "box_small_units", small)
    beyond = np.maximum.reduce([-x, -y, x + w - width, y + h - height]) > BEYOND
    corners = valid & (w > x) & (h > y) & (w <= width) & (h <= height)
    if len(annotations) >= MIN_BOXES_FOR_CORNERS and corners.all() and beyond.mean() >= 0.5:
        add("box_corners", corners)

    used = valid & (category >= 0) & ~crowd
    add("crowd", crowd)
    inside = np.stack([x, y, x + w, y + h], axis=1).clip(0, np.stack([width, height] * 2, axis=1))
    for kind, is_case in (
        ("box_empty", (w < SHORTEST) | (h < SHORTEST)),
        ("box_outside", (inside[:, 2:] - inside[:, :2] < SHORTEST).any(axis=1)),
    ):
        add(kind, used & is_case)
        used &= ~is_case
    add("box_partly_outside", used & beyond)

    add("area_unusable", [not is_area(e.get("area")) or "iscrowd" not in e for e in annotations])
    _find_repeated_files(content, image, findings)
    findings.add("category_name_twice", "categories", _repeated([c["name"] for c in categories]))
    inside[:, 2:] -= inside[:, :2]
    clipped = np.where((used & beyond)[:, None], inside, boxes)
    return Objects(image, category, clipped, crowd, used)


def learnable(content: dict, objects: Objects) -> dict:
    """Keep the objects that training, statistics and evaluation use, and crowds.

    Annotations get the ids 1, 2, ..., because pycocotools takes an id of 0 for "not matched". Boxes
    beyond their image are clipped. A missing area is that of the box. Segmentations and key points
    that Detectron2 cannot read, and annotations of unknown images or classes, are left out. Images
    with a clipped or dropped box are marked as "trimmed".
    """
    kept: list[dict] = []
    whole = (objects.used | objects.crowd) & (objects.image >= 0) & (objects.category >= 0)
    for i in np.flatnonzero(whole):
        entry = dict(content["annotations"][i])
        box = objects.boxes[i].tolist()
        if box != entry["bbox"]:
            entry |= {"bbox": box, "area": box[2] * box[3]}
            whole[i] = False
        for key, is_valid in SHAPES.items():
            if not (entry.get(key) and is_valid(entry[key])):
                entry.pop(key, None)
        kept.append(entry | {"id": len(kept) + 1})
    images = list(content["images"])
    for i in np.unique(objects.image[~whole & (objects.image >= 0)]):
        images[i] = {**images[i], "trimmed": True}
    return {**content, "images": images, "annotations": with_areas(kept)}


def _find_repeated_files(content: dict, image: np.ndarray, findings: _Findings) -> None:
    """Find files in several entries: an error if a converter wrote one entry per object."""
    repeated = _repeated([e["file_name"] for e in content["images"]])
    objects_of: dict[int, list[str]] = {i: [] for i in repeated}
    for i, annotation in zip(image, content["annotations"], strict=True):
        if i in objects_of:
            objects_of[i].append(json.dumps([annotation["category_id"], annotation["bbox"]]))
    by_file = defaultdict(set)
    for i, objects in objects_of.items():
        by_file[content["images"][i]["file_name"]].add(tuple(sorted(objects)))
    differ = {i for i in repeated if len(by_file[content["images"][i]["file_name"]]) > 1}
    findings.add("file_twice", "images", [i for i in repeated if i in differ])
    findings.add("file_repeated", "images", [i for i in repeated if i not in differ])


def _of_other_types(values: Sequence, types: set[type]) -> list[int]:
    if set(map(type, values)) <= types:
        return []
    return [i for i, x in enumerate(values) if type(x) not in types]


def _repeated(values: Sequence) -> list[int]:
    if len(set(values)) == len(values):
        return []
    counts = Counter(values)
    return [i for i, x in enumerate(values) if counts[x] > 1]


def _similar_names(categories: Sequence[dict]) -> list[int]:
    """Return positions of names that differ only in case or blanks, side by side."""
    plain = ["".join(c["name"].split()).casefold() for c in categories]
    names_of = defaultdict(set)
    for key, category in zip(plain, categories, strict=True):
        names_of[key].add(category["name"])
    return sorted((i for i, x in enumerate(plain) if len(names_of[x]) > 1), key=plain.__getitem__)


def _look_up(entries: Sequence[dict], field: str, ids: Sequence) -> np.ndarray:
    position = {x: i for i, x in enumerate(ids)}
    values = [e[field] for e in entries]
    for i in _of_other_types(values, {int, str}):
        values[i] = None
    return np.fromiter((position.get(x, -1) for x in values), np.int64, len(values))


def _boxes(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Return (M, 4) float64, and (M,) bool, whether malformed (NaN)."""
    try:
        boxes = np.array(values)
        if boxes.dtype.kind in "if" and boxes.shape == (len(values), 4):
            return boxes.astype(np.float64), np.zeros(len(values), dtype=bool)
    except (ValueError, OverflowError):
        pass  # of several lengths, or with a number too large
    malformed = [
        not (isinstance(b, list) and len(b) == 4 and all(map(is_number, b))) for b in values
    ]
    rows = [[np.nan] * 4 if bad else b for b, bad in zip(values, malformed, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 4), np.array(malformed, dtype=bool)


def with_areas(annotations: Sequence[dict]) -> list[dict]:
    """Add missing areas, those of the boxes, and missing ``iscrowd``."""
    completed = []
    for entry in annotations:
        area = entry["area"] if is_area(entry.get("area")) else entry["bbox"][2] * entry["bbox"][3]
        completed.append({**entry, "area": area, "iscrowd": entry.get("iscrowd", 0)})
    return completed
