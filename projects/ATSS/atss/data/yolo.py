"""Reads a split of a data set in YOLO's layout, a data.yaml and a .txt of labels for each image,
into COCO's format: whatever is said of the one is then said of the other."""

import glob
import os
import reprlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path

import yaml

from .coco_json import BEYOND
from .findings import Finding
from .folders import SUFFIXES, THREADS, Places, Split, name_in, read_text, size_of

# One split, whatever it is called.
VALIDATION = ("val", "validation", "valid")
# Keys of a data.yaml that are no splits.
OTHER_KEYS = ("path", "names", "nc", "download")
# Objects reach beyond their image; what is farther outside than the image is large is no share.
FAR = 1.0


def read_yolo(yaml_file: str, split: str) -> tuple[dict, list[Finding]]:
    """A split as content in COCO's format, like that of :func:`~atss.data.coco_json.read_coco`.

    Sizes are those after the EXIF orientation; boxes are clipped; categories have YOLO's ids. File
    names begin in the folder of the yaml, and are absolute where the images lie elsewhere.

    Args:
        split: a key of the yaml. That of the validation split goes by any of VALIDATION.
    Returns:
        the content, and what was found in images and labels: what cannot be read is not in the
        content.

    Raises:
        ValueError: with a sentence that names the file, where nothing can be read.
    """
    folder = Path(os.path.abspath(yaml_file)).parent
    try:
        config = _read_yaml(yaml_file)
        names = _names(config)
        images = _images(config, split, folder)
        read = _read_images(images, folder, set(names))
        without = read.found["label_missing"]
        if read.images and len(without) == len(read.images):
            label = name_in(folder, _label_of(folder / without[0]))
            raise ValueError(
                f"no image of {split!r} has a label file: that of {without[0]} was looked for at "
                f"{label}"
            )
    except ValueError as error:
        raise ValueError(f"{yaml_file}: {error}") from error
    return read.result(names)


# ------------------------------------------------------------------------------------------------
# The yaml
# ------------------------------------------------------------------------------------------------


def _read_yaml(yaml_file: str) -> dict:
    text = read_text(Path(yaml_file))
    try:
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise ValueError(f"{line} is no valid yaml: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(f"it is no valid yaml: {problem}") from error
    if not isinstance(config, dict):
        raise ValueError("it holds no keys with values")
    return config


def _names(config: dict) -> dict[int, str]:
    """{id: name} in the order of the ids, which may have gaps."""
    names = config.get("names")
    if names is None:
        raise ValueError("it has no 'names'")
    if not isinstance(names, list | dict):
        kind = type(names).__name__
        raise ValueError(f"its 'names' is a {kind}, where a list or a dictionary belongs")
    found = {}
    for key, name in enumerate(names) if isinstance(names, list) else names.items():
        if not str(key).isdecimal():
            raise ValueError(f"its 'names' has {key!r}, where the number of a class belongs")
        # yaml makes truth values of words such as yes and on, and drops the end of 1.10.
        if type(name) not in (str, int):
            raise ValueError(f"the name of class {key} is {name!r}: put it in quotes")
        found[int(key)] = str(name)
    if not found:
        raise ValueError("its 'names' is empty")
    if config.get("nc", len(found)) != len(found):
        raise ValueError(f"its 'nc' is {config['nc']!r}, but it has {len(found)} names")
    return dict(sorted(found.items()))


def _images(config: dict, split: str, folder: Path) -> list[Path]:
    """Absolute paths of a split's images, sorted; each once."""
    splits = [key for key in config if key not in OTHER_KEYS and config[key]]
    same = (split, *VALIDATION) if split in VALIDATION else (split,)
    key = next((key for key in same if key in splits), None)
    if key is None:
        there = f"only {', '.join(map(repr, splits))}" if splits else "nor any other"
        raise ValueError(f"it has no split {split!r}, {there}")
    entries = [config[key]] if isinstance(config[key], str) else config[key]
    if not (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        value = reprlib.repr(config[key])
        raise ValueError(f"its {key!r} is {value}, where folders or .txt files belong")
    path = config.get("path") or ""
    if not isinstance(path, str):
        raise ValueError(f"its 'path' is {path!r}, where a folder belongs")
    # Where people mean it, where the images were moved without it, where YOLO's own tools look.
    bases = (folder / path, folder, Path.cwd() / path)
    found: set[Path] = set()
    for entry in entries:
        tried = _candidates(entry, bases)
        place = next((p for p in tried if p.exists()), None)
        if place is None:
            there = ", ".join(map(str, tried))
            raise ValueError(f"its {key!r} names {entry!r}, which does not exist; tried {there}")
        if place.is_dir():
            # This goes through links to folders, and passes over hidden files.
            files = glob.iglob("**/*", root_dir=place, recursive=True)
            found.update(place / f for f in files if os.path.splitext(f)[1].lower() in SUFFIXES)
        elif place.suffix.lower() == ".txt":
            found.update(_listed(place, bases))
        else:
            raise ValueError(f"its {key!r} names {entry!r}, which is neither a folder nor a .txt")
    if not found:
        raise ValueError(f"its {key!r} has no images: {', '.join(map(repr, entries))}")
    return sorted(found)


def _listed(list_file: Path, bases: Sequence[Path]) -> Iterator[Path]:
    """The images that a .txt names, one a line."""
    try:
        text = read_text(list_file)
    except ValueError as error:
        raise ValueError(f"the list {list_file}: {error}") from error
    for line in filter(None, map(str.strip, text.splitlines())):
        here = line.startswith("./")
        tried = _candidates(line, [list_file.parent] if here else [*bases, list_file.parent])
        yield next((p for p in tried if p.exists()), tried[0])


def _candidates(entry: str, bases: Sequence[Path]) -> list[Path]:
    """Where an entry may lie, the likeliest first. Exports of Roboflow write "../train/images" for
    what lies beside their yaml."""
    entries = dict.fromkeys((entry, entry.removeprefix("../")))
    tried = (os.path.normpath(base / e) for base in bases for e in entries)
    return [Path(p) for p in dict.fromkeys(tried)]


# ------------------------------------------------------------------------------------------------
# Images and labels
# ------------------------------------------------------------------------------------------------


def _read_images(images: list[Path], folder: Path, ids: set[int]) -> Split:
    labels = [_label_of(image) for image in images]
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(size_of, images))
        texts = list(pool.map(_read_label, labels))
    split = Split(folder)
    for image, label, size, text in zip(images, labels, sizes, texts, strict=True):
        name, name_of_label = name_in(folder, image), name_in(folder, label)
        if isinstance(size, OSError):
            split.found["file_unreadable"].append(f"{name} cannot be read: {size}")
            continue
        split.add_image(image, size)
        if text is None:
            split.found["label_missing"].append(name)
        elif isinstance(text, ValueError):
            split.found["label_malformed"].append(f"{name_of_label}: {text}")
        else:
            for category, box in _read_labels(text, name_of_label, size, ids, split.found):
                split.add_object(category, box)
    return split


def _read_labels(
    text: str, name: str, size: tuple[int, int], ids: set[int], found: Places
) -> Iterator[tuple[int, list[float]]]:
    """Class and [x, y, width, height] in pixels of every line that has them; the others are
    found."""
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            category, shares = _parse(fields)
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


def _parse(fields: list[str]) -> tuple[int, list[float]]:
    """Class and shares of a line.

    Raises:
        ValueError: as the end of a sentence that names the line.
    """
    numbers = []
    for field in fields:
        try:
            numbers.append(float(field))
        except ValueError as error:
            raise ValueError(f"has {field!r}, where a number belongs") from error
        if not isfinite(numbers[-1]):
            raise ValueError(f"has {field}, which is not finite")
    count = len(numbers)
    if count != 5 and (count < 7 or count % 2 == 0):
        plural = "numbers" if count > 1 else "number"
        raise ValueError(f"has {count} {plural}, but a box has 5, and a polygon 7, 9, 11 or more")
    if numbers[0] != int(numbers[0]):
        raise ValueError(f"has class {fields[0]}, which is no whole number")
    return int(numbers[0]), numbers[1:]


def _corners(shares: list[float]) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a box (x, y, width, height) around its centre, or around a polygon."""
    if len(shares) == 4:
        x, y, w, h = shares
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    xs, ys = shares[::2], shares[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _label_of(image: Path) -> Path:
    """The last folder called images becomes labels; where there is none, beside the image."""
    before, images, after = image.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else image).with_suffix(".txt")


def _read_label(label: Path) -> str | ValueError | None:
    """The content of a label file; None where there is none."""
    try:
        return read_text(label) if label.exists() else None
    except ValueError as error:
        return error
