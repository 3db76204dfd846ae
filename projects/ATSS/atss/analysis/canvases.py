"""Objects as an assigner gets them: resized, in batches of one canvas."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from atss_runner.images import Size, resized

from ..labels.coco import Objects
from ..structures import GroundTruth

Progress = Callable[..., Iterable]
# Images assigned at a time, which bounds memory.
CHUNK = 64


def on_canvases(
    content: dict,
    objects: Objects,
    sizes: Sequence[Size],
    divisibility: int,
    progress: Progress = lambda items, **_: items,
    chunk: int = CHUNK,
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray, GroundTruth, np.ndarray]]:
    """Yield the objects that training uses, in batches of resized images of one canvas.

    Args:
        sizes: (shorter side, longest side), or (height, width, True) for stretched images; every
            image comes once for each.
        divisibility: of the sides of canvases.

    Yields:
        (height, width) of the canvas; positions of the images in the json; (m,) positions among the
            M used objects; their ground truth; (m, 2) scale of their images, (x, y).
    """
    used = np.flatnonzero(objects.used)
    image_of = objects.image[used]
    sides = np.array([(e["width"], e["height"]) for e in content["images"]], dtype=np.float64)
    boxes = objects.boxes[used]
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, np.tile(sides, 2)[image_of])
    order = np.argsort(image_of, kind="stable")
    starts = np.searchsorted(image_of[order], np.arange(len(sides) + 1))
    batches = _batches(np.unique(image_of), sides, sizes, divisibility, chunk)
    for canvas, images, scale in progress(batches, unit="batch", desc="anchors"):
        of_batch = np.concatenate([order[starts[i] : starts[i + 1]] for i in images])
        index = np.repeat(np.arange(len(images)), starts[images + 1] - starts[images])
        gt = GroundTruth(
            boxes=torch.from_numpy(boxes[of_batch] * np.tile(scale, 2)[index]).float(),
            classes=torch.from_numpy(objects.category[used][of_batch].astype(np.int64)),
            image_index=torch.from_numpy(index),
            num_images=len(images),
        )
        yield canvas, images, of_batch, gt, scale[index]


def _batches(
    images: np.ndarray,
    sides: np.ndarray,
    sizes: Sequence[Size],
    divisibility: int,
    count: int,
) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Return canvas, positions of the images and (n, 2) their scales, by batch."""
    batches = []
    for size in sizes:
        by_canvas = defaultdict(list)
        for i in images:
            width, height = map(int, sides[i])
            new = resized(height, width, *size)
            if min(new) > 0:
                canvas = (
                    -(-new[0] // divisibility) * divisibility,
                    -(-new[1] // divisibility) * divisibility,
                )
                by_canvas[canvas].append((i, new[1] / width, new[0] / height))
        for canvas, resized_images in by_canvas.items():
            for start in range(0, len(resized_images), count):
                chunk = np.array(resized_images[start : start + count])
                batches.append((canvas, chunk[:, 0].astype(np.int64), chunk[:, 1:]))
    return batches
