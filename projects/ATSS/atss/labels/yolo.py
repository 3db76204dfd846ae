"""Reads a split of a data set in YOLO's layout, names of classes and a .txt of labels for each
image, into COCO's format: whatever is said of the one is then said of the other."""

import os
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path

import yaml

from ..errors import UserError
from .coco import BEYOND
from .findings import Finding
from .folders import (
    NAMES_FILES,
    SUFFIXES,
    THREADS,
    Places,
    Split,
    files_below,
    name_in,
    names_of,
    read_text,
    size_of,
    with_slashes,
)

# Keys of a data.yaml or obj.data that are no splits.
OTHER_KEYS = (
    *("path", "names", "nc", "download", "kpt_shape", "kpt_names", "flip_idx", "roboflow"),
    *("classes", "backup"),
)
# Objects reach beyond their image; what is farther outside than the image is large is no share.
FAR = 1.0


def read_yolo(source: str, split: str) -> tuple[dict, list[Finding]]:
    """A split as content in COCO's format, like that of :func:`~atss.labels.coco.read_coco`.

    Sizes are those after the EXIF orientation; boxes are clipped; categories have YOLO's ids. File
    names begin in the folder, and are absolute where the images lie elsewhere.

    Args:
        source: a data.yaml; Darknet's obj.data; or a folder with one of NAMES_FILES.
        split: a key of the file; or, in a folder, a list of images (.txt) or a folder, "." for
            itself. Names are those of :func:`~atss.labels.folders.names_of`.
    Returns:
        the content, and what was found in images and labels: what cannot be read is not in the
        content.

    Raises:
        ValueError: with a sentence that names the file, where nothing can be read.
    """
    path = Path(os.path.abspath(source))
    folder = path if path.is_dir() else path.parent
    try:
        config = _read_config(path, split)
        names = _names(config)
        with_key_points = _count_with_key_points(config)
        images, files = _images(config, split, folder)
        read, read_files = _read_images(images, folder, set(names), with_key_points)
        without = read.found["label_missing"]
        if read.images and len(without) == len(read.images):
            labels = " and ".join(name_in(folder, x) for x in _labels_of(folder / without[0]))
            raise UserError(
                f"no image of {split!r} has a label file: that of {without[0]} was looked for at "
                f"{labels}"
            )
        _find_unused(files.difference([path], images, read_files), with_key_points, read)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return read.result(names)


def files_of_yolo(source: str, split: str) -> tuple[dict, list[Path]]:
    """Names and splits, and all files that :func:`read_yolo` reads or looks for besides.

    Raises:
        ValueError: as :func:`read_yolo`.
    """
    path = Path(os.path.abspath(source))
    config = _read_config(path, split)
    images, files = _images(config, split, path if path.is_dir() else path.parent)
    return config, [*(y for x in images for y in (x, *_labels_of(x))), *sorted(files)]


# ------------------------------------------------------------------------------------------------
# Names and splits
# ------------------------------------------------------------------------------------------------


def _read_config(path: Path, split: str) -> dict:
    """Names and splits, as a data.yaml has them."""
    if path.is_dir():
        return _read_folder(path, split)
    return _read_darknet(path) if path.suffix.lower() == ".data" else _read_yaml(path)


def _read_yaml(yaml_file: Path) -> dict:
    text = read_text(yaml_file)
    try:
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise UserError(f"{line} is no valid yaml: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(f"it is no valid yaml: {problem}") from error
    if not isinstance(config, dict):
        raise UserError("it holds no keys with values")
    return config


def _read_darknet(data_file: Path) -> dict:
    """Lines ``key = value``, the names in a file of their own."""
    lines = [line.partition("=") for line in read_text(data_file).splitlines()]
    config: dict = {key.strip(): value.strip() for key, equals, value in lines if equals}
    if "names" in config:
        names = _read_names(_find("names", config["names"], (data_file.parent, Path.cwd())))
        if config.get("classes", str(len(names))) != str(len(names)):
            raise UserError(
                f"its 'classes' is {config['classes']}, but {config['names']} has {len(names)}"
            )
        config["names"] = names
    return config


def _read_folder(folder: Path, split: str) -> dict:
    """A folder without a file that describes it: the split is a list or a folder in it."""
    names = {x: _read_names(folder / x) for x in files_below(folder) if x.name in NAMES_FILES}
    if not names:
        raise UserError(f"it has none of {', '.join(NAMES_FILES)}")
    longest = max(names, key=lambda x: len(names[x]))
    for other, shorter in names.items():
        if shorter != names[longest][: len(shorter)]:
            raise UserError(f"{other} and {longest} name different classes")
    places = [(f"{x}.txt", x, f"images/{x}") for x in names_of(split)]
    tried = [folder / place for group in places for place in group]
    found = next((place for place in tried if os.path.exists(place)), None)
    if found is None:
        raise UserError(f"it has no split {split!r}; tried {', '.join(map(str, tried))}")
    return {split: str(found), "names": names[longest]}


def _read_names(file: Path) -> list[str]:
    """Names of classes 0, 1, ..., one a line."""
    try:
        return [line.strip() for line in read_text(file).rstrip().splitlines()]
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _names(config: dict) -> dict[int, str]:
    """{id: name} in the order of the ids, which may have gaps."""
    names = config.get("names")
    if names is None:
        raise UserError("it has no 'names'")
    if not isinstance(names, list | dict):
        kind = type(names).__name__
        raise UserError(f"its 'names' is a {kind}, where a list or a dictionary belongs")
    found = {}
    for key, name in enumerate(names) if isinstance(names, list) else names.items():
        if not str(key).isdecimal():
            raise UserError(f"its 'names' has {key!r}, where the number of a class belongs")
        # yaml makes truth values of words such as yes and on, and drops the end of 1.10.
        if type(name) not in (str, int):
            raise UserError(f"the name of class {key} is {name!r}: put it in quotes")
        found[int(key)] = str(name)
    if not found:
        raise UserError("its 'names' is empty")
    if config.get("nc", len(found)) != len(found):
        raise UserError(f"its 'nc' is {config['nc']!r}, but it has {len(found)} names")
    return dict(sorted(found.items()))


def _count_with_key_points(config: dict) -> int | None:
    """How many numbers a line with a box and key points has; None for data without key points."""
    shape = config.get("kpt_shape")
    if shape is None:
        return None
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(x) is int for x in shape)
        and shape[0] > 0
        and shape[1] in (2, 3)
    ):
        raise UserError(
            f"its 'kpt_shape' is {reprlib.repr(shape)}, where the number of key points and 2 or 3 "
            "belong"
        )
    return 5 + shape[0] * shape[1]


def _images(config: dict, split: str, folder: Path) -> tuple[list[Path], set[Path]]:
    """Absolute paths of a split's images, sorted, each once; and those of all files in folders that
    are used as a whole, and in their folders of labels."""
    splits = [key for key in config if key not in OTHER_KEYS and config[key]]
    key = next((key for key in names_of(split) if key in splits), None)
    if key is None:
        there = f"only {', '.join(map(repr, splits))}" if splits else "nor any other"
        raise UserError(f"it has no split {split!r}, {there}")
    entries = [config[key]] if isinstance(config[key], str) else config[key]
    if not (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        value = reprlib.repr(config[key])
        raise UserError(f"its {key!r} is {value}, where folders or .txt files belong")
    path = config.get("path") or ""
    if not isinstance(path, str):
        raise UserError(f"its 'path' is {path!r}, where a folder belongs")
    # Where people mean it, where the images were moved without it, where YOLO's own tools look.
    bases = (folder / with_slashes(path, folder), folder, Path.cwd() / path)
    images: set[Path] = set()
    files: set[Path] = set()
    lists: set[Path] = set()
    for entry in entries:
        place = _find(key, entry, bases)
        if place.is_dir():
            inside = [place / x for x in files_below(place)]
            images.update(x for x in inside if x.suffix.lower() in SUFFIXES)
            labels = _labels_of(place / "image")[0].parent
            files.update(inside, (labels / x for x in files_below(labels)))
        elif place.suffix.lower() == ".txt":
            images.update(_listed(place, bases))
            lists.add(place)
        else:
            raise UserError(f"its {key!r} names {entry!r}, which is neither a folder nor a .txt")
    if not images:
        raise UserError(f"its {key!r} has no images: {', '.join(map(repr, entries))}")
    return sorted(images), files - lists


def _listed(list_file: Path, bases: Sequence[Path]) -> Iterator[Path]:
    """The images that a .txt names, one a line."""
    try:
        text = read_text(list_file)
    except ValueError as error:
        raise UserError(f"the list {list_file}: {error}") from error
    for line in filter(None, map(str.strip, text.splitlines())):
        here = line.replace("\\", "/").startswith("./")
        tried = _candidates(line, [list_file.parent] if here else [*bases, list_file.parent])
        yield next((p for p in tried if os.path.exists(p)), tried[0])


def _find(key: str, entry: str, bases: Sequence[Path]) -> Path:
    tried = _candidates(entry, bases)
    place = next((p for p in tried if os.path.exists(p)), None)
    if place is None:
        there = ", ".join(map(str, tried))
        raise UserError(f"its {key!r} names {entry!r}, which does not exist; tried {there}")
    return place


def _candidates(entry: str, bases: Sequence[Path]) -> list[Path]:
    """Where an entry may lie, the likeliest first. Exports of Roboflow write "../train/images" for
    what lies beside their yaml, those of CVAT "data/train.txt", and Windows backslashes."""
    slashed = entry.replace("\\", "/")
    entries = (entry, slashed, slashed.removeprefix("../"), slashed.removeprefix("data/"))
    tried = (os.path.normpath(base / e) for base in bases for e in dict.fromkeys(entries))
    return [Path(p) for p in dict.fromkeys(tried)]


# ------------------------------------------------------------------------------------------------
# Images and labels
# ------------------------------------------------------------------------------------------------


def _read_images(
    images: list[Path], folder: Path, ids: set[int], with_key_points: int | None
) -> tuple[Split, set[Path]]:
    """The split, and the label files that it has been read from."""
    # If some labels lie in a folder of labels, a text beside an image may be its caption.
    apart = any(len(x) > 1 and os.path.exists(x[0]) for x in map(_labels_of, images))
    read = partial(_read_label, apart=apart, with_key_points=with_key_points)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(size_of, images))
        labels = list(pool.map(read, images))
    split = Split(folder)
    images_of = defaultdict(list)
    for image, (files, _) in zip(images, labels, strict=True):
        images_of[files[0] if files else None].append(name_in(folder, image))
    for image, (files, text), size in zip(images, labels, sizes, strict=True):
        name = name_in(folder, image)
        name_of_label = " and ".join(name_in(folder, x) for x in files)
        if isinstance(size, OSError):
            split.found["file_unreadable"].append(f"{name} cannot be read: {size}")
            continue
        split.add_image(image, size)
        if not files:
            split.found["label_missing"].append(name)
        elif text is None:
            split.found["label_ambiguous"].append(f"{name_of_label}: {name}")
        elif isinstance(text, ValueError):
            split.found["label_malformed"].append(f"{name_of_label}: {text}")
        elif text.strip() and len(images_of[files[0]]) > 1:
            if name == images_of[files[0]][0]:
                names = " or ".join(images_of[files[0]])
                split.found["label_ambiguous"].append(f"{name_of_label}: {names}")
        else:
            lines = _read_labels(text, name_of_label, size, ids, with_key_points, split.found)
            for category, box in lines:
                split.add_object(category, box)
    return split, {file for files, _ in labels for file in files}


def _find_unused(files: set[Path], with_key_points: int | None, split: Split) -> None:
    """Labels whose image is not there, and files that are neither images nor labels."""
    for file in sorted(files):
        name = name_in(split.folder, file)
        if _is_label(file, with_key_points):
            split.found["file_unreadable"].append(f"the image of {name} is not there")
        elif file.name not in NAMES_FILES:
            split.found["file_unused"].append(name)


def _is_label(file: Path, with_key_points: int | None) -> bool:
    """Whether the first line of a .txt is that of an object."""
    try:
        text = read_text(file) if file.suffix.lower() == ".txt" else ""
        _parse(text.strip().partition("\n")[0].split(), with_key_points)
    except ValueError:
        return False
    return True


def _read_labels(
    text: str,
    name: str,
    size: tuple[int, int],
    ids: set[int],
    with_key_points: int | None,
    found: Places,
) -> Iterator[tuple[int, list[float]]]:
    """Class and [x, y, width, height] in pixels of every line that has them; the others are
    found."""
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            category, shares = _parse(fields, with_key_points)
        except ValueError as error:
            found["label_malformed"].append(f"{name} line {number} {error}")
            continue
        if category not in ids:
            found["label_class_unknown"].append(f"{name} line {number}, class {category}")
        elif min(shares) < -FAR or max(shares) > 1 + FAR:
            found["label_units"].append(f"{name} line {number}, {' '.join(fields[1:])}")
        else:
            corners = _corners(shares)
            clipped = [min(max(c, 0.0), 1.0) for c in corners]
            beyond = [abs(a - b) for a, b in zip(corners, clipped, strict=True)]
            if any(b * side > BEYOND for b, side in zip(beyond, size * 2, strict=True)):
                found["box_partly_outside"].append(f"{name} line {number}")
            x1, y1, x2, y2 = (c * side for c, side in zip(clipped, size * 2, strict=True))
            yield category, [x1, y1, x2 - x1, y2 - y1]


def _parse(fields: list[str], with_key_points: int | None) -> tuple[int, list[float]]:
    """Class and shares of a line.

    Args:
        with_key_points: as from :func:`_count_with_key_points`. Key points are not read.

    Raises:
        ValueError: as the end of a sentence that names the line.
    """
    if len(fields) == with_key_points:
        fields = fields[:5]
    numbers = []
    for field in fields:
        try:
            numbers.append(float(field))
        except ValueError as error:
            raise UserError(f"has {field!r}, where a number belongs") from error
        if not isfinite(numbers[-1]):
            raise UserError(f"has {field}, which is not finite")
    count = len(numbers)
    if count != 5 and (with_key_points or count < 7 or count % 2 == 0):
        others = "a polygon 7, 9, 11 or more"
        if with_key_points:
            others = f"one with key points {with_key_points}, by 'kpt_shape'"
        plural = "numbers" if count > 1 else "number"
        raise UserError(f"has {count} {plural}, but a box has 5, and {others}")
    if numbers[0] != int(numbers[0]):
        raise UserError(f"has class {fields[0]}, which is no whole number")
    return int(numbers[0]), numbers[1:]


def _corners(shares: list[float]) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a box (x, y, width, height) around its centre, or around a polygon."""
    if len(shares) == 4:
        x, y, w, h = shares
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    xs, ys = shares[::2], shares[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _labels_of(image: Path) -> list[Path]:
    """Where the label of an image may be, the likeliest first: the last folder called images
    becomes labels; else beside the image."""
    beside = image.with_suffix(".txt")
    before, images, after = beside.as_posix().rpartition("/images/")
    return [Path(f"{before}/labels/{after}"), beside] if images else [beside]


def _read_label(
    image: Path, apart: bool, with_key_points: int | None
) -> tuple[list[Path], str | ValueError | None]:
    """The label files of an image and their content, None if there is none, or two that differ.

    Args:
        apart: a text beside the image that is no label is its caption.
    """
    first, *beside = _labels_of(image)
    files = [x for x in (first, *beside) if os.path.exists(x)]
    try:
        texts = [read_text(x) for x in files]
    except ValueError as error:
        return files, error
    is_beside = bool(beside) and files[-1:] == beside
    if apart and is_beside and texts[-1].strip() and not _is_label(files[-1], with_key_points):
        del files[-1], texts[-1]
    same = len({"\n".join(map(str.strip, x.strip().splitlines())) for x in texts}) == 1
    return files, texts[0] if same else None
