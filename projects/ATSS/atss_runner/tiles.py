"""Detection on tiles of a large image: where tiles lie, and how their detections are merged."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .detections import Detections
from .media import FileError
from .postprocess import groups_of, nms

# Objects cover this share of a tile on average, as in getitune.
SHARE = 0.03
LEAST_SIZE = 32
GREATEST_OVERLAP = 0.9
# Overlap of two boxes, by which detections of all tiles are merged: intersection over union, or
# over the smaller box.
OVERLAPS = ("iou", "ios")


def tile_size(mean_area: float) -> int:
    """Return the size of tiles for objects of a mean area in pixels, a multiple of 32; 0 for 0."""
    steps = round(math.sqrt(mean_area / SHARE) / LEAST_SIZE)
    return max(steps, 1) * LEAST_SIZE if mean_area else 0


def choose_tiles(settings: Mapping[str, Any], size: int) -> "Tiles":
    """Return the layout of an exported file's metadata, with another size if it is not 0.

    Raises:
        FileError: if no size is known, or it is too small, or the metadata are damaged.
    """
    try:
        chosen = Tiles(**{"size": 0, **settings} | ({"size": size} if size else {}))
    except TypeError as error:
        raise FileError(f"the metadata 'tiles' are damaged: {settings}") from error
    if not chosen.size:
        raise FileError("the file has no size of tiles for its training data: pass one in pixels")
    if chosen.size < LEAST_SIZE:
        raise FileError(f"the size of tiles must be >= {LEAST_SIZE} pixels, got {chosen.size}")
    return chosen


@dataclass(frozen=True)
class Tiles:
    """Layout of square tiles over an image, and the merging of their detections.

    Detections of all tiles are merged by NMS. Before it, boxes that a border of their tile cuts are
    dropped if a box of the same class (or of any) that no border cuts covers at least half of them.

    Attributes:
        size: of a tile's sides, in pixels of the image.
        overlap: of neighbouring tiles, as a share of the size.
        whole: whether the whole image is detected on, too.
        merge: overlap of two boxes in NMS, a name of :data:`OVERLAPS`.
        threshold: NMS removes a box that overlaps a better one by more than this.
        class_agnostic: whether boxes of different classes remove each other.
    """

    size: int
    overlap: float = 0.25
    whole: bool = True
    merge: str = "iou"
    threshold: float = 0.6
    class_agnostic: bool = False
    # A border cuts a box that ends at most this share of a tile's side away from it.
    MARGIN: ClassVar[float] = 0.01
    # Least share of a cut box that a box without a cut covers to replace it.
    COVERED: ClassVar[float] = 0.5

    def boxes(self, height: int, width: int) -> np.ndarray:
        """Return the tiles of an image, (T, 4) int64 (x1, y1, x2, y2), row by row."""
        sides = min(width, self.size), min(height, self.size)
        return np.array(
            [
                (x, y, x + sides[0], y + sides[1])
                for y in self._starts(height)
                for x in self._starts(width)
            ]
        )

    def _starts(self, length: int) -> list[int]:
        """Return where tiles begin. The last one is moved inward."""
        last = max(length - self.size, 0)
        return [*range(0, last, max(round(self.size * (1 - self.overlap)), 1)), last]

    def detect(
        self,
        image: np.ndarray,
        detect: Callable[[list[np.ndarray]], list[Detections]],
        limit: int,
        batch: int = 4,
    ) -> Detections:
        """Detect on an image.

        Args:
            image: (H, W, C).
            detect: images, views of the large one -> their detections.
            limit: greatest number of detections.
            batch: tiles that are passed at a time.
        """
        height, width = image.shape[:2]
        tiles = self.boxes(height, width)
        if len(tiles) == 1:
            return detect([image])[0]
        found = []
        for first in range(0, len(tiles), batch):
            part = tiles[first : first + batch]
            results = detect([image[y1:y2, x1:x2] for x1, y1, x2, y2 in part])
            for tile, result in zip(part, results, strict=True):
                shifted = (result.boxes + np.tile(tile[:2], 2)).astype(np.float32)
                found.append(result._replace(boxes=shifted))
        cuts = [self._cut(x, tile, height, width) for x, tile in zip(found, tiles, strict=True)]
        others = detect([image]) if self.whole else []
        uncut = _join([*(x.take(~cut) for x, cut in zip(found, cuts, strict=True)), *others])
        kept = [
            x.take(cut & ~self._is_covered(x, _touching(uncut, tile)))
            for x, cut, tile in zip(found, cuts, tiles, strict=True)
        ]
        over_smaller = self.merge == "ios"
        joined = _join([uncut, *kept])
        return nms(joined, limit, self.threshold, self.class_agnostic, over_smaller)

    def _cut(self, found: Detections, tile: np.ndarray, height: int, width: int) -> np.ndarray:
        """Return whether a border of the tile that is none of the image's cuts a box, (M,)."""
        inner = tile != (0, 0, width, height)
        distance = (found.boxes - tile) * (1, 1, -1, -1)
        return (inner & (distance <= self.MARGIN * self.size)).any(axis=1)

    def _is_covered(self, found: Detections, others: Detections) -> np.ndarray:
        """Return whether a box of the same class among the others covers most of a box, (M,)."""
        boxes = found.boxes[:, None]
        low = np.maximum(boxes[..., :2], others.boxes[:, :2])
        high = np.minimum(boxes[..., 2:], others.boxes[:, 2:])
        area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
        covers = (high - low).clip(0).prod(axis=-1) >= self.COVERED * area
        own, other = (groups_of(x.classes, self.class_agnostic) for x in (found, others))
        return (covers & (own[:, None] == other)).any(axis=1)


def _touching(found: Detections, tile: np.ndarray) -> Detections:
    """Return the detections that overlap a tile."""
    x1, y1, x2, y2 = found.boxes.T
    return found.take((x1 < tile[2]) & (y1 < tile[3]) & (x2 > tile[0]) & (y2 > tile[1]))


def _join(parts: list[Detections]) -> Detections:
    return Detections(*map(np.concatenate, zip(*parts, strict=True)))
