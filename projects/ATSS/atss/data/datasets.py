"""Data sets with the labels of :mod:`atss.labels`, registered with Detectron2."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from ..labels.classes import refuse_unknown
from ..labels.coco import category_names, find_in_json, is_difficult, learnable
from ..labels.findings import DROPPED, ERROR, KINDS, WARNING
from ..labels.folders import YOLO_CONFIGS
from ..labels.formats import AS_IT_IS, Reading, image_dir_of, read_labels
from .columns import Columns, open_columns
from .images import find_missing, register_handler
from .records import Listed, Records, Registered

# Key of Detectron2's metadata: {category id: class}.
CLASS_OF_ID = "thing_dataset_id_to_contiguous_id"


def register_all(specs: Sequence[str], reading: Reading = AS_IT_IS, partly: bool = False) -> None:
    """Register data sets in turn.

    Args:
        partly: other data sets may have more of the chosen classes.

    Raises:
        UserError: as :func:`register`, or naming a class that no data set has.
    """
    metadata = [MetadataCatalog.get(register(spec, reading)) for spec in specs]
    found = {x for m in metadata for x in m.found}
    if reading.classes and metadata and not (partly and found):
        names = list(dict.fromkeys(x for m in metadata for x in m.names_in_data))
        refuse_unknown(reading.classes, found, names)


def register(spec: str, reading: Reading = AS_IT_IS) -> str:
    """Register ``NAME=annotations.json:image_dir``, ``NAME=data.yaml:split`` or
    ``NAME=folder:split`` with Detectron2, and return the name.

    Labels get the cheap checks of ``tools/check_dataset.py``: images are opened only for sizes that
    labels lack. Only changed labels are read again.

    Raises:
        UserError: naming the argument or the file.
    """
    name, _, source = spec.partition("=")
    if not name or ":" not in source.strip(":"):
        raise UserError(
            "--register takes NAME=annotations.json:image_dir, NAME=data.yaml:split or "
            f"NAME=folder:split, got {spec!r}"
        )
    annotations, images = split_source(source)
    folder = os.path.abspath(images) if os.path.isdir(images) else images
    source = f"{os.path.abspath(annotations)}:{folder}"  # independent of the working directory
    if name in DatasetCatalog and MetadataCatalog.get(name).get("source") != source:
        raise UserError(f"a data set called {name} is registered already: choose another name")
    image_dir = image_dir_of(annotations, images)
    register_handler(image_dir)  # in every process: test-time augmentation opens images, too
    columns = open_columns(
        annotations, images, reading, partial(_read, annotations, images, reading)
    )
    metadata = {
        "source": source,
        "image_root": image_dir,
        **{key: x for key, x in columns.about.items() if key != "content"},
    }
    # Detectron2 numbers the categories of a json by id, too.
    ids = sorted(category["id"] for category in columns.about["content"]["categories"])
    numbers = {category_id: i for i, category_id in enumerate(ids)}
    _register(name, Registered(columns, image_dir, numbers), metadata)
    return name


def _read(annotations: str, images: str, reading: Reading) -> tuple[dict, dict]:
    labels = read_labels(annotations, images, reading)
    json_findings, objects = find_in_json(labels.content)
    findings = [*labels.findings, *json_findings]
    for finding in findings:
        if finding.level == ERROR:
            raise UserError(f"{annotations} has {finding.sentence()}")
    assert objects is not None  # it is None only after errors
    areas = objects.boxes[objects.used, 2:].prod(axis=1)
    return learnable(labels.content, objects), {
        "evaluator_type": labels.evaluator,
        "thing_classes": category_names(labels.content),
        "names_in_data": list(labels.names),
        "found": sorted(labels.found),
        "to_learn": len(areas),
        "mean_area": float(areas.mean()) if len(areas) else 0.0,
        "to_measure": sum(
            not is_difficult(labels.content["annotations"][i]) for i in np.flatnonzero(objects.used)
        ),
        "remarks": {f.kind: f.sentence() for f in findings if f.level in (DROPPED, WARNING)},
    }


def split_source(source: str, name: str = "a source") -> tuple[str, str]:
    """Split ``annotations:images`` in two; with more colons, behind an existing file, or else a
    folder.

    Args:
        name: of the argument, for the message.

    Raises:
        UserError: if one of the two is missing.
    """
    colons = [i for i, x in enumerate(source) if x == ":"]
    parts = [(os.path.expanduser(source[:i]), os.path.expanduser(source[i + 1 :])) for i in colons]
    parts = [(annotations, images) for annotations, images in parts if annotations and images]
    for exists in (os.path.isfile, os.path.isdir):
        for annotations, images in parts:
            if exists(annotations):
                return annotations, images
    if not parts:
        is_yolo = source.lower().endswith(YOLO_CONFIGS)
        hint = f": did you mean {source}:train?" if is_yolo else ""
        raise UserError(
            f"{name} is annotations.json:image_dir, data.yaml:split or folder:split, got {source!r}"
            f"{hint}"
        )
    return parts[-1]


def columns_of(name: str) -> Columns | None:
    """Return the columns of a data set of :func:`register`, or None."""
    images = DatasetCatalog.data.get(name)
    return images.columns if isinstance(images, Registered) else None


def open_records(names: Sequence[str], filter_empty: bool = False) -> Records:
    """Return the records of data sets, one set after another.

    Args:
        filter_empty: leave out images without objects (crowds do not count) from annotated sets.

    Raises:
        UserError: naming data sets without images, with different classes, or with a class out of
            range.
    """
    sets = [_open(name) for name in names]
    for name, images in zip(names, sets, strict=True):
        if not len(images):
            raise UserError(f"data set {name} has no images")
    records = Records(sets)
    if "annotations" not in records[0]:
        return records
    if filter_empty:
        records = records.choose(records.counts > 0)
        if not len(records):
            raise UserError(f"no image of {' and '.join(names)} has objects")
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    if all(classes):
        for name, images, class_names in zip(names, sets, classes, strict=True):
            if list(class_names) != list(classes[0]):
                raise UserError(
                    f"data sets {names[0]} and {name} have different classes: "
                    f"{_abridge(classes[0])}, and {_abridge(class_names)}"
                )
            numbers = images.classes
            for number in (numbers.min(initial=0), numbers.max(initial=0)):
                if not 0 <= number < len(class_names):
                    raise UserError(
                        f"data set {name} has an object of category_id {number}, but "
                        f"{len(class_names)} classes"
                    )
    return records


def _open(name: str) -> Registered | Listed:
    images = DatasetCatalog.data.get(name)
    return images if isinstance(images, Registered) else Listed(DatasetCatalog.get(name))


def provide_json(name: str) -> None:
    metadata, columns = MetadataCatalog.get(name), columns_of(name)
    if columns is not None and not metadata.get("json_file"):
        metadata.json_file = columns.provide_json()


def _register(name: str, images: Registered, metadata: dict) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, images)
    MetadataCatalog.get(name).set(**{CLASS_OF_ID: dict(images.number)}, **metadata)


def follow(name: str, classes: Sequence[str]) -> None:
    """Renumber the classes of a data set by their order in ``classes``, to combine sets with
    different orders.

    Raises:
        UserError: if the classes differ, or :func:`register` did not make the data set.
    """
    names = classes_of(name)
    if names is None or not classes or list(names) == list(classes):
        return
    permutation = _permutation(names, classes)
    if permutation is None:
        raise UserError(
            f"data set {name} has the classes {_abridge(names)}, but the other data sets or the "
            f"weights have {_abridge(classes)}, so that detections would get wrong names: set "
            "--classes, which holds for every --register"
        )
    images = DatasetCatalog[name]
    if not isinstance(images, Registered):
        if permutation == list(range(len(names))):
            return
        raise UserError(
            f"data set {name} has the classes {_abridge(names)}, but expected the order "
            f"{_abridge(classes)}: register it by --register"
        )
    metadata = MetadataCatalog.get(name).as_dict()
    unchanged = {k: x for k, x in metadata.items() if k not in ("name", CLASS_OF_ID)}
    number = {category_id: permutation[i] for category_id, i in images.number.items()}
    images = Registered(images.columns, images.image_dir, number)
    _register(name, images, {**unchanged, "thing_classes": list(classes)})


def _permutation(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Return the index of each class among the others, or None. Case and outer blanks are ignored
    if names stay distinct."""
    for plain in (str, lambda x: x.strip().casefold()):
        old, new = [plain(x) for x in names], [plain(x) for x in classes]
        if len({*old}) == len(old) and sorted(old) == sorted(new):
            return [new.index(x) for x in old]
    return None


def _abridge(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{len(names)} classes {shown}, ..." if len(names) > 5 else shown


def log_remarks(names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        for remark in MetadataCatalog.get(name).get("remarks", {}).values():
            logging.getLogger(__name__).warning("Data set %s has %s", name, remark)


def refuse_missing_images(names: Sequence[str], filter_empty: bool = False) -> None:
    """Check that image files exist.

    Args:
        filter_empty: whether images without objects are left out.

    Raises:
        UserError: naming the data set and its first missing image.
    """
    for name in dict.fromkeys(names):
        records = Records([_open(name)])
        if filter_empty and len(records) and "annotations" in records[0]:
            records = records.choose(records.counts > 0)
        files = records.file_names()
        missing = list(find_missing(files))
        if missing:
            hint = "; addresses are not fetched: download the images" if "://" in missing[0] else ""
            raise UserError(
                f"data set {name}: {len(missing)} of {len(files)} images do not exist, such as "
                f"{missing[0]}{hint}"
            )


def has_objects(name: str) -> bool:
    """Return whether evaluation measures any object; True for unregistered sets."""
    if name not in DatasetCatalog:
        return True
    columns = columns_of(name)
    if columns is None:
        return bool(objects_per_image(name).any())
    return columns.about["to_measure"] > 0


def objects_per_image(name: str) -> np.ndarray:
    """Return (N,) objects of each image of a data set; crowds do not count."""
    columns = columns_of(name)
    return _count_objects(DatasetCatalog[name]) if columns is None else columns.counts


@cache
def _count_objects(load: Callable[[], list[dict]]) -> np.ndarray:
    objects = ([not x.get("iscrowd") for x in r.get("annotations", ())] for r in load())
    return np.array([sum(x) for x in objects], dtype=np.int64)


def refuse_unannotated(names: Sequence[str]) -> None:
    """Check that data sets of :func:`register` have objects to train on.

    Raises:
        UserError: naming the data set and its dropped annotations.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("to_learn") == 0:
            remarks = metadata.remarks.items()
            dropped = "; ".join(x for kind, x in remarks if KINDS[kind].level == DROPPED)
            but = f", but {dropped}" if dropped else ""
            raise UserError(f"data set {name} has no annotations to train on{but}")


def count_training_images(names: Sequence[str], filter_empty: bool) -> int:
    """Return the images of an epoch; ``filter_empty`` leaves out those without objects."""
    return len(open_records(names, filter_empty))


def mean_area(names: Sequence[str]) -> float:
    """Return the mean area, in pixels, of the objects of data sets of :func:`register`; 0 without
    objects."""
    known = [MetadataCatalog.get(name) for name in names if columns_of(name) is not None]
    objects = sum(x.to_learn for x in known)
    return sum(x.mean_area * x.to_learn for x in known) / max(objects, 1)


def ids_of(name: str) -> list[int]:
    """Return the category ids of a data set by class, or []."""
    if classes_of(name) is None:
        return []
    number = MetadataCatalog.get(name).get(CLASS_OF_ID, {})
    return sorted(number, key=number.__getitem__)


def without_classes(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in DatasetCatalog and classes_of(name) is None]


def classes_of(name: str) -> list[str] | None:
    """Return the class names of a data set, from its annotations if needed, or None."""
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    return metadata.get("thing_classes")
