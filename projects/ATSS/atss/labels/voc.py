"""Reader of folders of Pascal VOC's xml, from labelImg, CVAT, Label Studio or Roboflow, into COCO's
format.

The image of an xml is in the same folder, or in the corresponding one (Annotations and JPEGImages,
labels/train and images/train). It has the same stem, or else the name in ``<filename>``.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from atss_runner.images import SUFFIXES

from ..errors import UserError
from .findings import Finding
from .folders import (
    NAMES_FILES,
    THREADS,
    Split,
    files_below,
    names_of,
    read_text,
    size_of,
    with_progress,
)
from .voc_xml import Label, read_label

# VOC counts pixels from 1, and a box contains its last pixel.
FIRST_PIXEL = 1
# Folders of labels and of images, in lower case: annotations/x corresponds to images/x.
KINDS_OF_FOLDERS = {
    *("annotation", "annotations", "label", "labels", "xml", "xmls"),
    *("image", "images", "img", "imgs", "jpegimages"),
}
# In the list of one class, the mark behind an image: no objects, difficult objects only, objects.
MARKS = ("-1", "0", "1")


class Entry(NamedTuple):
    """An image and its xml, relative to the root; None if missing.

    Attributes:
        kind, place: a finding about the pair; else empty.
    """

    image: Path | None
    xml: Path | None
    kind: str = ""
    place: str = ""


def read_voc(folder: str, split: str, first_pixel: int = FIRST_PIXEL) -> tuple[dict, list[Finding]]:
    """Read a split into COCO's format.

    Categories are all names in xml files below the folder, sorted, the same for all its splits. The
    box of a polygon is its extent. Boxes are not clipped. File names begin in the folder.

    Args:
        split: a list of images, ``ImageSets/Main/<split>.txt`` or another .txt in the folder; or a
            subfolder, ``.`` for the folder itself. Image folders without any xml are left out.
        first_pixel: 1 if pixels are counted as in VOC; 0 if coordinates are corners from 0 on.

    Returns:
        the content without unreadable files and objects, and the findings.

    Raises:
        UserError: if nothing can be read; the message names the folder.
    """
    root = Path(os.path.abspath(folder))
    try:
        if not root.is_dir():
            raise UserError("not a folder")
        files = files_below(root)
        xmls = [f for f in files if f.suffix.lower() == ".xml"]
        if not xmls:
            raise UserError(
                f"it has no xml files, and none of {', '.join(NAMES_FILES)} of YOLO's layout (give "
                "the path of a data.yaml itself)"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map(lambda f: read_label(root / f), xmls)
            labels = dict(zip(xmls, with_progress(read, len(xmls), "label"), strict=True))
            result = Split(root)
            images = [f for f in files if f.suffix.lower() in SUFFIXES]
            entries = _select(root, split, _pair(labels, images), result)
            unsized = [e.image for e in entries if e.image and not _labelled_size(e, labels)]
            measured = pool.map(lambda f: size_of(root / f), unsized)
            sizes = dict(zip(unsized, with_progress(measured, len(unsized), "image"), strict=True))
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
    label = labels[entry.xml] if entry.xml else None
    if label:
        split.places["label_malformed"] += [f"{entry.xml}: {x}" for x in label.problems]
    if entry.kind:
        split.places[entry.kind].append(entry.place)
    if entry.image is None:
        return
    size = _labelled_size(entry, labels) or sizes[entry.image]
    if isinstance(size, OSError):
        split.places["file_unreadable"].append(f"{entry.image} cannot be read: {size}")
        return
    split.add_image(split.folder / entry.image, size)
    if label is None:
        split.places["label_missing"].append(str(entry.image))
        return
    for name, (x1, y1, x2, y2), difficult, place in label.shapes:
        if first_pixel and min(x1, y1) == 0:
            split.places["box_at_pixel_zero"].append(f"{entry.xml}, {place}")
        box = [x1 - first_pixel, y1 - first_pixel, x2 - x1 + first_pixel, y2 - y1 + first_pixel]
        split.add_object(numbers[name], box, **({"difficult": 1} if difficult else {}))


# ------------------------------------------------------------------------------------------------
# Pairs of an xml and an image, and splits
# ------------------------------------------------------------------------------------------------


def _pair(labels: Mapping[Path, Label], images: Sequence[Path]) -> list[Entry]:
    by_stem, by_name = defaultdict(list), defaultdict(list)
    for image in images:
        by_stem[_place(image), image.stem].append(image)
        by_name[_place(image), image.name].append(image)
    anywhere = {key: image for image in images for key in (image.stem, image.name)}
    entries: dict[Path, Entry] = {}
    xmls_of = defaultdict(list)
    for xml, label in labels.items():
        candidates = by_stem.get((_place(xml), xml.stem), [])
        named = by_name.get((_place(xml), label.file_name), [])
        if len(candidates) != 1:
            candidates = [x for x in candidates if x in named] or candidates or named
        candidates = [x for x in candidates if x.parent == xml.parent] or candidates
        depth = len(xml.parts)  # images/a.jpg, rather than a.jpg above, for annotations/a.xml
        candidates = [x for x in candidates if len(x.parts) == depth] or candidates
        if len(candidates) == 1:
            (image,) = candidates
            xmls_of[image].append(xml)
            entries[xml] = Entry(image, xml)
            if named and image not in named:
                place = f"{xml}: {label.file_name}"
                entries[xml] = Entry(image, xml, "label_of_another_image", place)
        elif candidates:
            place = f"{xml}: {' or '.join(map(str, candidates))}"
            entries[xml] = Entry(None, xml, "label_ambiguous", place)
        else:
            other = anywhere.get(xml.stem) or anywhere.get(label.file_name)
            entries[xml] = Entry(None, xml, "file_unreadable", _no_image(xml, label, other))
    for image, xmls in xmls_of.items():
        if len(xmls) > 1:
            place = f"{' and '.join(map(str, xmls))}: {image}"
            entries.update({xml: Entry(None, xml, "label_ambiguous", place) for xml in xmls})
    return [*entries.values(), *(Entry(image, None) for image in images if image not in xmls_of)]


def _no_image(xml: Path, label: Label, other: Path | None) -> str:
    named = f" or {label.file_name!r}" if label.file_name else ""
    if other is None:
        return f"no image {xml.stem}.*{named} for {xml}"
    return (
        f"no image {xml.stem}.*{named} for {xml} in its folder: move {other} beside it, or images "
        "into JPEGImages and xml files into Annotations"
    )


def _place(file: Path) -> tuple[str, ...]:
    """Return a file's folder without the parts in which corresponding folders differ."""
    return tuple(x for x in file.parent.parts if x.lower() not in KINDS_OF_FOLDERS)


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
    """Return the entries of a folder and of the corresponding folders."""
    folders = {
        file.parent
        for entry in entries
        if any(x and x.is_relative_to(folder) for x in entry[:2])
        for file in entry[:2]
        if file
    }
    chosen = [entry for entry in entries if any(x and x.parent in folders for x in entry[:2])]
    if not any(entry.xml for entry in chosen):
        raise UserError(f"its folder {str(folder)!r} has no xml files")
    labelled = {entry.image.parent for entry in chosen if entry.xml and entry.image}
    lone = [entry.image.parent for entry in chosen if entry.image and not entry.xml]
    places = [f"{x} ({n} images)" for x, n in Counter(lone).items() if x not in labelled]
    result.places["folder_without_labels"] += places
    return [e for e in chosen if e.xml or (e.image and e.image.parent in labelled)]


def _listed(list_file: Path, root: Path, entries: list[Entry], result: Split) -> list[Entry]:
    """Return the entries that a list names, an image or xml a line, with or without suffix and
    folders. Files beside the list (or its ImageSets) are preferred, then those with an xml, then
    those of exactly this name."""
    try:
        lines = [line.strip() for line in read_text(list_file).splitlines()]
    except ValueError as error:
        raise UserError(f"the list {list_file}: {error}") from error
    if not any(lines):
        raise UserError(f"the list {list_file} names no image")
    by_stem = defaultdict(list)
    for i, entry in enumerate(entries):
        for stem in {x.stem for x in entry[:2] if x}:
            by_stem[stem].append(i)
    home = next((x.parent for x in list_file.parents if x.name == "ImageSets"), list_file.parent)
    base = home.relative_to(root) if home.is_relative_to(root) else Path(".")
    chosen: dict[int, None] = {}
    for line in dict.fromkeys(filter(None, lines)):
        if _stem(line) not in by_stem:  # a path from Windows, unless a file has this name
            line = line.replace("\\", "/")
        *before, last = line.split()
        marked = before and last in MARKS and _stem(line) not in by_stem
        name = Path(line.removesuffix(last).strip() if marked else line)
        matches = [i for i in by_stem.get(_stem(name.name), []) if _ends_with(entries[i], name)]
        for preferred in (
            [i for i in matches if any(x and x.is_relative_to(base) for x in entries[i][:2])],
            [i for i in matches if entries[i].xml],
            [i for i in matches if any(x and x.name == name.name for x in entries[i][:2])],
        ):
            matches = [i for i in matches if i in preferred] or matches
        place = f"{str(name)!r} in {list_file.name}"
        if len(matches) > 1:
            files = " or ".join(str(entries[i].xml or entries[i].image) for i in matches)
            result.places["label_ambiguous"].append(f"{place}: {files}")
        elif matches:
            chosen[matches[0]] = None
        else:
            result.places["file_unreadable"].append(f"{place}: no such image or xml")
    return [entries[i] for i in chosen]


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in {*SUFFIXES, ".xml"} else path.name


def _ends_with(entry: Entry, name: Path) -> bool:
    folders = name.parent.parts
    places = [x.parent.parts for x in entry[:2] if x]
    return not folders or any(x[len(x) - len(folders) :] == folders for x in places)
