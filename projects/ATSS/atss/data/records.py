"""Records of images in Detectron2's format, by position."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.structures import BoxMode
from pycocotools.mask import frPyObjects

from ..labels.values import is_polygon
from .columns import Columns


class Registered(Sequence[dict]):
    """A data set of --register, whose records are made on access. A call returns all records, for
    Detectron2's DatasetCatalog.

    Attributes:
        sizes, counts: see :class:`~atss.data.columns.Columns`.
        number: {category id: class}.
    """

    def __init__(self, columns: Columns, image_dir: str, number: Mapping):
        self.columns = columns
        self.image_dir = image_dir
        self.number = dict(number)
        self.sizes, self.counts = columns.sizes, columns.counts

    def __call__(self) -> list[dict]:
        return [self[i] for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, i: int) -> dict:  # type: ignore[override]
        image = self.columns[i]
        return {
            "file_name": os.path.join(self.image_dir, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [
                {
                    "bbox": x["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": self.number[x["category_id"]],
                    "iscrowd": x["iscrowd"],
                    **_shapes(**x),
                }
                for x in image["annotations"]
            ],
        }

    @property
    def classes(self) -> np.ndarray:
        """(M,) class of each object."""
        numbers = np.array([self.number[i] for i in sorted(self.number)], dtype=np.int32)
        return numbers[self.columns.classes]

    def file_names(self) -> list[str]:
        folder = os.path.join(self.image_dir, "")  # once: os.path.join is slow for a million
        names = self.columns.file_names()
        return [x if x.startswith(os.sep) else folder + x for x in names]


def _shapes(
    segmentation: list | dict | None = None, keypoints: list | None = None, **_: object
) -> dict:
    """Return segmentation and keypoints as Detectron2's mapper takes them."""
    shapes: dict = {}
    if isinstance(segmentation, dict):
        packed = isinstance(segmentation["counts"], str)
        frame = segmentation["size"]
        shapes["segmentation"] = segmentation if packed else frPyObjects(segmentation, *frame)
    elif segmentation:
        shapes["segmentation"] = [polygon for polygon in segmentation if is_polygon(polygon)]
    if keypoints:  # COCO has indices of pixels; every third number is a visibility
        shapes["keypoints"] = [x + 0.5 * (i % 3 < 2) for i, x in enumerate(keypoints)]
    return shapes


class Listed(Sequence[dict]):
    """A data set of the user's code: records, packed so that loading processes share them.

    Attributes:
        sizes: (N, 2) width and height in pixels, -1 if unknown.
        counts: (N,) objects of each image that are no crowds, M in all.
        classes: (M,) class of each of these objects.
    """

    def __init__(self, records: Sequence[dict]):
        objects = [
            [x for x in record.get("annotations", ()) if not x.get("iscrowd", 0)]
            for record in records
        ]
        sizes = [(record.get("width", -1), record.get("height", -1)) for record in records]
        self.sizes = np.array(sizes).reshape(-1, 2)
        self.counts = np.array([len(x) for x in objects], dtype=np.int64)
        classes = [x.get("category_id", -1) for of_image in objects for x in of_image]
        self.classes = np.array(classes, dtype=np.int64)
        self._names = [os.fspath(x["file_name"]) for x in records if "file_name" in x]
        self._packed = DatasetFromList(records, copy=False) if len(records) else records

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, i: int) -> dict:  # type: ignore[override]
        return self._packed[i]

    def file_names(self) -> list[str]:
        return self._names


class Records(Sequence[dict]):
    """Images of data sets, one set after another, or a selection.

    Args:
        sets: N images together.
        selection: (K,) int64 positions among the N; None for all.
    """

    def __init__(self, sets: Sequence[Registered | Listed], selection: np.ndarray | None = None):
        self.sets = sets
        self._starts = np.cumsum([0, *map(len, sets)])
        self.selection = np.arange(self._starts[-1]) if selection is None else selection

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, i: int) -> dict:  # type: ignore[override]
        position = int(self.selection[i])
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.sets[index][position - int(self._starts[index])]

    def choose(self, positions: np.ndarray) -> "Records":
        return Records(self.sets, self.selection[positions])

    @property
    def sizes(self) -> np.ndarray:
        """(K, 2) width and height in pixels, -1 if unknown."""
        return np.concatenate([x.sizes for x in self.sets])[self.selection]

    @property
    def counts(self) -> np.ndarray:
        """(K,) objects that are no crowds."""
        return np.concatenate([x.counts for x in self.sets])[self.selection]

    def objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Return image position and class of objects that are no crowds, (M,) each."""
        counts = np.concatenate([x.counts for x in self.sets])
        positions = np.full(len(counts), -1)
        positions[self.selection] = np.arange(len(self))
        image = np.repeat(positions, counts)
        is_selected = image >= 0
        classes = np.concatenate([x.classes for x in self.sets])
        return image[is_selected], classes[is_selected]

    def split(self) -> list["Records"]:
        index = np.searchsorted(self._starts, self.selection, side="right")
        return [self.choose(index == i) for i in range(1, len(self._starts))]

    def file_names(self) -> list[str]:
        names = [name for x in self.sets for name in x.file_names()]
        return [names[i] for i in self.selection] if len(names) == self._starts[-1] else names
