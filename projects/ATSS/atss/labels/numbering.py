"""Ground truth and detections in COCO's format with ids from 1, for evaluation."""

from collections.abc import Iterable, Mapping

import numpy as np

from .coco import SHORTEST, find_in_json, is_difficult, learnable, with_areas

IMAGE_KEYS = ("file_name", "width", "height")


class GroundTruth:
    """The objects of a json that training uses, and crowds, numbered from 1.

    pycocotools takes id 0 of an object for "not found", compares ids above 2^63 as float64, and
    orders equal scores by image id: images are numbered by rising id.

    Args:
        content: as from :func:`~atss.labels.coco.read_coco`.
        classes: index of each category by its id; objects of other categories are left out.
        count_difficult: whether difficult objects count like others.
        is_learnable: whether ``content`` is from :func:`~atss.labels.coco.learnable`.

    Attributes:
        dataset: COCO json of images, categories and annotations (``bbox``, ``area``, ``iscrowd``
            and ``difficult``), images in the order of ``content``.
        ids: id of each annotation in ``content``.
        dropped: annotations without area or outside their image.
    """

    def __init__(
        self,
        content: dict,
        classes: Mapping,
        count_difficult: bool = False,
        is_learnable: bool = False,
    ):
        before = content["annotations"]
        # None for malformed fields: then all annotations count.
        objects = None if is_learnable else find_in_json(content)[1]
        if objects is not None:
            # learnable() renumbers: the ids of the file are kept beside.
            marked = [{**x, "id_in_file": x["id"]} for x in before]
            content = learnable({**content, "annotations": marked}, objects)
        self.dropped = len(before) - len(content["annotations"])
        images = content["images"]
        by_id = sorted((x["id"] for x in images), key=lambda x: (isinstance(x, str), x))
        self.image_numbers = {x: i for i, x in enumerate(by_id, start=1)}
        self.trimmed = {x["id"]: (x["width"], x["height"]) for x in images if "trimmed" in x}
        self.classes = classes
        kept = [
            x
            for x in with_areas(content["annotations"])
            if x["category_id"] in classes and x["image_id"] in self.image_numbers
        ]
        self.ids = [x.get("id_in_file", x.get("id")) for x in kept]
        self.dataset = {
            # No other fields: hotcoco refuses a date_captured that is a number, as Datumaro writes.
            "images": [
                {key: x[key] for key in IMAGE_KEYS if key in x}
                | {"id": self.image_numbers[x["id"]]}
                for x in images
            ],
            "categories": [
                {"id": classes[c["id"]] + 1, "name": c["name"]}
                for c in content["categories"]
                if c["id"] in classes
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": self.image_numbers[x["image_id"]],
                    "category_id": classes[x["category_id"]] + 1,
                    "bbox": x["bbox"],
                    "area": x["area"],
                    "iscrowd": x["iscrowd"],
                    "difficult": is_difficult(x) and not count_difficult,
                }
                for i, x in enumerate(kept, start=1)
            ],
        }

    def objects_per_image(self) -> np.ndarray:
        """Return (N,) int64 objects that count of each image; crowds and difficult ones do not."""
        images = [
            x["image_id"] - 1
            for x in self.dataset["annotations"]
            if not (x["iscrowd"] or x["difficult"])
        ]
        numbers = np.array(images, dtype=np.int64)
        return np.bincount(numbers, minlength=len(self.dataset["images"]))

    def number(self, detections: Iterable[dict]) -> list[dict]:
        """Clip detections to the images with clipped or dropped objects, drop those of which
        nothing remains, and renumber images and classes."""
        return [
            {
                "image_id": self.image_numbers[x["image_id"]],
                "category_id": self.classes[x["category_id"]] + 1,
                "bbox": box,
                "score": x["score"],
            }
            for x in detections
            if (box := self._clipped(x)) is not None
        ]

    def _clipped(self, detection: dict) -> list[float] | None:
        if detection["image_id"] not in self.trimmed:
            return detection["bbox"]
        x, y, w, h = detection["bbox"]
        width, height = self.trimmed[detection["image_id"]]
        left, right = (min(max(v, 0), width) for v in (x, x + w))
        top, bottom = (min(max(v, 0), height) for v in (y, y + h))
        box = [left, top, right - left, bottom - top]
        return box if min(box[2:]) >= SHORTEST else None
