"""Own data sets, in the formats of formats.py, registered without code."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import check_metadata_consistency
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from ..labels.classes import refuse_unknown
from ..labels.coco import category_names, find_in_json, is_difficult, learnable
from ..labels.findings import DROPPED, ERROR, KINDS, WARNING
from ..labels.formats import ADDRESS, AS_IT_IS, Reading, image_dir_of, read_labels
from .columns import Columns, open_columns
from .images import provide
from .records import Listed, Records, Registered

# Detectron2's name in the metadata for the number of each category's id.
NUMBERS = "thing_dataset_id_to_contiguous_id"


def register_all(specs: Sequence[str], reading: Reading = AS_IT_IS, partly: bool = False) -> None:
    """Registers them in turn.

    Args:
        partly: there may be others, which have more of the chosen classes.

    Raises:
        ValueError: as :func:`register`, or naming a chosen class that none of them has.
    """
    metadata = [MetadataCatalog.get(register(spec, reading)) for spec in specs]
    found = {x for m in metadata for x in m.found}
    if reading.classes and metadata and not (partly and found):
        there = list(dict.fromkeys(x for m in metadata for x in m.names_in_data))
        refuse_unknown(reading.classes, found, there)


def register(spec: str, reading: Reading = AS_IT_IS) -> str:
    """Registers ``NAME=annotations.json:image_dir``, ``NAME=data.yaml:split`` or
    ``NAME=folder:split`` with Detectron2, after the cheap checks of ``tools/check_dataset.py``:
    those that look at no image, or, where labels do not tell it, at its size alone. Labels that
    have not changed since they were read last, by any process, are not read again.

    Returns:
        the name.

    Raises:
        ValueError: with a sentence that says what is wrong with the argument or the files.
    """
    name, _, source = spec.partition("=")
    if not name or ":" not in source.strip(":"):
        raise UserError(
            "--register takes NAME=annotations.json:image_dir, NAME=data.yaml:split or "
            f"NAME=folder:split, not {spec!r}"
        )
    annotations, images = split_source(source)
    # However its paths are written.
    folder = os.path.abspath(images) if os.path.isdir(images) else images
    source = f"{os.path.abspath(annotations)}:{folder}"
    if name in DatasetCatalog and MetadataCatalog.get(name).get("source") != source:
        raise UserError(f"a data set called {name} is registered already: choose another name")
    image_dir = image_dir_of(annotations, images)
    provide(image_dir)  # in every process: multi-scale testing opens images, too
    columns = open_columns(
        annotations, images, reading, partial(_read, annotations, images, reading)
    )
    metadata = {
        "source": source,
        "image_root": image_dir,
        **{key: x for key, x in columns.about.items() if key != "content"},
    }
    # Sorted by id, categories get the numbers that Detectron2 gives those of a json.
    ids = sorted(category["id"] for category in columns.about["content"]["categories"])
    numbers = {category_id: i for i, category_id in enumerate(ids)}
    _register(name, Registered(columns, image_dir, numbers), metadata)
    return name


def _read(annotations: str, images: str, reading: Reading) -> tuple[dict, dict]:
    """What training and evaluation use of labels, and what is known of them.

    Raises:
        ValueError: with a sentence that says what is wrong with the files.
    """
    labels = read_labels(annotations, images, reading)
    more, objects = find_in_json(labels.content)
    findings = [*labels.findings, *more]
    for finding in findings:
        if finding.level == ERROR:
            raise UserError(f"{annotations} has {finding.sentence()}")
    assert objects is not None  # without errors
    return learnable(labels.content, objects), {
        "evaluator_type": labels.evaluator,
        "thing_classes": category_names(labels.content),
        "names_in_data": list(labels.names),
        "found": sorted(labels.found),
        "to_learn": int(objects.used.sum()),
        "to_measure": sum(
            not is_difficult(labels.content["annotations"][i]) for i in np.flatnonzero(objects.used)
        ),
        "remarks": {f.kind: f.sentence() for f in findings if f.level in (DROPPED, WARNING)},
    }


def split_source(source: str, what: str = "a source") -> tuple[str, str]:
    """The annotations, and the folder or split, of ``annotations:images``. Where either has a colon
    in its name, the first colon behind a file parts them, or else behind a folder.

    Args:
        what: it is, for people.

    Raises:
        ValueError: where it has not both.
    """
    colons = [i for i, x in enumerate(source) if x == ":"]
    parts = [(os.path.expanduser(source[:i]), os.path.expanduser(source[i + 1 :])) for i in colons]
    parts = [(annotations, images) for annotations, images in parts if annotations and images]
    for there in (os.path.isfile, os.path.isdir):
        for annotations, images in parts:
            if there(annotations):
                return annotations, images
    if not parts:
        raise UserError(
            f"{what} is annotations.json:image_dir, data.yaml:split or folder:split, not {source!r}"
        )
    return parts[-1]


def columns_of(name: str) -> Columns | None:
    """Those of a data set of :func:`register`; None for those that others registered."""
    images = DatasetCatalog.data.get(name)
    return images.columns if isinstance(images, Registered) else None


def open_records(names: Sequence[str], filter_empty: bool = False) -> Records:
    """The images of data sets, one set after another.

    Args:
        filter_empty: leave out those without objects that are no crowds, if the images have
            annotations.

    Raises:
        ValueError: naming the data sets, if they have no images, other classes than each other, or
            objects of a class that is not among them.
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
        check_metadata_consistency("thing_classes", names)
        for name, images, known in zip(names, sets, classes, strict=True):
            numbers = images.classes
            for number in (numbers.min(initial=0), numbers.max(initial=0)):
                if not 0 <= number < len(known):
                    raise UserError(
                        f"data set {name} has an object of category_id {number}, but {len(known)} "
                        "classes"
                    )
    return records


def _open(name: str) -> Registered | Listed:
    images = DatasetCatalog.data.get(name)
    return images if isinstance(images, Registered) else Listed(DatasetCatalog.get(name))


def provide_json(name: str) -> None:
    """Names in the metadata of a data set of :func:`register` a json of its objects, which
    Detectron2's evaluators read."""
    metadata, columns = MetadataCatalog.get(name), columns_of(name)
    if columns is not None and not metadata.get("json_file"):
        metadata.json_file = columns.provide_json()


def _register(name: str, images: Registered, metadata: dict) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, images)
    MetadataCatalog.get(name).set(**{NUMBERS: dict(images.number)}, **metadata)


def follow(name: str, classes: Sequence[str]) -> None:
    """Gives the classes of a data set the numbers that they have among ``classes``: sets whose
    files list the same classes in another order can be used together.

    Raises:
        ValueError: naming the classes where they are others, or a data set in another order that
            :func:`register` did not make.
    """
    own = classes_of(name)
    if own is None or not classes or list(own) == list(classes):
        return
    places = _places(own, classes)
    if places is None:
        raise UserError(
            f"data set {name} has the classes {_some(own)}, but the data set or weights that it is "
            f"used with have {_some(classes)}: what is found would be called by the wrong name; "
            "--classes gives all of --register the same"
        )
    images = DatasetCatalog[name]
    if not isinstance(images, Registered):
        if places == list(range(len(own))):
            return
        raise UserError(
            f"data set {name} has the classes {_some(own)}, which are {_some(classes)} in another "
            "order: register it by --register"
        )
    metadata = MetadataCatalog.get(name).as_dict()
    unchanged = {k: x for k, x in metadata.items() if k not in ("name", NUMBERS)}
    number = {category_id: places[i] for category_id, i in images.number.items()}
    images = Registered(images.columns, images.image_dir, number)
    _register(name, images, {**unchanged, "thing_classes": list(classes)})


def _places(own: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Where each class lies among the others; in other cases only where that is unambiguous."""
    for plain in (str, lambda x: x.strip().casefold()):
        ours, theirs = [plain(x) for x in own], [plain(x) for x in classes]
        if len({*ours}) == len(ours) and sorted(ours) == sorted(theirs):
            return [theirs.index(x) for x in ours]
    return None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{len(names)} classes {shown}, ..." if len(names) > 5 else shown


def log_remarks(names: Sequence[str]) -> None:
    """Says what training leaves out of data sets of :func:`register`, and what is odd."""
    for name in dict.fromkeys(names):
        for remark in MetadataCatalog.get(name).get("remarks", {}).values():
            logging.getLogger(__name__).warning("Data set %s has %s", name, remark)


def refuse_missing_images(names: Sequence[str], filter_empty: bool = False) -> None:
    """Check that the images of data sets can be opened. Each folder is listed once, and for each
    scheme of addresses Detectron2's PathManager is asked once.

    Args:
        filter_empty: whether images without objects are not used.

    Raises:
        ValueError: naming the data set and the first image that is not there.
    """
    for name in dict.fromkeys(names):
        records = Records([_open(name)])
        if filter_empty and len(records) and "annotations" in records[0]:
            records = records.choose(records.counts > 0)
        files = records.file_names()
        missing = list(_missing(files))
        if missing:
            hint = "; addresses are not fetched: download the images" if "://" in missing[0] else ""
            raise UserError(
                f"data set {name}: {len(missing)} of {len(files)} images do not exist, such as "
                f"{missing[0]}{hint}"
            )


def _missing(files: Iterable[str]) -> Iterator[str]:
    is_opened: dict[str, bool] = {}
    listed: dict[str, set[str]] = {}
    for file in files:  # a million within a second
        if "://" in file and (scheme := ADDRESS.match(file)):
            if scheme[0] not in is_opened:
                is_opened[scheme[0]] = _is_opened(file)
            if not is_opened[scheme[0]]:
                yield file
            continue
        folder, _, name = file.rpartition("/")
        if folder not in listed:
            listed[folder] = _files_in(folder)
        # File systems may ignore case, and paths can be written otherwise.
        if name not in listed[folder] and not os.path.isfile(file):
            yield file


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {x.name for x in entries if x.is_file()}
    except OSError:
        return set()


def _is_opened(address: str) -> bool:
    """Whether Detectron2's PathManager has a handler for an address. Without one it looks for a
    local file of that name.

    Raises:
        ValueError: naming the address, if the handler fails.
    """
    provide(address)
    try:
        return PathManager.isfile(address)
    except NotImplementedError:  # a handler that cannot tell, as that of https
        return True
    except Exception as error:  # handlers raise errors of many types
        raise UserError(f"the image {address} cannot be opened: {error}") from error


def has_objects(name: str) -> bool:
    """Whether a data set has objects that evaluation measures, other than crowds; True if no such
    data set is registered."""
    if name not in DatasetCatalog:
        return True
    known = columns_of(name)
    return _has_objects(DatasetCatalog[name]) if known is None else known.about["to_measure"] > 0


@cache
def _has_objects(load: Callable[[], list[dict]]) -> bool:
    return any(not x.get("iscrowd") for r in load() for x in r.get("annotations", ()))


def refuse_unannotated(names: Sequence[str]) -> None:
    """Training cannot be on a data set in which :func:`register` found no object that it uses.

    Raises:
        ValueError: naming the data set, and what its annotations are.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("to_learn") == 0:
            remarks = metadata.remarks.items()
            left_out = "; ".join(x for kind, x in remarks if KINDS[kind].level == DROPPED)
            but = f", but {left_out}" if left_out else ""
            raise UserError(f"data set {name} has no annotations to train on{but}")


def count_training_images(names: Sequence[str], filter_empty: bool) -> int:
    """Images that training on these data sets goes through.

    Args:
        filter_empty: whether it leaves out those without objects.
    """
    return len(open_records(names, filter_empty))


def ids_of(name: str) -> list[int]:
    """Ids of a data set's classes in its file, in the order of their numbers; [] where that is not
    known."""
    if classes_of(name) is None:
        return []
    number = MetadataCatalog.get(name).get(NUMBERS, {})
    return sorted(number, key=number.__getitem__)


def without_classes(names: Sequence[str]) -> list[str]:
    """Those that are registered, but without names of classes."""
    return [name for name in names if name in DatasetCatalog and classes_of(name) is None]


def classes_of(name: str) -> list[str] | None:
    """Names of a data set's classes, or None where no such data set is registered, or without them.

    Reads the annotations when Detectron2 does not know the classes before that.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    return metadata.get("thing_classes")
