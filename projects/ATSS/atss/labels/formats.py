"""The formats in which labels come: which one it is, and what was read of it."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import lvis
from .classes import choose, parse
from .coco import read_coco
from .findings import Finding
from .folders import NAMES_FILES, SUFFIXES, files_below, with_slashes
from .voc import FIRST_PIXEL, read_voc
from .yolo import files_of_yolo, read_yolo

ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")


@dataclass(frozen=True)
class Reading:
    """How labels are read.

    Attributes:
        classes: chosen ones, as of :func:`~atss.labels.classes.parse`; empty for all, as they are.
        first_pixel: of Pascal VOC's, as of :func:`~atss.labels.voc.read_voc`.
    """

    classes: Mapping[str, Sequence[str]]
    first_pixel: int = FIRST_PIXEL


AS_IT_IS = Reading({})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How labels are read, for a tool to ask."""
    parser.add_argument(
        "--classes",
        metavar="A,B=C,...",
        help="these classes alone, in this order; C's objects count as B's",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        help="of Pascal VOC's xml: 1 where pixels are counted as there, 0 where coordinates are "
        f"those of corners (default: {FIRST_PIXEL})",
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """What arguments of :func:`add_arguments` say.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    first_pixel = FIRST_PIXEL if args.first_pixel is None else args.first_pixel
    return Reading({} if args.classes is None else parse(args.classes), first_pixel)


@dataclass(frozen=True)
class Labels:
    """The labels of a split.

    Attributes:
        content: as of :func:`~atss.labels.coco.read_coco`.
        image_dir: the folder in which its file names begin.
        findings: what was found besides, which the content does not show.
        evaluator: Detectron2's evaluator_type.
        names: in the data, of classes.
        found: those of the chosen ones that the data have.
    """

    content: dict
    image_dir: str
    findings: Sequence[Finding] = ()
    evaluator: str = "coco"
    names: Sequence[str] = ()
    found: Set[str] = frozenset()


def read_labels(annotations: str, images: str, reading: Reading = AS_IT_IS) -> Labels:
    """
    Args:
        annotations, images: a json in COCO's or LVIS's format and its folder of images; in YOLO's
            layout a yaml, an obj.data or a folder without xml files but with one of NAMES_FILES,
            and its split; or a folder of Pascal VOC's xml and its split.

    Raises:
        ValueError: with a sentence that names what cannot be read.
    """
    evaluator = "coco"
    findings: list[Finding] = []
    image_dir = image_dir_of(annotations, images)
    if _is_yolo(annotations):
        content, findings = read_yolo(annotations, images)
    elif os.path.isdir(annotations):
        content, findings = read_voc(annotations, images, reading.first_pixel)
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
    """The folder in which file names of images begin; that of a json may be an address.

    Raises:
        ValueError: if it does not exist.
    """
    if os.path.isdir(annotations):
        return annotations
    if _is_yaml(annotations):
        return os.path.dirname(annotations)
    if not (ADDRESS.match(images) or Path(images).is_dir()):
        raise UserError(f"the image folder {images} does not exist")
    return images


def sources(annotations: str, images: str) -> tuple[list[str], list[str]]:
    """What labels are read from: texts (none of a json), and files. If these are as they were, so
    are the labels.

    Args:
        annotations, images: as of :func:`read`.

    Raises:
        ValueError: as :func:`read`.
    """
    if _is_yolo(annotations):
        config, found = files_of_yolo(annotations, images)
        return [images, repr(config)], [os.path.abspath(annotations), *map(str, found)]
    if os.path.isdir(annotations):
        root = Path(os.path.abspath(annotations))
        lists = [os.path.abspath(images)] if images.lower().endswith(".txt") else []
        return [images, str(root)], [*(str(root / x) for x in files_below(root)), *lists]
    return [], [os.path.abspath(annotations)]


def _is_yaml(annotations: str) -> bool:
    return annotations.lower().endswith((".yaml", ".yml", ".data"))


def _is_yolo(annotations: str) -> bool:
    """Whether labels are YOLO's: of a data.yaml or obj.data, or a folder that has them."""
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
            f"{folder} has labels of two formats: Pascal VOC's xml, and YOLO's such as "
            f"{min(both)}.txt: give each a folder of its own"
        )
    return not stems[".xml"]
