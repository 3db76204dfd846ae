"""Formats of labels: detect and read them."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atss_runner.images import SUFFIXES

from ..errors import UserError
from . import lvis
from .classes import choose, parse
from .coco import read_coco
from .findings import Finding
from .folders import NAMES_FILES, YOLO_CONFIGS, files_below, refuse_unknown_format, with_slashes
from .voc import FIRST_PIXEL, read_voc
from .yolo import files_of_yolo, read_yolo

ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")


@dataclass(frozen=True)
class Reading:
    """Options of :func:`read_labels`.

    Attributes:
        classes: as from :func:`~atss.labels.classes.parse`; empty for all.
        first_pixel: for Pascal VOC's xml, as in :func:`~atss.labels.voc.read_voc`.
    """

    classes: Mapping[str, Sequence[str]]
    first_pixel: int = FIRST_PIXEL


AS_IT_IS = Reading({})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        metavar="A,B=C,...",
        help="use only these classes, in this order; objects of C count as B",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        help="for Pascal VOC's xml: 1 if pixels are counted from 1, 0 if coordinates are corners "
        f"that begin at 0 (default: {FIRST_PIXEL})",
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """Return the options of :func:`add_arguments`.

    Raises:
        UserError: if ``--classes`` is invalid.
    """
    first_pixel = FIRST_PIXEL if args.first_pixel is None else args.first_pixel
    return Reading({} if args.classes is None else parse(args.classes), first_pixel)


@dataclass(frozen=True)
class Labels:
    """The labels of a split.

    Attributes:
        content: as from :func:`~atss.labels.coco.read_coco`.
        image_dir: folder in which its file names begin.
        findings: faults that the content does not show.
        evaluator: Detectron2's evaluator_type.
        names: all class names in the data.
        found: those of ``Reading.classes``.
    """

    content: dict
    image_dir: str
    findings: Sequence[Finding] = ()
    evaluator: str = "coco"
    names: Sequence[str] = ()
    found: Set[str] = frozenset()


def read_labels(annotations: str, images: str, reading: Reading = AS_IT_IS) -> Labels:
    """Read the labels of a split.

    Args:
        annotations, images: a json (COCO, LVIS) and its image folder; YOLO's yaml, obj.data or
            folder with one of NAMES_FILES, and the split; or a folder of Pascal VOC's xml, and the
            split.

    Raises:
        UserError: naming the file that cannot be read.
    """
    evaluator = "coco"
    findings: list[Finding] = []
    image_dir = image_dir_of(annotations, images)
    if _is_yolo(annotations):
        content, findings = read_yolo(annotations, images)
    elif os.path.isdir(annotations):
        try:
            content, findings = read_voc(annotations, images, reading.first_pixel)
        except UserError as error:
            if not (config := Path(annotations, "data.yaml")).is_file():
                raise
            raise UserError(f"{error}; did you mean the file {config}?") from error
    else:
        content = read_coco(annotations)
        for image in content["images"]:
            if isinstance(image.get("file_name"), str) and not ADDRESS.match(images):
                image["file_name"] = with_slashes(image["file_name"], Path(images))
        if lvis.is_lvis(content):
            content, evaluator = lvis.complete(content), "lvis"
            findings = lvis.find(content)
    names = [str(category.get("name")) for category in content["categories"]]
    found: set[str] = set()
    if reading.classes:
        content, left_out, found = choose(content, reading.classes)
        findings = [*findings, *left_out]
    return Labels(content, image_dir, findings, evaluator, names, found)


def image_dir_of(annotations: str, images: str) -> str:
    """Return the folder in which file names begin; that of a json may be a URL.

    Raises:
        UserError: if it does not exist.
    """
    if os.path.isdir(annotations):
        return annotations
    if _is_yaml(annotations):
        return os.path.dirname(annotations)
    if not (ADDRESS.match(images) or Path(images).is_dir()):
        refuse_unknown_format(annotations)
        if not os.path.exists(annotations):
            raise UserError(
                f"the labels {annotations} are missing, and the image folder {images} does not "
                "exist"
            )
        raise UserError(f"the image folder {images} does not exist")
    return images


class Sources(NamedTuple):
    """Files and texts that determine the labels of a split, for the key of their cache.

    Attributes:
        files: all files that are read or looked for.
        texts: other values, such as the split.
        content_only: whether the content of the one file alone determines the labels.
    """

    files: list[str]
    texts: list[str]
    content_only: bool = False


def sources(annotations: str, images: str) -> Sources:
    """Return the files and texts that determine the labels."""
    if _is_yolo(annotations):
        config, files = files_of_yolo(annotations, images)
        return Sources([os.path.abspath(annotations), *map(str, files)], [images, repr(config)])
    if os.path.isdir(annotations):
        root = Path(os.path.abspath(annotations))
        lists = [os.path.abspath(images)] if images.lower().endswith(".txt") else []
        files_in_root = [str(root / x) for x in files_below(root)]
        return Sources([*files_in_root, *lists], [images, str(root)])
    return Sources([os.path.abspath(annotations)], [], content_only=True)


def _is_yaml(annotations: str) -> bool:
    return annotations.lower().endswith(YOLO_CONFIGS)


def _is_yolo(annotations: str) -> bool:
    if not os.path.isdir(annotations):
        return _is_yaml(annotations)
    folder = Path(annotations)
    files = files_below(folder)
    if not any(x.name in NAMES_FILES for x in files):
        return False
    stems = {
        suffix: {x.stem for x in files if x.suffix.lower() == suffix} for suffix in (".xml", ".txt")
    }
    images = {x.stem for x in files if x.suffix.lower() in SUFFIXES}
    if stems[".xml"] and (both := (stems[".txt"] & images) - stems[".xml"]):
        raise UserError(
            f"{folder} has labels of two formats, Pascal VOC's xml and YOLO's such as "
            f"{min(both)}.txt: put each format into its own folder"
        )
    return not stems[".xml"]
