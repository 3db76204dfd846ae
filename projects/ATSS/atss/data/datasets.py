"""Own data sets in COCO's format or in YOLO's layout, without code."""

import logging
import os
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from .coco_json import category_names, find_in_json, read_coco
from .findings import DROPPED, ERROR, WARNING, Finding
from .yolo import read_yolo


def read(annotations: str, images: str) -> tuple[dict, str, list[Finding]]:
    """The data set of a json in COCO's format and its folder of images, or of a yaml in YOLO's
    layout and its split.

    Returns:
        content as of :func:`~atss.data.coco_json.read_coco`; the folder in which its file names
        begin; what was found besides, which the content does not show.

    Raises:
        ValueError: with a sentence that names what cannot be read.
    """
    if _is_yolo(annotations):
        content, findings = read_yolo(annotations, images)
        return content, os.path.dirname(annotations), findings
    if not Path(images).is_dir():
        raise ValueError(f"the image folder {images} does not exist")
    return read_coco(annotations), images, []


def register(spec: str) -> str:
    """Registers ``NAME=annotations.json:image_dir`` or ``NAME=data.yaml:split`` with Detectron2,
    after the cheap checks of ``tools/check_dataset.py``: those that look at no image, or, where
    labels do not tell it, at its size alone.

    Returns:
        the name.

    Raises:
        ValueError: with a sentence that says what is wrong with the argument or the files.
    """
    name, equals, source = spec.partition("=")
    annotations, colon, images = source.rpartition(":")
    if not (name and equals and annotations and colon and images):
        raise ValueError(
            "--register takes NAME=annotations.json:image_dir or NAME=data.yaml:split, not "
            f"{spec!r}"
        )
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("source") != source:
            raise ValueError(f"a data set called {name} is registered already: choose another name")
        return name
    content, image_dir, findings = read(annotations, images)
    findings += find_in_json(content)[0]
    for finding in findings:
        if finding.level == ERROR:
            raise ValueError(f"{annotations} has {finding.sentence()}")
    metadata = {
        "source": source,
        "thing_classes": category_names(content),
        "annotated": bool(content["annotations"]),
        "remarks": {f.kind: f.sentence() for f in findings if f.level in (DROPPED, WARNING)},
    }
    if _is_yolo(annotations):
        _register_content(name, metadata, content, image_dir)
    else:
        register_coco_instances(name, metadata, annotations, image_dir)
    return name


def _is_yolo(annotations: str) -> bool:
    return annotations.lower().endswith((".yaml", ".yml"))


def _register_content(name: str, metadata: dict, content: dict, image_dir: str) -> None:
    """Registers what was read, so that what was checked is what is used. Sorted by id, categories
    get the numbers that Detectron2 gives those of a json."""
    ids = sorted(category["id"] for category in content["categories"])
    number = {category_id: i for i, category_id in enumerate(ids)}
    records = {
        image["id"]: {
            "file_name": os.path.join(image_dir, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        records[annotation["image_id"]]["annotations"].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": number[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
            }
        )
    # As bytes they take a tenth of the memory, and whoever asks gets records of his own.
    stored = pickle.dumps(list(records.values()))
    DatasetCatalog.register(name, partial(pickle.loads, stored))
    MetadataCatalog.get(name).set(
        evaluator_type="coco", thing_dataset_id_to_contiguous_id=number, **metadata
    )


def log_remarks(names: Sequence[str]) -> None:
    """Says what training leaves out of data sets of :func:`register`, and what is odd."""
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
    """Training on a data set that :func:`register` found without annotations cannot be.

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
