"""Loads one image with its objects; what is wrong with them is said here, with the file's name."""

import numpy as np
from detectron2.data import DatasetMapper


class Mapper(DatasetMapper):
    """Detectron2's mapper, which names the file that cannot be read, and refuses boxes that are not
    finite (it would drop them silently). Boxes without area or outside the image are dropped."""

    def __call__(self, dataset_dict: dict) -> dict:
        name = dataset_dict["file_name"]
        for annotation in dataset_dict.get("annotations", ()):
            if not np.isfinite(annotation["bbox"]).all():
                raise ValueError(f"{name} has a box that is not finite: {annotation['bbox']}")
        try:
            return super().__call__(dataset_dict)
        except OSError as error:
            raise OSError(f"cannot read the image {name}: {error}") from error
