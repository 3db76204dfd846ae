"""Crops of large images at full resolution, in place of shrinking them."""

import math

import numpy as np
from detectron2.data import transforms as T

# Random windows that are tried for an image with objects.
TRIES = 10


class FullSizeCrop(T.Augmentation):
    """Augmentation that resizes an image or, if that would shrink it, sometimes crops a random
    window of the same size instead. The window contains the centre of a random object, if there is
    one, and keeps at least one object; after TRIES windows that keep none, the image is resized.

    Args:
        resize: gives the size, by the shortest edge or stretched.
        share: probability of a crop.
        min_area: share of an object's area that a window must contain.
    """

    def __init__(self, resize: T.Augmentation, share: float, min_area: float):
        super().__init__()
        self.resize, self.share, self.min_area = resize, share, min_area

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        resized = self.resize.get_transform(image)
        if not isinstance(resized, T.ResizeTransform) or np.random.rand() >= self.share:
            return resized
        height, width = image.shape[:2]
        below, right = height - resized.new_h, width - resized.new_w
        if min(below, right) < 0 or not (below or right):
            return resized
        size = resized.new_w, resized.new_h
        for _ in range(TRIES):
            x, y = np.random.randint(right + 1), np.random.randint(below + 1)
            if len(boxes):
                x1, y1, x2, y2 = boxes[np.random.randint(len(boxes))]
                x = _draw((x1 + x2) / 2, size[0], right)
                y = _draw((y1 + y2) / 2, size[1], below)
            shares = share_inside(boxes, (x, y, x + size[0], y + size[1]))
            if not len(boxes) or (shares >= self.min_area).any():
                return T.CropTransform(x, y, *size, width, height)
        return resized


def _draw(centre: float, length: int, last: int) -> int:
    """Draw the start, between 0 and ``last``, of an interval that contains a centre. Another crop
    may have moved the centre out of the image."""
    low = min(max(math.ceil(centre) - length, 0), last)
    return np.random.randint(low, max(min(int(centre), last), low) + 1)


def share_inside(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """Return the share of the area of boxes (M, 4) in a window (x1, y1, x2, y2): (M,)."""
    inside = np.clip(boxes, np.tile(window[:2], 2), np.tile(window[2:], 2))
    return _area(inside) / np.maximum(_area(boxes), 1e-9)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
