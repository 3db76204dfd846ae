"""Images of 16 bits with a fourth plane that shows where the objects are, for docs/data.md.

python tests/noisy_masks.py COCO FOLDER writes FOLDER/{four,three}/{train,test}.json and their
images: COCO's photographs with half their sides, as TIFF, with and without a plane of the boxes'
ellipses below as much noise. All objects are of one class.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

# Values of the plane: background and objects, and the deviation of the noise of each pixel.
BACKGROUND, OBJECT, NOISE = 20_000, 30_000, 10_000


def write(coco: Path, folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, name in (("train", "train2017"), ("test", "val2017")):
        content = json.loads((coco / f"annotations/instances_{name}.json").read_text())
        boxes: dict = {x["id"]: [] for x in content["images"]}
        for x in content["annotations"]:
            x["bbox"] = [value / 2 for value in x["bbox"]]
            x["area"] = x["bbox"][2] * x["bbox"][3]
            x["category_id"] = 1
            boxes[x["image_id"]].append(x["bbox"])
        content["categories"] = [{"id": 1, "name": "object"}]
        for kind in ("four", "three"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            size = image["width"] // 2, image["height"] // 2
            with Image.open(coco / name / image["file_name"]) as opened:
                pixels = opened.convert("RGB").resize(size, Image.Resampling.BOX)
            image["file_name"] = f"{image['id']}.tif"
            image["width"], image["height"] = size
            colours = np.asarray(pixels).astype(np.uint16) * 257
            mask = mask_of(boxes[image["id"]], *size)
            plane = np.where(mask, OBJECT, BACKGROUND) + generator.normal(0, NOISE, mask.shape)
            planes = np.dstack([colours, plane.clip(0, 65535).astype(np.uint16)])
            for kind, written in (("four", planes), ("three", colours)):
                target = folder / kind / split / image["file_name"]
                tifffile.imwrite(target, written, photometric="rgb", compression="zlib")
        for kind in ("four", "three"):
            (folder / kind / f"{split}.json").write_text(json.dumps(content))


def mask_of(boxes: list, width: int, height: int) -> np.ndarray:
    """Return (height, width) bool: inside the ellipse of a box (x, y, width, height)."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = np.zeros((height, width), dtype=bool)
    for left, top, w, h in boxes:
        distance = ((x - left) / w - 0.5) ** 2 + ((y - top) / h - 0.5) ** 2
        mask |= distance <= 0.25
    return mask


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
