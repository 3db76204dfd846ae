"""Images and films: found, read, written, and boxes drawn on them. NumPy and OpenCV."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
FRAMES_PER_SECOND = 25.0  # of a film that does not say
# Of classes, by turns: far apart from each other and from most photographs (BGR).
COLOURS = (
    *((60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155)),
    *((156, 188, 26), (0, 84, 211), (193, 182, 255), (15, 196, 241), (128, 128, 0)),
)

Item = TypeVar("Item")


def find_media(names: Iterable[str | Path]) -> list[Path]:
    """The images and videos that are named, or lie in the folders that are named, each once.

    Raises:
        ValueError: naming what does not exist, or is neither.
    """
    found = []
    for path in map(Path, names):
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGES | VIDEOS]
            if not inside:
                raise ValueError(f"the folder {path} holds no image and no video")
            found += inside
        elif not path.is_file():
            raise ValueError(f"the input {path} does not exist")
        elif path.suffix.lower() not in IMAGES | VIDEOS:
            raise ValueError(f"the input {path} is neither an image nor a video by its ending")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to ``size`` items."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Film:
    """The frames of a video, (H, W, 3) BGR, and a writer for one like it."""

    def __init__(self, path: Path):
        self.source = cv2.VideoCapture(str(path))
        self.rate = self.source.get(cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND
        # As the file says; None where it does not.
        self.count = int(self.source.get(cv2.CAP_PROP_FRAME_COUNT)) or None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            ok, frame = self.source.read()
            if not ok:
                self.source.release()
                return
            yield frame

    def writer(self, path: Path) -> cv2.VideoWriter:
        """To ``write`` frames of the same size to, and to ``release`` at the end."""
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        size = tuple(int(self.source.get(side)) for side in sides)
        return cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)


def draw(
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
