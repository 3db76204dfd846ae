"""Small pictures of objects and detections, as addresses that a page contains."""

import base64
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

LONGEST = 560  # pixels
COLUMN = 400  # pixels of the page for a picture, by which labels stay readable
QUALITY = 80
# BGR colours that colour-blind people can tell apart.
COLOURS = {"missed": (167, 121, 204), "found": (115, 158, 0), "wrong": (0, 159, 230)}
LEGEND = "Blue-green: found objects; purple: missed objects; orange, dashed: wrong detections."
DASH = 6  # pixels


class Mark(NamedTuple):
    """A box (x, y, width, height) in pixels of the image, its kind (a key of COLOURS), a label."""

    box: tuple[float, float, float, float]
    kind: str
    label: str = ""


def thumbnail(image: np.ndarray, marks: Iterable[Mark]) -> str:
    """Return a data address of a jpeg with the marks.

    Args:
        image: (H, W, 3) uint8 BGR.
        marks: the last are on top. A label without room above and below its box is left out.
    """
    scale = min(1.0, LONGEST / max(image.shape[:2]))
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    drawn = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    factors = (width / image.shape[1], height / image.shape[0]) * 2
    placed = []
    for mark in marks:
        x, y, w, h = (round(v * f) for v, f in zip(mark.box, factors, strict=True))
        placed.append(((x, y), (x + w, y + h), mark))
        _draw_box(drawn, *placed[-1])
    taken = np.zeros((height, width), dtype=bool)
    for corners in reversed(placed):
        _draw_label(drawn, taken, *corners)
    _, data = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _draw_box(image: np.ndarray, low: tuple[int, int], high: tuple[int, int], mark: Mark) -> None:
    colour = COLOURS[mark.kind]
    (x1, y1), (x2, y2) = low, high
    if mark.kind == "wrong":
        for x in range(x1, x2, 2 * DASH):
            for y in (y1, y2):
                cv2.line(image, (x, y), (min(x + DASH, x2), y), colour, 2)
        for y in range(y1, y2, 2 * DASH):
            for x in (x1, x2):
                cv2.line(image, (x, y), (x, min(y + DASH, y2)), colour, 2)
    else:
        cv2.rectangle(image, low, high, colour, 2)


def _draw_label(
    image: np.ndarray, taken: np.ndarray, low: tuple[int, int], high: tuple[int, int], mark: Mark
) -> None:
    """Draw a label above or below its box, unless both places are ``taken`` (H, W) bool."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4 * max(1.0, image.shape[1] / COLUMN)
    (w, h), below = cv2.getTextSize(mark.label, font, size, 1)
    x = max(min(low[0], image.shape[1] - w), 0)
    for y in (max(low[1] - h - below, 0), min(high[1], image.shape[0] - h - below)):
        place = np.s_[max(y, 0) : y + h + below, x : x + w]
        if mark.label and not taken[place].any():
            taken[place] = True
            cv2.rectangle(image, (x, y), (x + w, y + h + below), COLOURS[mark.kind], -1)
            cv2.putText(image, mark.label, (x, y + h), font, size, (0, 0, 0), 1, cv2.LINE_AA)
            return
