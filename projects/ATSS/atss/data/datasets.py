"""Own data sets in COCO's format, without code."""

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances


def register_coco(spec: str) -> str:
    """Registers ``NAME=annotations.json:image_dir`` with Detectron2.

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
    categories, annotated = _read(json_file)
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("json_file") != json_file:
            raise ValueError(f"a data set called {name} is registered already: choose another name")
        return name
    metadata = {"thing_classes": categories, "annotated": annotated}
    register_coco_instances(name, metadata, json_file, image_dir)
    return name


def refuse_unannotated(names: Sequence[str]) -> None:
    """Training on a data set that :func:`register_coco` found without annotations cannot be.

    Raises:
        ValueError: naming the data set.
    """
    for name in names:
        if MetadataCatalog.get(name).get("annotated") is False:
            raise ValueError(f"data set {name} has no annotations to train on")


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


def _read(json_file: str) -> tuple[list[str], bool]:
    """Names of the categories in the order of their ids, as Detectron2 numbers them, and whether
    there are annotations."""
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"cannot read the annotations {json_file}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{json_file} is not json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{json_file} is not in COCO's format: it is a {type(content).__name__}, where a "
            "dictionary with images, annotations and categories belongs"
        )
    # Files for a test server have no annotations.
    needed = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}
    optional = {"annotations": ("image_id", "category_id", "bbox")}
    for key, fields in (needed | optional).items():
        if key not in content and key in needed:
            raise ValueError(f"{json_file} is not in COCO's format: it has no {key!r}")
        for position, entry in enumerate(content.get(key, [])):
            missing = [field for field in fields if field not in entry]
            if missing:
                raise ValueError(
                    f"{json_file} is not in COCO's format: entry {position} of {key!r} has no "
                    f"{missing[0]!r}"
                )
    if not content["images"] or not content["categories"]:
        empty = "images" if not content["images"] else "categories"
        raise ValueError(f"{json_file} has an empty list of {empty!r}")
    names = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    return names, bool(content.get("annotations"))
