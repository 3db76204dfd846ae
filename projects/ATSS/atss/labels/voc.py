"""Reads a split of a folder of Pascal VOC's xml, as labelImg, CVAT and others write it, into COCO's
format: whatever is said of the one is then said of the other."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

from ..errors import UserError
from .findings import Finding
from .folders import (
    NAMES_FILES,
    SUFFIXES,
    THREADS,
    Split,
    files_below,
    names_of,
    read_text,
    size_of,
    why,
)

# Where VOC begins to count pixels; its boxes end with their last pixel, not behind it.
FIRST_PIXEL = 1
# Folders, in capitals or not, of which one holds the labels and the other the images.
KINDS_OF_FOLDERS = {"annotations", "labels", "xml", "xmls", "jpegimages", "images"}
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
    """An image and its label; paths begin in the folder, None where there is none.

    Attributes:
        odd: a kind of finding about how they belong together, empty for none.
        text: what is said of it.
    """

    image: Path | None
    xml: Path | None
    odd: str = ""
    text: str = ""


def read_voc(folder: str, split: str, first_pixel: int = FIRST_PIXEL) -> tuple[dict, list[Finding]]:
    """A split as content in COCO's format, like that of :func:`~atss.labels.coco.read_coco`.

    Categories are all names in xml files below the folder, sorted, so that its splits have the same
    ones. The box of a polygon is its extent. Boxes are not clipped; objects that are marked
    difficult are objects like others. File names begin in the folder.

    Args:
        folder: with labels in ``Annotations`` and images in ``JPEGImages``, or both side by side.
        split: a list of images, ``ImageSets/Main/<split>.txt`` or another .txt in the folder; or a
            folder in it, ``.`` for itself, of which everything is read, but for folders of images
            without a single label.
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
            raise UserError("it is no folder")
        files = files_below(root)
        xmls = [f for f in files if f.suffix.lower() == ".xml"]
        if not xmls:
            tried = ", ".join(NAMES_FILES)
            raise UserError(
                f"it has no xml files, and none of {tried} of YOLO's layout (of a data.yaml, give "
                "its own path)"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            labels = dict(zip(xmls, pool.map(lambda f: _read_label(root / f), xmls), strict=True))
            result = Split(root)
            images = [f for f in files if f.suffix.lower() in SUFFIXES]
            entries = _select(root, split, _match(labels, images), result)
            unknown = [e.image for e in entries if e.image and not _labelled_size(e, labels)]
            sizes = dict(zip(unknown, pool.map(lambda f: size_of(root / f), unknown), strict=True))
        names = sorted({shape.name for label in labels.values() for shape in label.shapes})
        numbers = {name: i for i, name in enumerate(names, start=1)}
        for entry in entries:
            _add(entry, labels, sizes, numbers, first_pixel, result)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return result.result({i: name for name, i in numbers.items()})


def _labelled_size(entry: Entry, labels: Mapping[Path, Label]) -> tuple[int, int] | None:
    return labels[entry.xml].size if entry.xml else None


def _add(
    entry: Entry,
    labels: Mapping[Path, Label],
    sizes: Mapping[Path, tuple[int, int] | OSError],
    numbers: Mapping[str, int],
    first_pixel: int,
    split: Split,
) -> None:
    """Adds an image and its objects to a split."""
    label = labels[entry.xml] if entry.xml else None
    if label:
        split.found["label_malformed"] += [f"{entry.xml}: {x}" for x in label.problems]
    if entry.odd:
        split.found[entry.odd].append(entry.text)
    if entry.image is None and not entry.odd:
        named = f", which it calls {label.file_name!r}," if label and label.file_name else ""
        split.found["file_unreadable"].append(f"the image of {entry.xml}{named} is not there")
    if entry.image is None:
        return
    size = _labelled_size(entry, labels) or sizes[entry.image]
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
        box = [x1 - first_pixel, y1 - first_pixel, x2 - x1 + first_pixel, y2 - y1 + first_pixel]
        split.add_object(numbers[name], box, **({"difficult": 1} if difficult else {}))


# ------------------------------------------------------------------------------------------------
# Which label each image has, and which a split
# ------------------------------------------------------------------------------------------------


def _match(labels: Mapping[Path, Label], images: Sequence[Path]) -> list[Entry]:
    """Every label, with its image, and every image without a label.

    The image of a label is the one that is called like it, else the one that it names, in its own
    folder or the one that corresponds (images/train to labels/train). Only where no label of the
    folder has one it is looked for elsewhere, of those that are no other label's.
    """
    near_stem, near_name, any_stem, any_name = (_index() for _ in range(4))
    for image in images:
        near_stem[_place(image), image.stem].append(image)
        near_name[_place(image), image.name].append(image)
        any_stem[image.stem].append(image)
        any_name[image.name].append(image)
    searches: list[tuple[bool, Callable[[Path, Label], list[Path]]]] = [
        (True, lambda xml, label: near_stem.get((_place(xml), xml.stem), [])),
        (True, lambda xml, label: near_stem.get((_place(xml), _stem(xml.stem)), [])),
        (True, lambda xml, label: near_name.get((_place(xml), label.file_name), [])),
        (False, lambda xml, label: any_stem.get(_stem(xml.stem), [])),
        (False, lambda xml, label: any_name.get(label.file_name, [])),
    ]
    found: dict[Path, Entry] = {}
    taken: dict[Path, Path] = {}
    # Folders where labels have their images: what others lack there is lost, and not elsewhere.
    complete: set[tuple[str, ...]] = set()
    for is_near, search in searches:
        claims = _index()
        for xml, label in labels.items():
            if xml not in found and (is_near or _place(xml) not in complete):
                free = [image for image in search(xml, label) if image not in taken]
                best = _best(free, xml, {xml.stem, label.file_name})
                if len(best) > 1:
                    names = " or ".join(map(str, best))
                    found[xml] = Entry(None, xml, "label_ambiguous", f"{xml}: {names}")
                elif best:
                    claims[best[0]].append(xml)
        for image, xmls in claims.items():
            for xml in xmls:
                found[xml] = Entry(image, xml)
                if len(xmls) > 1:
                    both = f"{' and '.join(map(str, xmls))}: {image}"
                    found[xml] = Entry(None, xml, "label_ambiguous", both)
                elif not is_near:
                    found[xml] = Entry(image, xml, "image_elsewhere", f"{xml}: {image}")
                elif near_name.get((_place(xml), labels[xml].file_name), [image]) != [image]:
                    text = f"{xml}: {labels[xml].file_name}"
                    found[xml] = Entry(image, xml, "label_of_another_image", text)
        taken.update((image, xmls[0]) for image, xmls in claims.items())
        if is_near:
            complete.update(_place(xml) for xmls in claims.values() for xml in xmls)
    for xml, label in labels.items():
        others = [x for x in near_name.get((_place(xml), label.file_name), []) if x in taken]
        if xml not in found and others:
            both = f"{taken[others[0]]} and {xml}: {others[0]}"
            found[xml] = Entry(None, xml, "label_ambiguous", both)
    without = (Entry(image, None) for image in images if image not in taken)
    return [*(found.get(xml, Entry(None, xml)) for xml in labels), *without]


def _index() -> defaultdict:
    return defaultdict(list)


def _best(files: list[Path], to: Path, names: set[str]) -> list[Path]:
    """Those of these names, if there are any, and of them those in the same folder."""
    files = [x for x in files if x.name in names] or files
    return [x for x in files if x.parent == to.parent] or files


def _place(file: Path) -> tuple[str, ...]:
    """The folder of a file, that of labels and the one of their images being the same."""
    return _plain(file.parent)


def _plain(folder: Path) -> tuple[str, ...]:
    return tuple("" if x.lower() in KINDS_OF_FOLDERS else x for x in folder.parts)


def _stem(name: str) -> str:
    """Of an image's or a label's name, whose suffix may be left out, and which may have a dot."""
    path = Path(name)
    return path.stem if path.suffix.lower() in {*SUFFIXES, ".xml"} else path.name


def _select(root: Path, split: str, entries: list[Entry], result: Split) -> list[Entry]:
    tried: list[Path] = []
    for name in names_of(split):
        folder, inside = root / name, Path(os.path.normpath(name))
        lists = [root / "ImageSets" / "Main" / f"{name}.txt", root / f"{name}.txt"]
        lists += [folder, Path(os.path.abspath(name))] if name.lower().endswith(".txt") else []
        list_file = next((f for f in lists if f.is_file()), None)
        if list_file is not None:
            chosen = _listed(list_file, root, entries, result)
            break
        if folder.is_dir() and not inside.is_absolute() and ".." not in inside.parts:
            real, base = (Path(os.path.realpath(x)) for x in (folder, root))
            inside = real.relative_to(base) if real.is_relative_to(base) else inside
            chosen = _inside(inside, entries, result)
            break
        tried += [*lists, folder]
    else:
        raise UserError(f"it has no split {split!r}; tried {', '.join(map(str, tried))}")
    if chosen and not any(entry.xml for entry in chosen):
        raise UserError(f"no image of {split!r} has an xml, {chosen[0].image} first")
    return chosen


def _inside(folder: Path, entries: list[Entry], result: Split) -> list[Entry]:
    """Those in a folder or, of an images/train, in the labels/train that corresponds."""
    place = _plain(folder)

    def belongs(file: Path | None) -> bool:
        if file is None:
            return False
        corresponds = "" in place and _plain(file.parent)[: len(place)] == place
        return corresponds or file.is_relative_to(folder)

    chosen = [entry for entry in entries if belongs(entry.xml) or belongs(entry.image)]
    if not any(entry.xml for entry in chosen):
        raise UserError(f"its folder {str(folder)!r} has no xml files")
    with_labels = {entry.image.parent for entry in chosen if entry.xml and entry.image}
    left_out: Counter[Path] = Counter()
    kept = []
    for entry in chosen:
        if entry.xml or entry.image.parent in with_labels:  # type: ignore[union-attr]
            kept.append(entry)
        else:
            left_out[entry.image.parent] += 1  # type: ignore[union-attr]
    places = [f"{path} ({n} images)" for path, n in left_out.items()]
    result.found["folder_without_labels"] += places
    return kept


def _listed(list_file: Path, root: Path, entries: list[Entry], result: Split) -> list[Entry]:
    """The images that a .txt names, one a line, with or without suffix and folders; those below the
    list's own folder, or below that of its ImageSets, are meant first."""
    try:
        lines = [line.strip() for line in read_text(list_file).splitlines()]
    except ValueError as error:
        raise UserError(f"the list {list_file}: {error}") from error
    if not any(lines):
        raise UserError(f"the list {list_file} names no image")
    called = _index()
    for number, entry in enumerate(entries):
        stems = {_stem(x.name) for x in entry[:2] if x} | {x.stem for x in entry[:2] if x}
        for stem in stems:
            called[stem].append(number)
    own = next((x.parent for x in list_file.parents if x.name == "ImageSets"), list_file.parent)
    base = own.relative_to(root) if own.is_relative_to(root) else Path(".")
    chosen: dict[int, None] = {}
    for line in dict.fromkeys(filter(None, lines)):
        if _stem(line) not in called:  # a path from Windows, unless a file is called so
            line = line.replace("\\", "/")
        *before, last = line.split()
        marked = before and last in MARKS and _stem(line) not in called
        name = Path(line.removesuffix(last).strip() if marked else line)
        numbers = [i for i in called.get(_stem(name.name), []) if _ends_with(entries[i], name)]
        for better in (
            [i for i in numbers if any(x and x.is_relative_to(base) for x in entries[i][:2])],
            [i for i in numbers if entries[i].xml],
            [i for i in numbers if any(x and x.name == name.name for x in entries[i][:2])],
        ):
            numbers = [i for i in numbers if i in better] or numbers
        where = f"{str(name)!r} in {list_file.name}"
        if len(numbers) > 1:
            places = " or ".join(str(entries[i].xml or entries[i].image) for i in numbers)
            result.found["label_ambiguous"].append(f"{where}: {places}")
        elif numbers:
            chosen[numbers[0]] = None
        else:
            result.found["file_unreadable"].append(f"{where} is neither an image nor a label")
    return [entries[i] for i in chosen]


def _ends_with(entry: Entry, name: Path) -> bool:
    """Whether the image or the label lies in the folders that a line names."""
    folders = name.parent.parts
    places = [x.parent.parts for x in (entry.image, entry.xml) if x]
    return not folders or any(x[len(x) - len(folders) :] == folders for x in places)


# ------------------------------------------------------------------------------------------------
# One xml
# ------------------------------------------------------------------------------------------------


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses what can make an xml of a few lines fill the memory, or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("it has a DOCTYPE, which is not read")


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
        raise UserError("has no name")
    boxes, polygon = element.findall("bndbox"), element.find("polygon")
    if len(boxes) > 1:
        raise UserError(f"({name}) has {len(boxes)} boxes")
    try:
        if boxes:
            corners = tuple(_number(boxes[0], key) for key in ("xmin", "ymin", "xmax", "ymax"))
        elif polygon is not None:
            corners = _extent(polygon)
        else:
            raise UserError("has neither a bndbox nor a polygon")
    except ValueError as error:
        raise UserError(f"({name}) {error}") from error
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
        raise UserError(f"has a polygon of {len(xs)} x and {len(ys)} y")
    return min(xs), min(ys), max(xs), max(ys)


def _number(element: ElementTree.Element | None, key: str) -> float:
    text = element.findtext(key) if element is not None else None
    if text is None:
        raise UserError(f"has no {key}")
    return _finite(key, text)


def _finite(key: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError as error:
        raise UserError(f"has {key} {(text or '').strip()!r}, where a number belongs") from error
    if not isfinite(number):
        raise UserError(f"has {key} {number}, which is not finite")
    return number
