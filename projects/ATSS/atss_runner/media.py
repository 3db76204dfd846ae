"""Images and videos: found, read, written, with boxes. NumPy and OpenCV only."""

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

# fmt: off
VIDEOS = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".webm", ".wmv",
}
# BGR colours of classes, far apart from each other and from most photographs.
COLOURS = (
    (60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155),
    (156, 188, 26), (0, 84, 211), (193, 182, 255), (15, 196, 241), (128, 128, 0),
)
# fmt: on
FRAMES_PER_SECOND = 25.0  # of a video without a rate

Item = TypeVar("Item")


class FileError(OSError):
    """A file that cannot be used; the message names it."""


def find_media(
    names: Iterable[str | Path], images: Container[str], output: Path
) -> tuple[dict[Path, Path], list[str]]:
    """Find named files, and images and videos below named folders, each once.

    Args:
        images: endings of images in folders, such as ".png".
        output: folder of results, skipped inside other folders.

    Returns:
        {file: its path within the named folder, or its name}; a sentence for each skipped input,
            and for a folder's other files.
    """
    inputs: dict[str, tuple[Path, Path]] = {}
    skipped = []
    for path in map(Path, names):
        files = [path]
        try:
            if path.is_dir():
                files, problems = _find_in_folder(path, images, output)
                skipped += problems
            elif not path.exists():
                skipped.append(f"{path} does not exist")
                continue
        except OSError as error:
            skipped.append(f"{path} cannot be read: {error.strerror}")
            continue
        for file in files:
            name = file.relative_to(path) if file != path else Path(path.name)
            inputs.setdefault(os.path.abspath(file), (file, name))
    return dict(inputs.values()), list(dict.fromkeys(skipped))


def _find_in_folder(
    top: Path, images: Container[str], output: Path
) -> tuple[list[Path], list[str]]:
    media: list[Path] = []
    others: list[str] = []
    problems: list[str] = []

    def name_unreadable(error: OSError) -> None:
        problems.append(f"the folder {error.filename} cannot be read: {error.strerror}")

    # Links are followed, but each folder is entered once: links may form a circle.
    entered = {top.resolve()}
    for parent, folders, files in os.walk(top, onerror=name_unreadable, followlinks=True):
        subfolders = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
        folders.clear()
        for folder in subfolders:
            target = folder.resolve()
            if target == output.resolve():
                problems.append(f"the folder {folder} is the --output")
            elif target not in entered:
                entered.add(target)
                folders.append(folder.name)
        for file in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if is_video(file) or file.suffix.lower() in images:
                media.append(file)
            else:
                others.append(str(file.relative_to(top)))
    if not media and not problems:
        problems.append(f"the folder {top} has no image and no video")
    if others:
        more = f", and {len(others) - 3} more" if len(others) > 3 else ""
        kind = f"files in {top} without the ending of an image or a video"
        problems.append(f"{kind} ({len(others)}): {', '.join(others[:3])}{more}")
    return media, problems


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Film:
    """The frames of a video, (H, W, 3) BGR.

    Attributes:
        rate: frames per second.
        count: frames according to the header, or None.

    Raises:
        OSError: naming a file that cannot be opened.
    """

    def __init__(self, path: Path):
        self.source = cv2.VideoCapture(str(path))
        if not self.source.isOpened():
            empty = path.is_file() and not path.stat().st_size
            problem = "empty" if empty else "damaged, or has an unknown format"
            raise OSError(f"cannot open the film {path}: it is {problem}")
        self.rate = max(self.source.get(cv2.CAP_PROP_FPS), 0) or FRAMES_PER_SECOND
        self.count = max(int(self.source.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            ok, frame = self.source.read()
            if not ok:
                self.source.release()
                return
            yield frame

    def writer(self, path: Path, size: tuple[int, int]) -> cv2.VideoWriter:
        return cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int] | np.ndarray, labels: Sequence[str]
) -> np.ndarray:
    """Draw boxes and labels on a copy of an image.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (M, 4) (x1, y1, x2, y2) in pixels, best first and drawn last.
        classes: (M,) numbers, which choose colours.
    """
    drawn = np.ascontiguousarray(image).copy()
    # Lines of 1 pixel and letters of 10 pixels at 640, and in proportion.
    scale = max(max(image.shape[:2]) / 640, 0.6)
    thick, size = max(1, round(1.5 * scale)), 0.42 * scale
    best_last = list(zip(np.rint(boxes).astype(int).tolist(), classes, labels, strict=True))[::-1]
    for (x1, y1, x2, y2), k, _ in best_last:
        cv2.rectangle(drawn, (x1, y1), (x2, y2), _colour(k), thick)
    for (x1, y1, _, _), k, label in best_last:
        (width, height), below = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        # Above the box if there is room, else inside it.
        top = y1 - height - below - thick
        top = top if top >= 0 else y1
        x = min(x1, max(image.shape[1] - width, 0))
        cv2.rectangle(drawn, (x, top), (x + width, top + height + below), _colour(k), -1)
        ink = (0, 0, 0) if sum(_colour(k)) > 380 else (255, 255, 255)
        origin = (x, top + height)
        cv2.putText(drawn, label, origin, cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
    return drawn


def _colour(k: int) -> tuple[int, int, int]:
    return COLOURS[int(k) % len(COLOURS)]
