"""Reads a split of a folder of Pascal VOC's xml, as labelImg, CVAT and others write it, into COCO's
format: whatever is said of the one is then said of the other."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

from .findings import Finding
from .folders import SUFFIXES, THREADS, Split, read_text, size_of, why

# Where VOC begins to count pixels; its boxes end with their last pixel, not behind it.
FIRST_PIXEL = 1
# Where there are folders of these names, in capitals or not, nothing else is taken for a label or
# an image: there are masks as well. Labels below one have their images below the other.
LABEL_FOLDERS, IMAGE_FOLDERS = ("annotations",), ("jpegimages", "images")
# What the list of a class says behind an image: -1 has none, 0 difficult ones only, 1 has some.
MARKS = ("-1", "0", "1")


class Shape(NamedTuple):
    """An object of a label.

    Attributes:
        name: of its class.
        corners: (xmin, ymin, xmax, ymax) as they stand there.
        difficult: marked so.
        place: for people.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    place: str


class Label(NamedTuple):
    """What an xml says.

    Attributes:
        file_name: of its image, without folders; may be empty.
        size: (width, height); None where it does not say.
        shapes: objects that can be read.
        problems: of the others, and of an xml that cannot be read, ends of sentences that name it.
    """

    file_name: str
    size: tuple[int, int] | None
    shapes: list[Shape]
    problems: list[str]


class Entry(NamedTuple):
    """An image of a split, and its label; paths begin in the folder, None where there is none."""

    image: Path | None
    xml: Path | None
    name: str


def read_voc(folder: str, split: str, first_pixel: int = FIRST_PIXEL) -> tuple[dict, list[Finding]]:
    """A split as content in COCO's format, like that of :func:`~atss.data.coco_json.read_coco`.

    Categories are all names in xml files below the folder, sorted, so that its splits have the same
    ones. The box of a polygon is its extent. Boxes are not clipped; objects that are marked
    difficult are objects like others. File names begin in the folder.

    Args:
        folder: with labels in ``Annotations`` and images in ``JPEGImages``, or both side by side.
        split: a list of images, ``ImageSets/Main/<split>.txt`` or another .txt in the folder; or a
            folder in it, ``.`` for itself, of which everything is read.
        first_pixel: 1 where pixels are counted as VOC does; 0 where coordinates are those of
            corners, as many tools write them.
    Returns:
        the content, and what was found in images and labels: what cannot be read is not in the
        content.

    Raises:
        ValueError: with a sentence that names the folder, where nothing can be read.
    """
    root = Path(os.path.abspath(folder))
    try:
        if not root.is_dir():
            raise ValueError("it is no folder")
        names = glob.iglob("**/*", root_dir=root, recursive=True)  # goes through links to folders
        files = sorted(map(Path, names))
        xmls = _within(LABEL_FOLDERS, (f for f in files if f.suffix.lower() == ".xml"))
        if not xmls:
            raise ValueError("it has no xml files")
        images = _within(IMAGE_FOLDERS, (f for f in files if f.suffix.lower() in SUFFIXES))
        with ThreadPoolExecutor(THREADS) as pool:
            labels = dict(zip(xmls, pool.map(lambda f: _read_label(root / f), xmls), strict=True))
        result = Split(root)
        image_of = _match(labels, images, result)
        entries = list(_entries(root, split, image_of, images))
        if not any(entry.xml for entry in entries):
            raise ValueError(f"no image of {split!r} has an xml, {entries[0].name} first")
        numbers = _numbers(labels.values())
        for entry in entries:
            _add(entry, labels, numbers, first_pixel, result)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return result.result({i: name for name, i in numbers.items()})


def _within(folders: Sequence[str], files: Iterable[Path]) -> list[Path]:
    """Those in a folder of the first of these names that has any; all where none has."""
    listed = list(files)
    for folder in folders:
        inside = [f for f in listed if folder in map(str.lower, f.parent.parts)]
        if inside:
            return inside
    return listed


def _numbers(labels: Iterable[Label]) -> dict[str, int]:
    names = {shape.name for label in labels for shape in label.shapes}
    return {name: i for i, name in enumerate(sorted(names), start=1)}


def _add(
    entry: Entry,
    labels: Mapping[Path, Label],
    numbers: Mapping[str, int],
    first_pixel: int,
    split: Split,
) -> None:
    """Adds an image and its objects to a split."""
    label = labels[entry.xml] if entry.xml else None
    if label:
        split.found["label_malformed"] += [f"{entry.xml}: {x}" for x in label.problems]
    if entry.image is None:
        named = f", which it calls {label.file_name!r}," if label and label.file_name else ""
        split.found["file_unreadable"].append(f"the image of {entry.name}{named} is not there")
        return
    size = (label and label.size) or size_of(split.folder / entry.image)
    if isinstance(size, OSError):
        split.found["file_unreadable"].append(f"{entry.image} cannot be read: {size}")
        return
    split.add_image(split.folder / entry.image, size)
    if label is None:
        split.found["label_missing"].append(str(entry.image))
        return
    for name, (x1, y1, x2, y2), difficult, place in label.shapes:
        if first_pixel and min(x1, y1) == 0:
            split.found["box_at_pixel_zero"].append(f"{entry.xml}, {place}")
        if difficult:
            split.found["object_difficult"].append(f"{entry.xml}, {place}")
        box = [x1 - first_pixel, y1 - first_pixel, x2 - x1 + first_pixel, y2 - y1 + first_pixel]
        split.add_object(numbers[name], box, **({"difficult": 1} if difficult else {}))


# ------------------------------------------------------------------------------------------------
# Which images a split has, and which label each
# ------------------------------------------------------------------------------------------------


def _entries(
    root: Path, split: str, image_of: Mapping[Path, Path | None], images: Sequence[Path]
) -> Iterator[Entry]:
    folder = root / split
    lists = [root / "ImageSets" / "Main" / f"{split}.txt", root / f"{split}.txt"]
    lists += [folder, Path(os.path.abspath(split))] if split.lower().endswith(".txt") else []
    list_file = next((f for f in lists if f.is_file()), None)
    inside = Path(os.path.normpath(split))
    if list_file is not None:
        yield from _listed(list_file, image_of, images)
    elif folder.is_dir() and not inside.is_absolute() and ".." not in inside.parts:
        for xml, image in image_of.items():
            if xml.is_relative_to(inside):
                yield Entry(image, xml, str(xml))
        without = set(images).difference(image_of.values())
        for image in sorted(without):
            if image.is_relative_to(inside):
                yield Entry(image, None, str(image))
    else:
        tried = ", ".join(map(str, [*lists, folder]))
        raise ValueError(f"it has no split {split!r}; tried {tried}")


def _listed(
    list_file: Path, image_of: Mapping[Path, Path | None], images: Sequence[Path]
) -> Iterator[Entry]:
    """The images that a .txt names, one a line, with or without suffix and folders."""
    try:
        lines = [line.strip() for line in read_text(list_file).splitlines()]
    except ValueError as error:
        raise ValueError(f"the list {list_file}: {error}") from error
    if not any(lines):
        raise ValueError(f"the list {list_file} names no image")
    xmls_called, images_called = _by_stem(image_of), _by_stem(images)
    for line in dict.fromkeys(filter(None, lines)):
        *before, last = line.split()
        marked = before and last in MARKS and _stem(line) not in xmls_called
        name = line.removesuffix(last).strip() if marked else line
        xml = _nearest(xmls_called.get(_stem(name), []), Path(name))
        if xml is None:
            image = _nearest(images_called.get(_stem(name), []), Path(name))
            yield Entry(image, None, f"{name!r} in {list_file.name}")
        else:
            yield Entry(image_of[xml], xml, str(xml))


def _match(
    labels: Mapping[Path, Label], images: Sequence[Path], split: Split
) -> dict[Path, Path | None]:
    """The image of every label: the one that is called like it, else the one that it names."""
    by_stem, by_name = _by_stem(images), defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
    image_of: dict[Path, Path | None] = {}
    for xml, label in labels.items():
        own = by_stem.get(xml.stem, [])
        exact = [image for image in own if image.name == label.file_name]
        named = by_name.get(label.file_name, [])
        if own and named and not exact:
            split.found["label_of_another_image"].append(f"{xml}: {label.file_name}")
        image_of[xml] = _nearest(exact or own or named, xml)
    return image_of


def _by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    by_stem = defaultdict(list)
    for file in files:
        by_stem[file.stem].append(file)
    return by_stem


def _stem(name: str) -> str:
    """Of an image's or a label's name, whose suffix may be left out, and which may have a dot."""
    path = Path(name)
    return path.stem if path.suffix.lower() in {*SUFFIXES, ".xml"} else path.name


def _nearest(files: Sequence[Path], to: Path) -> Path | None:
    """That in the same folder, else that in the folder that corresponds to it, else the first."""
    own = _plain(to)
    order = [(file.parent != to.parent, _plain(file) != own, str(file)) for file in files]
    return files[order.index(min(order))] if files else None


def _plain(file: Path) -> list[str]:
    """The folders of a file, those of labels and images by one name."""
    kinds = {*LABEL_FOLDERS, *IMAGE_FOLDERS}
    return ["" if part.lower() in kinds else part for part in file.parent.parts]


# ------------------------------------------------------------------------------------------------
# One xml
# ------------------------------------------------------------------------------------------------


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses what can make an xml of a few lines fill the memory, or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which is not read")


def _read_label(path: Path) -> Label:
    try:
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
    except ElementTree.ParseError as error:
        return Label("", None, [], [f"it is no valid xml: {error}"])
    except (OSError, ValueError, LookupError) as error:  # LookupError of an unknown encoding
        return Label("", None, [], [why(error)])
    if root.tag != "annotation":
        problem = f"its root is {root.tag!r}, where 'annotation' belongs"
        return Label("", None, [], [problem])
    file_name = PureWindowsPath((root.findtext("filename") or "").strip()).name
    shapes, problems = [], []
    for number, element in enumerate(root.findall("object"), start=1):
        try:
            shapes.append(_shape(element, f"object {number}"))
        except ValueError as error:
            problems.append(f"object {number} {error}")
    return Label(file_name, _size(root), shapes, problems)


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (_number(root.find("size"), side) for side in ("width", "height"))
    except ValueError:
        return None
    whole = width == int(width) and height == int(height) and min(width, height) > 0
    return (int(width), int(height)) if whole else None


def _shape(element: ElementTree.Element, place: str) -> Shape:
    """
    Raises:
        ValueError: as the end of a sentence that names the object.
    """
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    boxes, polygon = element.findall("bndbox"), element.find("polygon")
    if len(boxes) > 1:
        raise ValueError(f"({name}) has {len(boxes)} boxes")
    try:
        if boxes:
            corners = tuple(_number(boxes[0], key) for key in ("xmin", "ymin", "xmax", "ymax"))
        elif polygon is not None:
            corners = _extent(polygon)
        else:
            raise ValueError("has neither a bndbox nor a polygon")
    except ValueError as error:
        raise ValueError(f"({name}) {error}") from error
    difficult = (element.findtext("difficult") or "").strip() == "1"
    return Shape(name, corners, difficult, f"{place} ({name})")  # type: ignore[arg-type]


def _extent(polygon: ElementTree.Element) -> tuple[float, float, float, float]:
    """Of points that are written <x1>, <y1>, <x2>, ... or <pt><x>, <y></pt>, ..."""
    coordinates: dict[str, list[float]] = {"x": [], "y": []}
    for element in polygon.iter():
        if re.fullmatch(r"[xy]\d*", element.tag):
            coordinates[element.tag[0]].append(_finite(element.tag, element.text))
    xs, ys = coordinates.values()
    if len(xs) < 3 or len(xs) != len(ys):
        raise ValueError(f"has a polygon of {len(xs)} x and {len(ys)} y")
    return min(xs), min(ys), max(xs), max(ys)


def _number(element: ElementTree.Element | None, key: str) -> float:
    text = element.findtext(key) if element is not None else None
    if text is None:
        raise ValueError(f"has no {key}")
    return _finite(key, text)


def _finite(key: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError as error:
        raise ValueError(f"has {key} {(text or '').strip()!r}, where a number belongs") from error
    if not isfinite(number):
        raise ValueError(f"has {key} {number}, which is not finite")
    return number
