"""Reader of YOLO's labels, a .txt for each image, into COCO's format."""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path

from ..errors import UserError
from .coco import BEYOND
from .findings import LABEL_LINE, Finding
from .folders import (
    NAMES_FILES,
    THREADS,
    Places,
    Split,
    name_in,
    read_text,
    size_of,
    with_progress,
)
from .yolo_config import class_names, count_with_keypoints, find_images, label_files, read_config

# Coordinates farther from the image, in sides of the image, are not normalised; nearer ones belong
# to objects that reach beyond it.
FAR = 1.0


def read_yolo(source: str, split: str) -> tuple[dict, list[Finding]]:
    """Read a split into COCO's format, like :func:`~atss.labels.coco.read_coco`.

    Sizes are those after the EXIF orientation; boxes are clipped; categories keep YOLO's ids. File
    names begin in the folder, or are absolute if the images lie elsewhere.

    Args:
        source: a data.yaml; Darknet's obj.data; or a folder with one of NAMES_FILES.
        split: a key of the file; or, in a folder, a list of images (.txt) or a subfolder, "." for
            the folder itself.

    Returns:
        the content without files and lines that cannot be read, and the findings.

    Raises:
        UserError: if nothing can be read; the message names the file.
    """
    path = Path(os.path.abspath(source))
    folder = path if path.is_dir() else path.parent
    try:
        config = read_config(path, split)
        names = class_names(config)
        num_with_keypoints = count_with_keypoints(config)
        images, files = find_images(config, split, folder)
        builder, used_files = _read_images(images, folder, set(names), num_with_keypoints)
        unlabelled = builder.places["label_missing"]
        if builder.images and len(unlabelled) == len(builder.images):
            tried = " and ".join(name_in(folder, x) for x in label_files(folder / unlabelled[0]))
            raise UserError(
                f"no image of {split!r} has a label file: tried {tried} for {unlabelled[0]}"
            )
        _find_unused(files.difference([path], images, used_files), num_with_keypoints, builder)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return builder.result(names)


def files_of_yolo(source: str, split: str) -> tuple[dict, list[Path]]:
    """Return the config, and all other files that :func:`read_yolo` reads or tries to read."""
    path = Path(os.path.abspath(source))
    config = read_config(path, split)
    images, files = find_images(config, split, path if path.is_dir() else path.parent)
    return config, [*(y for x in images for y in (x, *label_files(x))), *sorted(files)]


def _read_images(
    images: list[Path], folder: Path, ids: set[int], num_with_keypoints: int | None
) -> tuple[Split, set[Path]]:
    """Return the split, and the label files used."""
    # If some labels lie in a labels folder, a text beside an image may be a caption.
    has_labels_folder = any(len(x) > 1 and os.path.exists(x[0]) for x in map(label_files, images))
    read = partial(_read_label, has_labels_folder, num_with_keypoints)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(with_progress(pool.map(size_of, images), len(images), "image"))
        labels = list(with_progress(pool.map(read, images), len(images), "label"))
    split = Split(folder)
    images_of = defaultdict(list)  # label file -> images that share it, such as a.jpg and a.png
    for image, (files, _) in zip(images, labels, strict=True):
        images_of[files[0] if files else None].append(name_in(folder, image))
    for image, (files, text), size in zip(images, labels, sizes, strict=True):
        name = name_in(folder, image)
        name_of_label = " and ".join(name_in(folder, x) for x in files)
        if isinstance(size, OSError):
            split.places["file_unreadable"].append(f"{name} cannot be read: {size}")
            continue
        split.add_image(image, size)
        if not files:
            split.places["label_missing"].append(name)
        elif text is None:
            split.places["label_ambiguous"].append(f"{name_of_label}: {name}")
        elif isinstance(text, ValueError):
            split.places["label_malformed"].append(f"{name_of_label}: {text}")
        elif text.strip() and len(images_of[files[0]]) > 1:
            if name == images_of[files[0]][0]:
                names = " or ".join(images_of[files[0]])
                split.places["label_ambiguous"].append(f"{name_of_label}: {names}")
        else:
            lines = _read_lines(text, name_of_label, size, ids, num_with_keypoints, split.places)
            for category, box, number in lines:
                split.add_object(category, box, **{LABEL_LINE: number})
    return split, {file for files, _ in labels for file in files}


def _find_unused(files: set[Path], num_with_keypoints: int | None, split: Split) -> None:
    """Find labels without an image, and other files."""
    for file in sorted(files):
        name = name_in(split.folder, file)
        if _is_label(file, num_with_keypoints):
            split.places["file_unreadable"].append(f"no image for {name}")
        elif file.name not in NAMES_FILES:
            split.places["file_unused"].append(name)


def _is_label(file: Path, num_with_keypoints: int | None) -> bool:
    """Whether the file is a .txt whose first line is an object."""
    try:
        text = read_text(file) if file.suffix.lower() == ".txt" else ""
        _parse(text.strip().partition("\n")[0].split(), num_with_keypoints)
    except ValueError:
        return False
    return True


def _read_lines(
    text: str,
    name: str,
    size: tuple[int, int],
    ids: set[int],
    num_with_keypoints: int | None,
    places: Places,
) -> Iterator[tuple[int, list[float], int]]:
    """Yield the class, [x, y, width, height] in pixels and the number of valid lines."""
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            category, numbers = _parse(fields, num_with_keypoints)
        except ValueError as error:
            places["label_malformed"].append(f"{name} line {number} {error}")
            continue
        if _has_score(fields):
            places["label_scored"].append(f"{name} line {number}")
        if category not in ids:
            places["label_class_unknown"].append(f"{name} line {number}, class {category}")
        elif min(numbers) < -FAR or max(numbers) > 1 + FAR:
            places["label_units"].append(f"{name} line {number}, {' '.join(fields[1:])}")
        else:
            corners = _corners(numbers)  # their sides of the image are (w, h, w, h)
            clipped = [min(max(c, 0.0), 1.0) for c in corners]
            beyond = [abs(a - b) for a, b in zip(corners, clipped, strict=True)]
            if any(b * side > BEYOND for b, side in zip(beyond, size * 2, strict=True)):
                places["box_partly_outside"].append(f"{name} line {number}")
            x1, y1, x2, y2 = (c * side for c, side in zip(clipped, size * 2, strict=True))
            yield category, [x1, y1, x2 - x1, y2 - y1], number


def _parse(fields: list[str], num_with_keypoints: int | None) -> tuple[int, list[float]]:
    """Parse the class and the normalised numbers of a line, without key points.

    Raises:
        UserError: the end of a sentence that names the line.
    """
    if len(fields) == num_with_keypoints or _has_score(fields):
        fields = fields[:5]
    numbers = []
    for field in fields:
        try:
            numbers.append(float(field))
        except ValueError as error:
            raise UserError(f"has {field!r}, expected a number") from error
        if not isfinite(numbers[-1]):
            raise UserError(f"has {field}, expected a finite number")
    count = len(numbers)
    if count != 5 and (num_with_keypoints or count < 7 or count % 2 == 0):
        others = "7, 9, 11 or more for a polygon"
        if num_with_keypoints:
            others = f"{num_with_keypoints} for a box with key points, by 'kpt_shape'"
        plural = "numbers" if count > 1 else "number"
        raise UserError(f"has {count} {plural}, expected 5 for a box or {others}")
    if numbers[0] != int(numbers[0]):
        raise UserError(f"has class {fields[0]}, expected a whole number")
    return int(numbers[0]), numbers[1:]


def _has_score(fields: list[str]) -> bool:
    """Whether a line is a detection, with a score after the box, as detectors write it."""
    try:
        return len(fields) == 6 and 0 <= float(fields[5]) <= 1
    except ValueError:
        return False


def _corners(numbers: list[float]) -> tuple[float, float, float, float]:
    """Return (x1, y1, x2, y2) of a box (centre x, centre y, width, height) or of a polygon."""
    if len(numbers) == 4:
        x, y, w, h = numbers
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _read_label(
    has_labels_folder: bool, num_with_keypoints: int | None, image: Path
) -> tuple[list[Path], str | ValueError | None]:
    """Return an image's label files, and their content, an error, or None if missing or different.

    Args:
        has_labels_folder: ignore other texts beside the image, such as captions.
    """
    candidates = label_files(image)
    files = [x for x in candidates if os.path.exists(x)]
    try:
        texts = [read_text(x) for x in files]
    except ValueError as error:
        return files, error
    is_beside = has_labels_folder and len(candidates) > 1 and files[-1:] == candidates[1:]
    if is_beside and texts[-1].strip() and not _is_label(files[-1], num_with_keypoints):
        del files[-1], texts[-1]
    same = len({"\n".join(map(str.strip, x.strip().splitlines())) for x in texts}) == 1
    return files, texts[0] if same else None
