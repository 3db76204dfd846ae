"""Time and memory of registering a large data set, by format of its labels."""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .timing import table

SIDE = 640
CLASSES = ("cat", "dog", "cow")


def registration(images: int, boxes: int) -> dict:
    """Measure seconds and MiB of each format, in its own process, with the files in the cache.

    Args:
        images: number of images.
        boxes: number of boxes on each image.
    """
    report = {}
    with tempfile.TemporaryDirectory(prefix="atss_labels_") as folder:
        # A process inherits the peak memory of its parent, so this one must stay small.
        sources = _apart(_write, Path(folder), images, boxes)
        for form, source in sources.items():
            report[form] = _apart(_register, source)
    rows = [[form, f"{x['seconds']:.1f}", f"{x['MiB']:.0f}"] for form, x in report.items()]
    print(table(["labels", "s", "MiB at the peak"], rows))
    return report


def _apart(function: Callable[..., dict], *args: object) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _register(source: str) -> dict:
    from atss.data.datasets import register

    before = _peak()
    start = time.perf_counter()
    register(f"measured={source}")
    return {"seconds": time.perf_counter() - start, "MiB": _peak() - before}


def _peak() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _write(root: Path, images: int, boxes: int) -> dict[str, str]:
    """Write the same objects in every format; all images are links to one file."""
    generator = np.random.default_rng(0)
    corners = generator.integers(0, SIDE // 2, (images, boxes, 2))
    sides = generator.integers(4, SIDE // 2, (images, boxes, 2))
    objects = np.concatenate([corners, sides], axis=2).tolist()
    for folder in ("images", "labels", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    picture = root / "picture.png"
    Image.new("RGB", (SIDE, SIDE)).save(picture)
    content: dict = {"images": [], "annotations": []}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    for i, boxes_of_image in enumerate(objects):
        name = f"{i:08d}.png"
        os.symlink(picture, root / "images" / name)
        content["images"].append({"id": i, "file_name": name, "width": SIDE, "height": SIDE})
        lines, elements = [], []
        for j, (x, y, w, h) in enumerate(boxes_of_image):
            c = j % len(CLASSES)
            entry = {"id": i * boxes + j + 1, "image_id": i, "category_id": c + 1, "area": w * h}
            content["annotations"].append(entry | {"bbox": [x, y, w, h], "iscrowd": 0})
            shares = ((x + w / 2) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE)
            lines.append(f"{c} " + " ".join(f"{s:.6f}" for s in shares))
            pixels = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{k}>{v}</{k}>" for k, v in pixels.items())
            elements.append(f"<object><name>{CLASSES[c]}</name><bndbox>{box}</bndbox></object>")
        (root / "labels" / f"{i:08d}.txt").write_text("\n".join(lines))
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
        xml = f"<annotation><filename>{name}</filename>{size}{''.join(elements)}</annotation>"
        (root / "Annotations" / f"{i:08d}.xml").write_text(xml)
    (root / "train.txt").write_text("\n".join(f"{i:08d}" for i in range(images)))
    (root / "data.yaml").write_text(f"{{train: images, names: [{', '.join(CLASSES)}]}}")
    (root / "coco.json").write_text(json.dumps(content))
    for image in content["images"]:
        image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
        image["coco_url"] = f"http://images.example/images/{image.pop('file_name')}"
    for category in content["categories"]:
        category["frequency"] = "f"
    (root / "lvis.json").write_text(json.dumps(content))
    return {
        "COCO's json": f"{root}/coco.json:{root}/images",
        "LVIS's json": f"{root}/lvis.json:{root}",
        "YOLO's text": f"{root}/data.yaml:train",
        "Pascal VOC's xml": f"{root}:train",
    }
