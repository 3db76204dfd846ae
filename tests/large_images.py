"""Large images for docs/large_images.md: mosaics of labelled photographs at their own size.

python tests/large_images.py LABELS IMAGES FOLDER [COUNT] [WIDTH] writes FOLDER/labels.json and
FOLDER/images.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from atss.labels.formats import read_labels

GREY = (114, 114, 114)
ROWS = 5


def make_large_images(
    labels: tuple[str, str], folder: Path, count: int = 20, width: int = 4000, seed: int = 0
) -> Path:
    """Write images of ROWS rows of photographs, at least ``width`` pixels wide, and their labels.

    The photographs of an image differ as long as there are enough. An image is as wide as its
    widest row and rows are as high as their highest photograph, grey where none is.

    Args:
        labels: as for :func:`~atss.labels.formats.read_labels`.

    Returns:
        the json of the labels.
    """
    source = read_labels(*labels)
    photographs = source.content["images"]
    objects: dict = {x["id"]: [] for x in photographs}
    for x in source.content["annotations"]:
        objects[x["image_id"]].append(x)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, count + 1):
        order = iter(np.tile(generator.permutation(len(photographs)), 1 + 99 // len(photographs)))
        placed, top, widest = [], 0, 0
        for _ in range(ROWS):
            left = highest = 0
            while left < width:
                entry = photographs[next(order)]
                placed.append((entry, left, top))
                left += entry["width"]
                highest = max(highest, entry["height"])
            top, widest = top + highest, max(widest, left)
        canvas = Image.new("RGB", (widest, top), GREY)
        for entry, x, y in placed:
            with Image.open(Path(source.image_dir, entry["file_name"])) as photograph:
                canvas.paste(photograph, (x, y))
            for found in objects[entry["id"]]:
                box = [found["bbox"][0] + x, found["bbox"][1] + y, *found["bbox"][2:]]
                place = {"id": len(annotations) + 1, "image_id": number, "bbox": box}
                annotations.append({**found, **place})
        name = f"{number}.jpg"
        canvas.save(folder / "images" / name, quality=95)
        images.append({"id": number, "file_name": name, "width": widest, "height": top})
    content = {**source.content, "images": images, "annotations": annotations}
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


if __name__ == "__main__":
    annotations, images, folder, *numbers = sys.argv[1:]
    make_large_images((annotations, images), Path(folder), *map(int, numbers))
