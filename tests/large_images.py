"""Large images for docs/large_images.md: mosaics of labelled photographs at their own size.

python tests/large_images.py make LABELS IMAGES FOLDER [COUNT] writes FOLDER/labels.json and
FOLDER/images. python tests/large_images.py measure RUN FOLDER [KEY VALUE ...] prints AP, AP50, the
recall of small, medium and large objects at IoU 0.5, seconds per image and the peak of the memory.
"""

import json
import resource
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from atss.labels.formats import read_labels
from atss.predictor import Predictor
from atss_runner.detections import as_records

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


def measure(run: str, folder: Path, *opts: str) -> str:
    """Return figures of a training's detections on the images of a folder."""
    limit = 1000
    predictor = Predictor(run, opts=["TEST.DETECTIONS_PER_IMAGE", limit, *opts])
    content = json.loads((folder / "labels.json").read_text())
    ids = sorted(x["id"] for x in content["categories"])
    results: list[dict] = []
    seconds = 0.0
    for image in content["images"]:
        start = time.perf_counter()
        found = predictor(folder / "images" / image["file_name"])
        seconds += time.perf_counter() - start
        results += as_records(found, ids, [], image_id=image["id"])
    with redirect_stdout(StringIO()):
        truth = COCO(folder / "labels.json")
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 100, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = (evaluation.eval[x][..., -1] for x in ("precision", "recall"))

    def mean(values: np.ndarray) -> float:
        return 100 * values[values > -1].mean()

    figures = [mean(precision[..., 0]), mean(precision[0, ..., 0])]
    figures += [mean(recall[0, :, size]) for size in (1, 2, 3)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return " ".join(
        [
            *(f"{x:.1f}" for x in figures),
            f"{seconds / len(content['images']):.2f} s",
            f"{memory:.0f} MB",
        ]
    )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "make":
        annotations, images, output, *numbers = arguments
        make_large_images((annotations, images), Path(output), *map(int, numbers))
    else:
        training, data, *options = arguments
        print(measure(training, Path(data), *options), *options)
