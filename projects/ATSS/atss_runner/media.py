"""Images and films: found, read, written, and boxes drawn on them. NumPy and OpenCV."""

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

VIDEOS = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".ogv", ".webm", ".wmv"),
}
FRAMES_PER_SECOND = 25.0  # of a film that does not say
# Of classes, by turns: far apart from each other and from most photographs (BGR).
COLOURS = (
    *((60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155)),
    *((156, 188, 26), (0, 84, 211), (193, 182, 255), (15, 196, 241), (128, 128, 0)),
)

Item = TypeVar("Item")


def find_media(
    names: Iterable[str | Path], images: Container[str], output: Path
) -> tuple[dict[Path, Path], list[str]]:
    """The files that are named, and the images and videos in folders that are named and in their
    subfolders; each once.

    Args:
        images: endings of images in folders, such as ".png".
        output: folder of results, which are not taken for inputs of another folder.

    Returns:
        {file: its path within the folder that was named, or its name}, and a sentence about each
        input that cannot be used and the files of each folder that are of another kind.
    """
    found: dict[str, tuple[Path, Path]] = {}
    skipped = []
    for path in map(Path, names):
        inside = [path]
        try:
            if path.is_dir():
                inside, problems = _find_in_folder(path, images, output)
                skipped += problems
            elif not path.exists():
                skipped.append(f"{path} does not exist")
                continue
        except OSError as error:
            skipped.append(f"{path} cannot be read: {error.strerror}")
            continue
        for file in inside:
            name = file.relative_to(path) if file != path else Path(path.name)
            found.setdefault(os.path.abspath(file), (file, name))
    return dict(found.values()), list(dict.fromkeys(skipped))


def _find_in_folder(
    top: Path, images: Container[str], output: Path
) -> tuple[list[Path], list[str]]:
    found: list[Path] = []
    others: list[str] = []
    problems: list[str] = []

    def name_unreadable(error: OSError) -> None:
        problems.append(f"the folder {error.filename} cannot be read: {error.strerror}")

    # Links are followed, but into no folder twice: they may lead in a circle.
    entered = {top.resolve()}
    for place, folders, files in os.walk(top, onerror=name_unreadable, followlinks=True):
        inside = [Path(place, name) for name in sorted(folders) if not name.startswith(".")]
        folders.clear()
        for folder in inside:
            target = folder.resolve()
            if target == output.resolve():
                problems.append(f"the folder {folder}, in which the results are")
            elif target not in entered:
                entered.add(target)
                folders.append(folder.name)
        for file in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            if is_video(file) or file.suffix.lower() in images:
                found.append(file)
            else:
                others.append(str(file.relative_to(top)))
    if not found and not problems:
        problems.append(f"the folder {top} has no image and no video")
    if others:
        more = f", and {len(others) - 3} more" if len(others) > 3 else ""
        kind = f"neither images nor videos by their endings in {top}"
        problems.append(f"{kind} ({len(others)}): {', '.join(others[:3])}{more}")
    return found, problems


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to ``size`` items."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Film:
    """The frames of a video, (H, W, 3) BGR, and a writer for one like it.

    Raises:
        OSError: naming the file, where it cannot be opened.
    """

    def __init__(self, path: Path):
        self.source = cv2.VideoCapture(str(path))
        if not self.source.isOpened():
            empty = path.is_file() and not path.stat().st_size
            problem = "empty" if empty else "damaged, or of an unknown format"
            raise OSError(f"cannot open the film {path}: it is {problem}")
        self.rate = max(self.source.get(cv2.CAP_PROP_FPS), 0) or FRAMES_PER_SECOND
        # As the file says; None where it does not.
        self.count = max(int(self.source.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            ok, frame = self.source.read()
            if not ok:
                self.source.release()
                return
            yield frame

    def writer(self, path: Path, size: tuple[int, int]) -> cv2.VideoWriter:
        """To ``write`` frames of this (width, height) to, and to ``release`` at the end."""
        return cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int] | np.ndarray, labels: Sequence[str]
) -> np.ndarray:
    """A copy of the image with boxes and labels on it.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (M, 4) (x1, y1, x2, y2) in pixels, the best first: it is drawn over
            the others, and labels over all boxes.
        classes: (M,) numbers, which choose the colours.
        labels: (M,) texts.
    """
    drawn = np.ascontiguousarray(image).copy()
    # Lines and letters grow with the image: 1 pixel and 10 pixels at 640.
    scale = max(max(image.shape[:2]) / 640, 0.6)
    thick, size = max(1, round(1.5 * scale)), 0.42 * scale
    best_last = list(zip(np.rint(boxes).astype(int).tolist(), classes, labels, strict=True))[::-1]
    for (x1, y1, x2, y2), k, _ in best_last:
        cv2.rectangle(drawn, (x1, y1), (x2, y2), _colour(k), thick)
    for (x1, y1, _, _), k, label in best_last:
        (width, height), below = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        # Above the box where there is room, else inside it.
        top = y1 - height - below - thick
        top = top if top >= 0 else y1
        x = min(x1, max(image.shape[1] - width, 0))
        cv2.rectangle(drawn, (x, top), (x + width, top + height + below), _colour(k), -1)
        ink = (0, 0, 0) if sum(_colour(k)) > 380 else (255, 255, 255)
        place = (x, top + height)
        cv2.putText(drawn, label, place, cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
    return drawn


def _colour(k: int) -> tuple[int, int, int]:
    return COLOURS[int(k) % len(COLOURS)]
