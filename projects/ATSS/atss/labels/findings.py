"""Kinds of faults of a data set, and names of their cases."""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

# Training or evaluation stops, or would be silently wrong.
ERROR = "error"
# Left out of training.
DROPPED = "dropped"
# Worth a look.
WARNING = "warning"
# Handled, and good to know.
NOTE = "note"
LEVELS = (ERROR, DROPPED, WARNING, NOTE)


class Kind(NamedTuple):
    """The level of a kind, and its title in the plural."""

    level: str
    title: str


KINDS = {
    # Annotations.
    "field_missing": Kind(ERROR, "entries without a required field"),
    "id_malformed": Kind(
        ERROR, "ids that are not whole numbers (ids of images or categories may all be text)"
    ),
    "image_id_twice": Kind(ERROR, "duplicate image ids, of which only the last would count"),
    "file_name_malformed": Kind(ERROR, "images whose file_name is empty or not text"),
    "image_size_malformed": Kind(
        ERROR, "images whose width or height is not a positive whole number"
    ),
    "file_twice": Kind(
        ERROR,
        "duplicate image files with different objects: each entry would train on the others' "
        "objects as background",
    ),
    "file_repeated": Kind(WARNING, "duplicate image files with the same objects"),
    "category_id_twice": Kind(ERROR, "duplicate category ids"),
    "category_name_malformed": Kind(ERROR, "categories whose name is empty or not text"),
    "category_name_twice": Kind(WARNING, "duplicate category names, trained as separate classes"),
    "category_name_similar": Kind(
        WARNING,
        "category names that differ only in case or blanks, trained as separate classes "
        "(--classes merges them)",
    ),
    "annotation_id_twice": Kind(ERROR, "duplicate annotation ids"),
    "image_unknown": Kind(ERROR, "annotations with an unknown image_id"),
    "category_unknown": Kind(ERROR, "annotations with an unknown category_id"),
    "crowd_malformed": Kind(ERROR, "annotations whose iscrowd is neither 0 nor 1"),
    "ignore": Kind(ERROR, "annotations with 'ignore', which Detectron2 does not support"),
    "box_malformed": Kind(ERROR, "boxes that are not four numbers [x, y, width, height]"),
    "box_not_finite": Kind(ERROR, "boxes with NaN or infinite coordinates"),
    "box_negative": Kind(
        ERROR,
        "boxes of negative width or height: training would use the area on the other side of "
        "their corner",
    ),
    "box_units": Kind(
        ERROR,
        "normalised boxes (no coordinate of any box is above 1): COCO's boxes are in pixels",
    ),
    "box_corners": Kind(
        ERROR, "boxes that all look like [x1, y1, x2, y2]: COCO's are [x, y, width, height]"
    ),
    "nothing_to_learn": Kind(ERROR, "annotations, all of which training leaves out"),
    "nothing_annotated": Kind(
        WARNING, "images, none of which has an annotation: training on them alone stops"
    ),
    "crowd": Kind(DROPPED, "crowds"),
    "box_empty": Kind(DROPPED, "boxes of zero width or height"),
    "box_outside": Kind(DROPPED, "boxes outside their image"),
    "box_small_units": Kind(
        WARNING, "normalised boxes (no coordinate is above 1) among boxes in pixels"
    ),
    "box_partly_outside": Kind(WARNING, "boxes more than a pixel beyond their image, clipped"),
    "object_twice": Kind(WARNING, "duplicate objects (equal class and box)"),
    "area_unusable": Kind(
        WARNING,
        "annotations without a positive area (evaluation uses that of the box) or without iscrowd "
        "(0 is used)",
    ),
    "segmentation_unusable": Kind(
        WARNING,
        "segmentations that are neither run lengths nor lists of polygons of at least three "
        "points: only the boxes are used",
    ),
    "keypoints_unusable": Kind(
        WARNING, "keypoints that are not a list of numbers: only the boxes are used"
    ),
    "object_difficult": Kind(
        WARNING,
        "difficult objects: used in training, ignored in evaluation by Pascal VOC's rule "
        "(TEST.COUNT_DIFFICULT True counts them)",
    ),
    "category_without_objects": Kind(WARNING, "categories without objects"),
    "image_dropped": Kind(
        DROPPED,
        "images without objects or with crowds only, by DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    ),
    "image_over_limit": Kind(WARNING, "images with more objects than TEST.DETECTIONS_PER_IMAGE"),
    "image_without_objects": Kind(NOTE, "images without objects, trained on as background"),
    # LVIS.
    "category_lists_malformed": Kind(
        ERROR,
        "images whose neg_category_ids or not_exhaustive_category_ids is not a list of ids of the "
        "file's categories",
    ),
    "lvis_id": Kind(ERROR, "image ids that are not whole numbers >= 0, as LVIS's evaluation needs"),
    "frequency_malformed": Kind(ERROR, "categories whose frequency is not r, c or f"),
    # --classes.
    "class_left_out": Kind(DROPPED, "classes that --classes leaves out"),
    # YOLO and Pascal VOC.
    "label_malformed": Kind(ERROR, "invalid labels"),
    "label_class_unknown": Kind(ERROR, "labels with a class id that has no name"),
    "label_units": Kind(
        ERROR,
        "labels far outside their image: YOLO's coordinates are fractions of the image, not pixels",
    ),
    "label_scored": Kind(WARNING, "labels with a score: detections, which may be wrong"),
    "label_missing": Kind(WARNING, "images without a label file, used as images without objects"),
    "label_of_another_image": Kind(
        WARNING, "xml files whose <filename> is another image: the image of the same stem is used"
    ),
    "label_ambiguous": Kind(
        ERROR,
        "ambiguous labels: several files for one label or line of a list, or several labels for "
        "one file",
    ),
    "file_unused": Kind(NOTE, "unused files (neither images nor labels)"),
    "folder_without_labels": Kind(NOTE, "image folders without any label, left out"),
    "box_at_pixel_zero": Kind(
        WARNING,
        "boxes that begin at pixel 0, although Pascal VOC counts from 1: --first-pixel 0 if "
        "coordinates are corners that begin at 0",
    ),
    # Image files.
    "file_unreadable": Kind(ERROR, "missing or unreadable images"),
    "file_truncated": Kind(ERROR, "truncated or damaged images"),
    "image_size_wrong": Kind(ERROR, "images of another size than in the annotations"),
    "image_high_depth": Kind(
        ERROR, "images with more than 8 bits per channel, which would be clipped at 255"
    ),
    "image_thin": Kind(ERROR, "images too thin to be resized"),
    "image_turned_twice": Kind(
        ERROR, "TIFF images with an EXIF orientation, which would be applied twice"
    ),
    "image_rotated": Kind(
        WARNING, "images with an EXIF orientation, which is applied: boxes must lie as after it"
    ),
    "image_alpha": Kind(WARNING, "images with transparency, which is ignored"),
    "image_animated": Kind(WARNING, "animated images, of which only the first frame is used"),
    "image_huge": Kind(WARNING, "images above Pillow's limit of pixels, MAX_IMAGE_PIXELS"),
    "image_grey": Kind(NOTE, "greyscale images, read as colour"),
    "image_palette": Kind(NOTE, "images with a palette, read as colour"),
    "image_cmyk": Kind(NOTE, "CMYK images, converted without their colour profile"),
    "image_in_other_split": Kind(
        WARNING, "images that another split contains too (equal bytes, resized or mirrored)"
    ),
    "image_of_same_scene_in_other_split": Kind(
        WARNING, "images of the same scene as an image of another split"
    ),
    # Objects and the config's anchors.
    "object_without_positive": Kind(
        WARNING, "objects without a positive anchor by the rule, never learnt"
    ),
    "object_too_small": Kind(WARNING, "objects too small for the anchors: best IoU below"),
    "object_too_large": Kind(WARNING, "objects too large for the anchors: best IoU below"),
    "object_too_long": Kind(WARNING, "objects too long for the anchors: best IoU below"),
}

# Kinds that are not about a box -> the fields at fault, whose values are shown.
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
# Field of an annotation from a text beside its image: its line. Such annotations have no ids.
LABEL_LINE = "label_line"
# Types of json in messages.
TYPES = {
    str: "text",
    int: "a whole number",
    float: "a decimal number",
    bool: "a truth value",
    type(None): "null",
    list: "a list",
    dict: "a dictionary",
}


@dataclass(frozen=True)
class Finding:
    """All cases of one kind.

    Attributes:
        kind: a key of KINDS.
        positions: of the cases, in a list of the json or of places.
        place: position -> name of the case.
        detail: appended to the title.
        entries: "images", "annotations" or "categories" if the positions are in that list of the
            json, else "".
    """

    kind: str
    positions: Sequence[int] | np.ndarray
    place: Callable[[int], str]
    detail: str = ""
    entries: str = ""

    @property
    def level(self) -> str:
        return KINDS[self.kind].level

    @property
    def title(self) -> str:
        return KINDS[self.kind].title + self.detail

    def examples(self, count: int | None = None) -> list[str]:
        return [self.place(int(i)) for i in self.positions[:count]]

    def sentence(self, count: int = 3) -> str:
        """Return title, number of cases and the first of them."""
        more = len(self.positions) - count
        examples = ", ".join(self.examples(count)) + (f", and {more} more" if more > 0 else "")
        return f"{self.title} ({len(self.positions)}): {examples}"


def place_of(content: dict, key: str, fields: Sequence[str] = ()) -> Callable[[int], str]:
    """Return a function: position in the list ``key`` -> name such as "image 3 (a.jpg)".

    Args:
        fields: shown with their values; by default an annotation's box.
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
        exists = isinstance(image, int | str) and image in files
        name = files[image] if exists else f"image {image}"
        about = values(i, fields or ("bbox",))
        if exists and LABEL_LINE in entry:
            return f"{PurePath(name).with_suffix('.txt').name}, line {entry[LABEL_LINE]}{about}"
        return f"annotation {entry['id']} of {name}{about}"

    return annotation


def _value(content: dict, entry: dict, field: str) -> str:
    """Return a field's value; for an id of the wrong type, with both types."""
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
    short = reprlib.Repr()
    short.maxlist = short.maxstring = 60  # enough for all key points of a person
    return short.repr(value)
