"""Images of a thousand objects: cut-outs of COCO's objects in the cells of a grid.

The recipe is frozen: figures in docs/large_images.md depend on it.

    python tests/crowds.py FOLDER COCO       # COCO has annotations, train2017 and val2017
    python tests/crowds.py 50 1              # seconds of an evaluation of 50 images, one class
"""

import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import hotcoco
import numpy as np
from PIL import Image

from atss.engine import coco as evaluation

ROWS, COLUMNS, CELL = 25, 40, 32
# Longer sides of cut-outs, and the least shorter side of an object in its photograph, in pixels.
SIDES, SOURCE_SIDE = (14, 28), 24
# {split: (images, photographs of their objects)}.
SPLITS = {"train": (6, "train2017"), "test": (2, "val2017")}


def make_crowds(folder: Path, coco: Path, seed: int = 0) -> dict[str, str]:
    """Write images of ROWS x COLUMNS objects of one class, each with one object per cell.

    Args:
        coco: with train2017, val2017 and annotations.

    Returns:
        {split: source for --register, without the name}.
    """
    rng = np.random.default_rng(seed)
    sources = {}
    for split, (count, photographs) in SPLITS.items():
        content = (coco / "annotations" / f"instances_{photographs}.json").read_text()
        cut_outs = cut(json.loads(content), coco / photographs)
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels, boxes = fill(cut_outs, rng)
            image = {"id": i, "file_name": f"{i}.png"}
            images.append(image | {"width": pixels.shape[1], "height": pixels.shape[0]})
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            for x, y, width, height in boxes:
                about = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
                box = {"bbox": [x, y, width, height], "area": width * height}
                annotations.append(about | box)
        labels = {"images": images, "annotations": annotations}
        labels["categories"] = [{"id": 1, "name": "object"}]
        (folder / f"{split}.json").write_text(json.dumps(labels))
        sources[split] = f"{folder}/{split}.json:{folder}/{split}"
    return sources


def cut(content: dict, images: Path) -> list[Image.Image]:
    """Return the cut-outs of all objects that are no crowds and large enough."""
    files = {x["id"]: images / x["file_name"] for x in content["images"]}
    found = []
    for x in sorted(content["annotations"], key=lambda x: x["id"]):
        left, top, width, height = x["bbox"]
        if min(width, height) < SOURCE_SIDE or max(width, height) > 4 * min(width, height):
            continue
        with Image.open(files[x["image_id"]]) as image:
            corners = (left, top, left + width, top + height)
            found.append(image.convert("RGB").crop(tuple(map(int, corners))))
    return found


def fill(cut_outs: list[Image.Image], rng: np.random.Generator) -> tuple[np.ndarray, list]:
    """Return the (H, W, 3) pixels of an image, and its boxes (x, y, width, height)."""
    pixels = rng.integers(90, 140, (ROWS * CELL, COLUMNS * CELL, 3), dtype=np.uint8)
    boxes = []
    for cell in range(ROWS * COLUMNS):
        part = cut_outs[rng.integers(len(cut_outs))]
        scale = rng.integers(*SIDES, endpoint=True) / max(part.size)
        width, height = (max(round(scale * x), 4) for x in part.size)
        x = cell % COLUMNS * CELL + int(rng.integers(CELL - width + 1))
        y = cell // COLUMNS * CELL + int(rng.integers(CELL - height + 1))
        pixels[y : y + height, x : x + width] = np.asarray(part.resize((width, height)))
        boxes.append((x, y, width, height))
    return pixels, boxes


def make_results(images: int, classes: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """Return a data set with ROWS x COLUMNS objects on each image, and as many detections, of
    which a tenth is of another class and others are moved, in COCO's formats."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, images + 1):
        for cell in range(ROWS * COLUMNS):
            width, height = rng.integers(*SIDES, size=2).tolist()
            box = [cell % COLUMNS * CELL + 2, cell // COLUMNS * CELL + 2, width, height]
            category = int(rng.integers(classes)) + 1
            about = {"image_id": image, "category_id": category, "bbox": box}
            ids = {"id": len(objects) + 1, "iscrowd": 0, "difficult": False}
            objects.append(about | ids | {"area": width * height})
            moved = (np.array(box) + rng.normal(0, 0.1, 4) * min(width, height)).tolist()
            detections.append(about | {"bbox": moved, "score": round(rng.uniform(), 3)})
            if rng.uniform() < 0.1:
                detections[-1]["category_id"] = int(rng.integers(classes)) + 1
    dataset = {
        "images": [{"id": i, "width": 1280, "height": 800} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
        "annotations": objects,
    }
    return dataset, detections


def compare_libraries(images: int, classes: int, limit: int) -> dict[str, tuple[float, np.ndarray]]:
    """Return seconds and the 12 values of the summary by library."""
    dataset, detections = make_results(images, classes)
    found = {}
    for library in ("hotcoco", "pycocotools"):
        with patch.object(evaluation, "hotcoco", hotcoco if library == "hotcoco" else None):
            start = time.perf_counter()
            evaluated = evaluation.evaluate_boxes(
                dataset, detections, max_detections=(1, 10, limit)
            )
            evaluated.summarize()
            found[library] = time.perf_counter() - start, np.array(evaluated.stats)
            print(
                f"{library}: {found[library][0]:.1f} s, AP {100 * evaluated.stats[0]:.2f}",
                flush=True,
            )
    return found


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        for limit in (100, ROWS * COLUMNS):
            found = compare_libraries(int(sys.argv[1]), int(sys.argv[2]), limit)
            stats = [x for _, x in found.values()]
            print(f"limit {limit}: largest difference {np.abs(stats[0] - stats[1]).max():.1e}")
    else:
        print(make_crowds(Path(sys.argv[1]), Path(sys.argv[2])))
