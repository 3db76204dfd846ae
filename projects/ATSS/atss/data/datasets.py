"""Own data sets in COCO's format, without code."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from .coco_json import category_names, find_in_json, read_coco
from .findings import DROPPED, ERROR, WARNING


def register_coco(spec: str) -> str:
    """Registers ``NAME=annotations.json:image_dir`` with Detectron2, after the cheap checks of
    ``tools/check_dataset.py``: those that look at no image.

    Returns:
        the name.

    Raises:
        ValueError: with a sentence that says what is wrong with the argument or the file.
    """
    name, equals, paths = spec.partition("=")
    json_file, colon, image_dir = paths.rpartition(":")
    if not (name and equals and json_file and colon and image_dir):
        raise ValueError(f"--register takes NAME=annotations.json:image_dir, not {spec!r}")
    if not Path(image_dir).is_dir():
        raise ValueError(f"the image folder {image_dir} of data set {name} does not exist")
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("json_file") != json_file:
            raise ValueError(f"a data set called {name} is registered already: choose another name")
        return name
    content = read_coco(json_file)
    findings, _ = find_in_json(content)
    for finding in findings:
        if finding.level == ERROR:
            raise ValueError(f"{json_file} has {finding.sentence()}")
    metadata = {
        "thing_classes": category_names(content),
        "annotated": bool(content["annotations"]),
        "remarks": {f.kind: f.sentence() for f in findings if f.level in (DROPPED, WARNING)},
    }
    register_coco_instances(name, metadata, json_file, image_dir)
    return name


def log_remarks(names: Sequence[str]) -> None:
    """Says what training leaves out of data sets of :func:`register_coco`, and what is odd."""
    for name in dict.fromkeys(names):
        for remark in MetadataCatalog.get(name).get("remarks", {}).values():
            logging.getLogger(__name__).warning("Data set %s has %s", name, remark)


def refuse_unevaluable(names: Sequence[str]) -> None:
    """Evaluation needs more of a data set than training.

    Raises:
        ValueError: naming the data set.
    """
    for name in names:
        remarks = MetadataCatalog.get(name).get("remarks", {})
        if "evaluation_field_missing" in remarks:
            raise ValueError(
                f"data set {name} cannot be evaluated: it has {remarks['evaluation_field_missing']}"
            )


def refuse_unannotated(names: Sequence[str]) -> None:
    """Training on a data set that :func:`register_coco` found without annotations cannot be.

    Raises:
        ValueError: naming the data set.
    """
    for name in names:
        if MetadataCatalog.get(name).get("annotated") is False:
            raise ValueError(f"data set {name} has no annotations to train on")


def count_training_images(names: Sequence[str], filter_empty: bool) -> int:
    """Images that training on these data sets goes through.

    Args:
        filter_empty: whether it leaves out those without objects.
    """
    return len(get_detection_dataset_dicts(list(names), filter_empty=filter_empty))


def classes_of(name: str) -> list[str] | None:
    """Names of a data set's classes, or None where no such data set is registered.

    Reads the annotations when Detectron2 does not know the classes before that.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    return metadata.get("thing_classes")
