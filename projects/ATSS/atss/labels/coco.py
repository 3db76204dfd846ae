"""Reads annotations in COCO's format, and finds what is wrong with them: cheap enough for every
start of a training (a million annotations take seconds), because only odd entries are looked at one
by one."""

import json
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .findings import Finding

# What every entry must have. Files for a test server have no annotations.
FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
# Fewer boxes than this do not show in which order their numbers are.
BOXES_THAT_TELL = 10
# The fields at fault, of findings about something else than a box.
FAULTY_FIELDS = {
    "id_malformed": ("id",),
    "file_name_malformed": ("file_name",),
    "category_name_malformed": ("name",),
    "category_name_similar": ("name",),
    "image_unknown": ("image_id",),
    "category_unknown": ("category_id",),
    "crowd_malformed": ("iscrowd",),
    "ignore": ("ignore",),
    "segmentation_unusable": ("segmentation",),
    "keypoints_unusable": ("keypoints",),
    "area_unusable": ("area", "iscrowd"),
}
# What json holds, for people.
TYPES = {
    str: "text",
    int: "a whole number",
    float: "a decimal number",
    bool: "a truth value",
    type(None): "null",
    list: "a list",
    dict: "a dictionary",
}
# Farther beyond its image than by rounding, in pixels.
BEYOND = 1.0
# Sides below this, in pixels of the image, vanish in training once the image is resized.
SHORTEST = 1e-3


@dataclass(frozen=True)
class Objects:
    """The annotations as arrays, in the order of the json; M of them.

    Attributes:
        image: (M,) int64 position in the json's images, -1 where unknown.
        category: (M,) int64 position among the categories sorted by id, -1 where unknown.
        boxes: (M, 4) float64 (x, y, width, height) in pixels; NaN where malformed; of used ones
            that reach more than BEYOND out of their image the part inside.
        crowd: (M,) bool.
        used: (M,) bool: training learns it, as far as the json tells.
    """

    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    used: np.ndarray


def read_coco(json_file: str) -> dict:
    """The content of a file in COCO's format: lists of dictionaries under "images", "categories"
    and "annotations" (empty where there are none).

    Raises:
        ValueError: with a sentence that names the file, where it is something else.
    """
    try:
        with open(json_file, encoding="utf-8-sig") as file:  # with or without a mark
            content = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the annotations {json_file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not json: {error}") from error
    problem = _structure(content)
    if problem:
        raise UserError(f"{json_file} is not in COCO's format: {problem}")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{json_file} has an empty list of {key!r}")
    return content | {"annotations": content.get("annotations", [])}


def _structure(content: object) -> str | None:
    if not isinstance(content, dict):
        return (
            f"it is a {type(content).__name__}, where a dictionary with images, annotations and "
            "categories belongs"
        )
    for key in FIELDS:
        if key not in content and key != "annotations":
            return f"it has no {key!r}"
        entries = content.get(key, [])
        if not isinstance(entries, list):
            return f"its {key!r} is a {type(entries).__name__}, where a list belongs"
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                return (
                    f"entry {position} of {key!r} is {reprlib.repr(entry)}, where a dictionary "
                    "belongs"
                )
    return None


def category_names(content: dict) -> list[str]:
    """Names of the categories in the order of their ids, as Detectron2 numbers them."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def find_in_json(content: dict) -> tuple[list[Finding], Objects | None]:
    """What is wrong with annotations, the gravest first, without a look at an image.

    Args:
        content: as from :func:`read_coco`.
    Returns:
        the findings, and the objects; None where fields or ids do not hold them together.
    """
    findings = _Findings(content)
    _find_in_fields(content, findings)
    if findings.found:
        return findings.found, None
    objects = _objects(content, findings)
    findings.add("category_name_similar", "categories", _similar_names(content["categories"]))
    return findings.found, objects


class _Findings:
    """Collects findings; names entries of the json for people."""

    def __init__(self, content: dict):
        self.content = content
        self.found: list[Finding] = []

    def add(
        self, kind: str, key: str, positions: Iterable[int], place: Callable | None = None
    ) -> None:
        """Entries at these positions of the list ``key`` are of this kind."""
        positions = list(positions)
        if positions:
            place = place or place_of(self.content, key, FAULTY_FIELDS.get(kind, ()))
            self.found.append(Finding(kind, positions, place))


def place_of(content: dict, key: str, fields: Sequence[str] = ()) -> Callable[[int], str]:
    """Names the entries of the list ``key``: position -> such as "image 3 (a.jpg)".

    Args:
        fields: whose values are shown too; by default the box of annotations.
    """
    entries = content[key]

    def values(i: int, fields: Sequence[str]) -> str:
        return "".join(f", {_value(content, entries[i], field)}" for field in fields)

    if key == "images":
        return lambda i: f"image {entries[i]['id']} ({entries[i]['file_name']}){values(i, fields)}"
    if key == "categories":
        return lambda i: f"category {entries[i]['id']} ({entries[i]['name']}){values(i, fields)}"
    files: dict = {}

    def annotation(i: int) -> str:
        if not files:
            files.update({image["id"]: image["file_name"] for image in content["images"]})
        entry = entries[i]
        image = entry["image_id"]
        known = isinstance(image, int | str) and image in files
        where = files[image] if known else f"image {image}"
        return f"annotation {entry['id']} of {where}{values(i, fields or ('bbox',))}"

    return annotation


def _value(content: dict, entry: dict, field: str) -> str:
    """The value of a field, and its type if ids have another."""
    if field not in entry:
        return f"no {field}"
    value, shown = entry[field], f"{field} {show(entry[field])}"
    if field not in ("id", "image_id", "category_id"):
        return shown
    key = {"image_id": "images", "category_id": "categories"}.get(field)
    type_of_ids = type(content[key][0]["id"]) if key else int
    if type(value) is type_of_ids:
        return shown
    ids = "text" if type_of_ids is str else "whole numbers"
    return f"{shown} is {TYPES[type(value)]}, and ids are {ids}"


def show(value: object) -> str:
    """A value of a json for people, at a length that a sentence can bear."""
    short = reprlib.Repr()
    short.maxlist = short.maxstring = 60  # all key points of a person
    return short.repr(value)


def _find_in_fields(content: dict, findings: _Findings) -> None:
    """Fields without which entries cannot be told apart: present, of their type, unique."""
    for key, fields in FIELDS.items():
        lacks: dict[int, str] = {}
        for field in fields:
            for i, entry in enumerate(content[key]):
                if field not in entry:
                    lacks.setdefault(i, f"entry {i} of {key!r} has no {field!r}")
        findings.add("field_missing", key, sorted(lacks), lacks.get)
    if findings.found:
        return
    for key, kind in (
        ("images", "image_id_twice"),
        ("categories", "category_id_twice"),
        ("annotations", "annotation_id_twice"),
    ):
        ids = [entry["id"] for entry in content[key]]
        # Evaluation computes with the ids of annotations, and sorts the others.
        text = key != "annotations" and all(type(x) is str for x in ids)
        malformed = _odd(ids, {str} if text else {int})
        findings.add("id_malformed", key, malformed)
        if not malformed:
            findings.add(kind, key, _repeated(ids))

    images, categories = content["images"], content["categories"]
    findings.add(
        "file_name_malformed", "images", _where(images, lambda e: is_empty(e["file_name"]))
    )
    nameless = _where(categories, lambda e: is_empty(e["name"]))
    findings.add("category_name_malformed", "categories", nameless)
    sizes = {
        i: f"image {e['id']} ({e['file_name']}), {e['width']!r} x {e['height']!r}"
        for i, e in enumerate(images)
        if not (is_length(e["width"]) and is_length(e["height"]))
    }
    findings.add("image_size_malformed", "images", sizes, sizes.get)


def _objects(content: dict, findings: _Findings) -> Objects:
    """The annotations as arrays, and what is wrong with them one by one."""
    images, categories = content["images"], content["categories"]
    annotations = content["annotations"]

    def add(kind: str, where: np.ndarray | Sequence[bool]) -> None:
        findings.add(kind, "annotations", np.flatnonzero(where))

    image = _look_up(annotations, "image_id", [e["id"] for e in images])
    category = _look_up(annotations, "category_id", sorted(e["id"] for e in categories))
    add("image_unknown", image < 0)
    add("category_unknown", category < 0)
    add("crowd_malformed", [e.get("iscrowd", 0) not in (0, 1) for e in annotations])
    crowd = np.array([e.get("iscrowd", 0) == 1 for e in annotations], dtype=bool)
    add("ignore", [e.get("ignore", 0) != 0 for e in annotations])
    add("segmentation_unusable", [not _is_segmentation(e.get("segmentation")) for e in annotations])
    add("keypoints_unusable", [not _are_keypoints(e.get("keypoints")) for e in annotations])
    add("object_difficult", list(map(is_difficult, annotations)))

    boxes, malformed = _boxes([e["bbox"] for e in annotations])
    add("box_malformed", malformed)
    finite = np.isfinite(boxes).all(axis=1)
    add("box_not_finite", ~finite & ~malformed)
    add("box_negative", finite & (boxes[:, 2:] < 0).any(axis=1))

    x, y, w, h = np.where(finite[:, None], boxes, 0).T
    sizes = np.array([(e["width"], e["height"]) for e in images], dtype=np.float64)
    width, height = sizes[image].T if len(annotations) else np.zeros((2, 0))
    known = finite & (image >= 0)
    # A single pixel in a corner is rare; a data set of nothing else is in other units.
    shares = finite & (np.maximum(np.maximum(x, y), np.maximum(x + w, y + h)) <= 1)
    shares &= ~((w <= 0) | (h <= 0)) & (np.maximum(width, height) > 1)
    in_shares = shares.any() and bool((shares | (w <= 0) | (h <= 0))[finite].all())
    add("box_units" if in_shares else "box_small_units", shares)
    beyond = np.maximum.reduce([-x, -y, x + w - width, y + h - height]) > BEYOND
    corners = known & (w > x) & (h > y) & (w <= width) & (h <= height)
    if len(annotations) >= BOXES_THAT_TELL and corners.all() and beyond.mean() >= 0.5:
        add("box_corners", corners)

    used = known & (category >= 0) & ~crowd
    add("crowd", crowd)
    inside = np.stack([x, y, x + w, y + h], axis=1).clip(0, np.stack([width, height] * 2, axis=1))
    for kind, where in (
        ("box_empty", (w < SHORTEST) | (h < SHORTEST)),
        ("box_outside", (inside[:, 2:] - inside[:, :2] < SHORTEST).any(axis=1)),
    ):
        add(kind, used & where)
        used &= ~where
    add("box_partly_outside", used & beyond)

    add("area_unusable", [not is_area(e.get("area")) or "iscrowd" not in e for e in annotations])
    _find_repeated_files(content, image, findings)
    findings.add("category_name_twice", "categories", _repeated([c["name"] for c in categories]))
    inside[:, 2:] -= inside[:, :2]
    clipped = np.where((used & beyond)[:, None], inside, boxes)
    return Objects(image, category, clipped, crowd, used)


def learnable(content: dict, objects: Objects) -> dict:
    """The content with the objects that training uses and with crowds, and without the rest: what
    is an object is decided here, for training, statistics and evaluation alike.

    Annotations are numbered 1, 2, ...: the ids of a file may be 0, which pycocotools takes for "not
    found". Boxes that reach beyond their image are clipped. A missing area is that of the box.
    Segmentations and key points that Detectron2 cannot read are left out. Images of which a box was
    clipped or left out are marked as "trimmed".

    Args:
        content, objects: as from :func:`find_in_json`. Annotations of unknown images or classes are
            left out.
    """
    kept: list[dict] = []
    known = (objects.image >= 0) & (objects.category >= 0)
    whole = (objects.used | objects.crowd) & known
    for i in np.flatnonzero(whole):
        entry = dict(content["annotations"][i])
        box = objects.boxes[i].tolist()
        if box != entry["bbox"]:
            entry |= {"bbox": box, "area": box[2] * box[3]}
            whole[i] = False
        for key, is_sound in SHAPES.items():
            if not (entry.get(key) and is_sound(entry[key])):
                entry.pop(key, None)
        kept.append(entry | {"id": len(kept) + 1})
    images = list(content["images"])
    for i in np.unique(objects.image[~whole & (objects.image >= 0)]):
        images[i] = {**images[i], "trimmed": True}
    return {**content, "images": images, "annotations": with_areas(kept)}


def _find_repeated_files(content: dict, image: np.ndarray, findings: _Findings) -> None:
    """One file in several entries: an error where a converter wrote one entry per object."""
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


def _where(entries: Sequence, condition: Callable[[dict], bool]) -> list[int]:
    return [i for i, entry in enumerate(entries) if condition(entry)]


def _odd(values: Sequence, types: set[type]) -> list[int]:
    """Positions of values of other types than these."""
    if set(map(type, values)) <= types:
        return []
    return [i for i, x in enumerate(values) if type(x) not in types]


def _repeated(values: Sequence) -> list[int]:
    """Positions of values that are there more than once."""
    if len(set(values)) == len(values):
        return []
    counts = Counter(values)
    return [i for i, x in enumerate(values) if counts[x] > 1]


def _similar_names(categories: Sequence[dict]) -> list[int]:
    """Positions of names that differ from others by case or blanks alone, similar ones adjacent."""
    plain = ["".join(c["name"].split()).casefold() for c in categories]
    names_of = defaultdict(set)
    for key, category in zip(plain, categories, strict=True):
        names_of[key].add(category["name"])
    return sorted((i for i, x in enumerate(plain) if len(names_of[x]) > 1), key=plain.__getitem__)


def is_empty(text: object) -> bool:
    """Whether it is no text, or an empty one."""
    return not isinstance(text, str) or not text.strip()


def is_length(x: object) -> bool:
    """Whether a side of an image can be that long: 640, or 640.0."""
    return (type(x) is int or type(x) is float) and 0 < x < 2**31 and x == int(x)


def _look_up(entries: Sequence[dict], field: str, ids: Sequence) -> np.ndarray:
    """(M,) position of each entry's field among the ids, -1 where it is none of them."""
    position = {x: i for i, x in enumerate(ids)}
    values = [e[field] for e in entries]
    for i in _odd(values, {int, str}):
        values[i] = None
    return np.fromiter((position.get(x, -1) for x in values), np.int64, len(values))


def _is_segmentation(value: object) -> bool:
    """Whether Detectron2 can read it, or there is none."""
    if not value:
        return True
    if isinstance(value, list):
        return any(is_polygon(x) for x in value) and all(isinstance(x, list) for x in value)
    return isinstance(value, dict) and _are_run_lengths(**value)


def is_polygon(value: object) -> bool:
    return isinstance(value, list) and len(value) % 2 == 0 and len(value) >= 6


def _are_run_lengths(counts: object = None, size: object = None, **_: object) -> bool:
    """Whether pycocotools, which compresses them, takes them."""
    if not (isinstance(size, list) and len(size) == 2 and all(map(is_length, size))):
        return False
    if isinstance(counts, list):
        return all(type(x) in (int, float) and 0 <= x < 2**32 for x in counts)
    return isinstance(counts, str)


def _are_keypoints(value: object) -> bool:
    """Whether Detectron2, which moves x and y by half a pixel even where only boxes are learnt, can
    compute with them. It does not look at every third, the visibility."""
    if not value:
        return True
    return isinstance(value, list) and all(_is_number(x) for i, x in enumerate(value) if i % 3 < 2)


# What an object may have besides its box, and whether Detectron2 can read it.
SHAPES = {"segmentation": _is_segmentation, "keypoints": _are_keypoints}


def _boxes(values: list) -> tuple[np.ndarray, np.ndarray]:
    """(M, 4) float64, NaN where malformed, and (M,) bool: is malformed."""
    try:
        boxes = np.array(values)
        if boxes.dtype.kind in "if" and boxes.shape == (len(values), 4):
            return boxes.astype(np.float64), np.zeros(len(values), dtype=bool)
    except (ValueError, OverflowError):
        pass  # of several lengths, or with a number beyond all bounds
    malformed = [
        not (isinstance(b, list) and len(b) == 4 and all(map(_is_number, b))) for b in values
    ]
    nothing = [np.nan] * 4
    rows = [nothing if bad else b for b, bad in zip(values, malformed, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 4), np.array(malformed, dtype=bool)


def is_difficult(annotation: dict) -> bool:
    """Whether evaluation passes over it by Pascal VOC's rule; crowds have a rule of their own."""
    return annotation.get("difficult") == 1 and not annotation.get("iscrowd")


def is_area(x: object) -> bool:
    """Whether an object can have such an area."""
    return type(x) in (int, float) and 0 < x < np.inf  # type: ignore[operator]


def with_areas(annotations: Sequence[dict]) -> list[dict]:
    """Those without an area get that of their box, those that do not say so are no crowds."""
    completed = []
    for entry in annotations:
        area = entry["area"] if is_area(entry.get("area")) else entry["bbox"][2] * entry["bbox"][3]
        completed.append({**entry, "area": area, "iscrowd": entry.get("iscrowd", 0)})
    return completed


def _is_number(x: object) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**53)
