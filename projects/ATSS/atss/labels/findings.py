"""Every kind of thing that can be wrong with a data set: how grave it is, and its sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Training or evaluation stops there, or would be silently wrong.
ERROR = "error"
# Training leaves it out.
DROPPED = "dropped"
# Worth a look.
WARNING = "warning"
# Handled, and good to know.
NOTE = "note"
LEVELS = (ERROR, DROPPED, WARNING, NOTE)


class Kind(NamedTuple):
    """How grave a kind is, and what it is called, in the plural."""

    level: str
    what: str


KINDS = {
    # Annotations.
    "field_missing": Kind(ERROR, "entries without a field that COCO's format needs"),
    "id_malformed": Kind(ERROR, "ids that are no whole numbers (or, of images, all text)"),
    "image_id_twice": Kind(ERROR, "images that share an id, of which only the last would count"),
    "file_name_malformed": Kind(ERROR, "images whose file_name is not text, or empty"),
    "image_size_malformed": Kind(
        ERROR, "images whose width or height is not a positive whole number"
    ),
    "file_twice": Kind(
        ERROR,
        "images that share a file but not its objects, so that each would teach the objects of the "
        "others as background",
    ),
    "file_repeated": Kind(WARNING, "images that share a file and its objects"),
    "category_id_twice": Kind(ERROR, "categories that share an id"),
    "category_name_malformed": Kind(ERROR, "categories whose name is not text, or empty"),
    "category_name_twice": Kind(WARNING, "categories that share a name, but are trained apart"),
    "category_name_similar": Kind(
        WARNING,
        "categories whose names differ only by case or blanks, but are trained apart (--classes "
        "joins them)",
    ),
    "annotation_id_twice": Kind(ERROR, "annotations that share an id"),
    "image_unknown": Kind(ERROR, "annotations of images that are not in the file"),
    "category_unknown": Kind(ERROR, "annotations of categories that are not in the file"),
    "crowd_malformed": Kind(ERROR, "annotations whose iscrowd is neither 0 nor 1"),
    "ignore": Kind(ERROR, "annotations with 'ignore', which Detectron2 does not support"),
    "box_malformed": Kind(ERROR, "boxes that are not four numbers [x, y, width, height]"),
    "box_not_finite": Kind(ERROR, "boxes that are not finite"),
    "box_negative": Kind(
        ERROR,
        "boxes of negative width or height, which training would take for the area on the other "
        "side of their corner",
    ),
    "box_units": Kind(
        ERROR, "boxes without a coordinate above 1, all of them: COCO's are pixels, not shares"
    ),
    "box_corners": Kind(
        ERROR,
        "boxes that look like [x1, y1, x2, y2], all of them: COCO's are [x, y, width, height]",
    ),
    "nothing_to_learn": Kind(ERROR, "annotations, all of which training leaves out"),
    "nothing_annotated": Kind(
        WARNING, "images, none of which has an annotation: training on them alone stops"
    ),
    "crowd": Kind(DROPPED, "crowds"),
    "box_empty": Kind(DROPPED, "boxes of zero width or height"),
    "box_outside": Kind(DROPPED, "boxes outside their image"),
    "box_small_units": Kind(WARNING, "boxes without a coordinate above 1, among others"),
    "box_partly_outside": Kind(
        WARNING, "boxes that reach more than a pixel beyond their image, and are clipped"
    ),
    "object_twice": Kind(WARNING, "objects that are there twice, with equal class and box"),
    "area_unusable": Kind(
        WARNING,
        "annotations whose area is missing, or no positive number (evaluation takes that of the "
        "box), or without 'iscrowd' (0)",
    ),
    "segmentation_unusable": Kind(
        WARNING,
        "segmentations that are neither run lengths nor lists of polygons of at least three "
        "points: they are left out, and the boxes are used",
    ),
    "keypoints_unusable": Kind(
        WARNING, "keypoints that are no list of numbers: they are left out, and the boxes are used"
    ),
    "object_difficult": Kind(
        WARNING,
        "objects marked difficult: training uses them, and evaluation counts them neither as found "
        "nor as missed, by Pascal VOC's rule (TEST.COUNT_DIFFICULT True counts them)",
    ),
    "category_without_objects": Kind(WARNING, "categories without objects"),
    "image_dropped": Kind(
        DROPPED,
        "images without objects or with crowds only, by DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    ),
    "image_without_objects": Kind(NOTE, "images without objects, trained on as background"),
    # LVIS's fields.
    "category_lists_malformed": Kind(
        ERROR,
        "images whose neg_category_ids or not_exhaustive_category_ids is no list of the file's "
        "categories",
    ),
    "lvis_id": Kind(
        ERROR, "images whose id is not a whole number from 0 on, as LVIS's evaluation needs it"
    ),
    "frequency_malformed": Kind(ERROR, "categories whose frequency is not r, c or f"),
    # What --classes says.
    "class_left_out": Kind(DROPPED, "classes that --classes leaves out"),
    # Labels of YOLO's and of Pascal VOC's.
    "label_malformed": Kind(ERROR, "labels that are neither a box nor a polygon"),
    "label_class_unknown": Kind(ERROR, "labels of classes that have no name"),
    "label_units": Kind(
        ERROR,
        "labels that lie farther outside their image than it is large: YOLO's are shares, not "
        "pixels",
    ),
    "label_missing": Kind(WARNING, "images without a label file, taken to be without objects"),
    "label_of_another_image": Kind(
        WARNING,
        "labels that name an image that is there, but are called like another, and taken for its",
    ),
    "label_ambiguous": Kind(
        ERROR, "labels or lines of a list that could mean several files, or several labels one file"
    ),
    "image_elsewhere": Kind(
        NOTE, "labels whose image is neither in their folder nor in one that corresponds to it"
    ),
    "file_unused": Kind(
        NOTE, "files in folders of images and labels that are neither, and are not used"
    ),
    "folder_without_labels": Kind(
        NOTE, "folders of images without a single label, which are left out"
    ),
    "box_at_pixel_zero": Kind(
        WARNING,
        "boxes that begin at pixel 0, where Pascal VOC begins at 1: with --first-pixel 0 "
        "coordinates are those of corners, as many tools write them",
    ),
    # Image files.
    "file_unreadable": Kind(ERROR, "images that cannot be read"),
    "file_truncated": Kind(ERROR, "images that are truncated or damaged"),
    "image_size_wrong": Kind(ERROR, "images of another size than the annotations say"),
    "image_high_depth": Kind(
        ERROR, "images of more than 8 bits per channel, which would be cut off at 255"
    ),
    "image_thin": Kind(ERROR, "images too thin to be resized"),
    "image_turned_twice": Kind(
        ERROR, "TIFF images with an EXIF orientation, which would be applied twice"
    ),
    "image_rotated": Kind(
        WARNING, "images with an EXIF orientation, which is applied: boxes must lie as after it"
    ),
    "image_alpha": Kind(WARNING, "images with transparency, which is ignored"),
    "image_animated": Kind(WARNING, "animated images, of which only the first is used"),
    "image_huge": Kind(WARNING, "images so large that Pillow warns of them"),
    "image_grey": Kind(NOTE, "greyscale images, read as colour"),
    "image_palette": Kind(NOTE, "images with a palette, read as colour"),
    "image_cmyk": Kind(NOTE, "CMYK images, converted without their colour profile"),
    "image_in_other_split": Kind(
        WARNING, "images that another split has too, by their bytes, resized or mirrored"
    ),
    "image_of_same_scene_in_other_split": Kind(
        WARNING, "images that look like one of another split, as photographs of one scene do"
    ),
    # Objects under the config's anchors.
    "object_without_positive": Kind(
        WARNING, "objects to which the rule gives no anchor, so that they are never learnt"
    ),
    "object_poorly_matched": Kind(
        WARNING,
        "objects too small, too large or too long for the anchors: the best has an IoU below",
    ),
}


@dataclass(frozen=True)
class Finding:
    """All cases of one kind in a data set.

    Attributes:
        kind: a key of KINDS.
        positions: of the cases, in a list of the json or of places.
        place: the name of one of them for people.
        detail: appended to the kind's sentence.
    """

    kind: str
    positions: Sequence[int] | np.ndarray
    place: Callable[[int], str]
    detail: str = ""

    @property
    def level(self) -> str:
        return KINDS[self.kind].level

    @property
    def what(self) -> str:
        return KINDS[self.kind].what + self.detail

    def examples(self, count: int | None = None) -> list[str]:
        """Names of the first ``count`` cases, or of all."""
        return [self.place(int(i)) for i in self.positions[:count]]

    def sentence(self, count: int = 3) -> str:
        """What is wrong, how often, and where first."""
        more = len(self.positions) - count
        examples = ", ".join(self.examples(count)) + (f", and {more} more" if more > 0 else "")
        return f"{self.what} ({len(self.positions)}): {examples}"
