"""A small real detection data set that needs no download: handwritten digits on photographs.

Both ship inside scikit-learn: 1,797 digits of 8 x 8 pixels (UCI) and two photographs. The recipe is
fixed, so that an AP on it means something:

- canvases of 192 x 192 pixels: crops of a photograph darkened to 60 %, from its left half for
  training and from its right half for testing;
- 2 to 8 digits tried per image, those that would overlap an earlier one left out; their longer
  scale log-uniform from 14 to 140 pixels, aspect exp(U(-0.4, 0.4)), a random bright colour;
- digits 0 to 1399 of the set for training, the others for testing; 2,000 and 250 images;
- boxes tight around the ink.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 192
SPLITS = {"train": 2000, "test": 250}
FIRST_TEST_DIGIT = 1400
# Ink: where a digit covers at least this share of a pixel.
INK = 0.3


def make_digits(root: Path) -> None:
    """Writes ``{train,test}.json`` and the folders ``train`` and ``test`` under ``root``; does
    nothing where they are complete already."""
    if root.is_dir():
        return
    from sklearn.datasets import load_digits, load_sample_images  # the extra "demo"

    digits = load_digits()
    photographs = load_sample_images().images
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for seed, (split, count) in enumerate(SPLITS.items()):
        (unfinished / split).mkdir(parents=True)
        train = split == "train"
        half = slice(None, FIRST_TEST_DIGIT) if train else slice(FIRST_TEST_DIGIT, None)
        glyphs, labels = digits.images[half] / 16, digits.target[half]
        middle = photographs[0].shape[1] // 2
        grounds = [p[:, :middle] if train else p[:, middle:] for p in photographs]
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for i in tqdm(range(count), desc=f"drawing digits ({split})"):
            canvas, objects = _draw(rng, grounds, glyphs, labels)
            name = f"{i:04d}.png"
            Image.fromarray(canvas).save(unfinished / split / name, compress_level=1)
            images.append({"id": i, "file_name": name, "width": SIDE, "height": SIDE})
            for label, (x, y, w, h) in objects:
                annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1}
                annotation |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                annotations.append(annotation)
        categories = [{"id": d + 1, "name": str(d)} for d in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (unfinished / f"{split}.json").write_text(json.dumps(content))
    unfinished.rename(root)  # only what is complete gets the name


def _draw(
    rng: np.random.Generator, grounds: list[np.ndarray], glyphs: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One canvas (SIDE, SIDE, 3), and (label, (x, y, width, height)) of each digit on it."""
    ground = grounds[rng.integers(len(grounds))]
    top = rng.integers(ground.shape[0] - SIDE + 1)
    left = rng.integers(ground.shape[1] - SIDE + 1)
    canvas = 0.6 * ground[top : top + SIDE, left : left + SIDE].astype(np.float64)
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    objects = []
    for _ in range(rng.integers(2, 9)):
        which = rng.integers(len(glyphs))
        longer = 14 * 10 ** rng.uniform()
        aspect = np.exp(rng.uniform(-0.4, 0.4))  # width / height
        width = max(1, round(longer * min(1, aspect)))
        height = max(1, round(longer / max(1, aspect)))
        glyph = Image.fromarray(glyphs[which].astype(np.float32))
        cover = np.asarray(glyph.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
        x, y = rng.integers(SIDE - width + 1), rng.integers(SIDE - height + 1)
        colour = rng.integers(100, 256, size=3)
        place = (slice(y, y + height), slice(x, x + width))
        if taken[place].any():
            continue
        taken[place] = True
        canvas[place] += cover[..., None] * (colour - canvas[place])
        rows, columns = (np.flatnonzero((cover > INK).any(axis=axis)) for axis in (1, 0))
        box = (x + columns[0], y + rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
        objects.append((int(labels[which]), tuple(int(v) for v in box)))
    return canvas.round().astype(np.uint8), objects
