"""Handwritten digits on photographs: small detection data sets that need no download.

scikit-learn contains both: 1,797 digits of 8 x 8 pixels (UCI) and two photographs. A canvas is a
crop of a photograph, darkened to 60 %. Training has the left halves and digits 0 to 1399, other
splits the rest. Boxes are tight around the ink. The recipes never change: APs stay comparable.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError

FIRST_TEST_DIGIT = 1400
# Least share of a pixel that a digit covers, to count as ink.
INK = 0.3


@dataclass(frozen=True)
class Recipe:
    """Parameters of a data set of digits.

    Attributes:
        images: number of images of each split.
        side: of the square canvases, in pixels.
        digits: range of the number of digits tried per image.
        longer: range of a digit's longer side in pixels, log-uniform.
        log_aspect: log(width / height) is uniform up to this absolute value.
        overlap: greatest IoU with an earlier digit.
        large_first: draw smaller digits over larger ones.
        classes: names; a digit's class is its value, or the only class.
    """

    images: dict[str, int]
    side: int
    digits: tuple[int, int]
    longer: tuple[float, float]
    log_aspect: float
    overlap: float
    large_first: bool
    classes: tuple[str, ...]


# `make demo`.
DEMO = Recipe(
    images={"train": 2000, "test": 250},
    side=192,
    digits=(2, 8),
    longer=(14, 140),
    log_aspect=0.4,
    overlap=0.0,
    large_first=False,
    classes=tuple("0123456789"),
)

# `tools/digits.py --data`: as large as a first data set of a user, in three splits.
FEW = replace(DEMO, images={"train": 200, "val": 50, "test": 50})

# docs/quickstart.ipynb: ten classes take longer to learn.
FEW_OF_ONE_CLASS = replace(FEW, classes=("digit",))

# `tools/ablation.py`: hard for assigners. Sides span more than a decade, so that objects suit some
# levels and not others; aspects up to 2.7 : 1, which no square anchor overlaps well; smaller digits
# on larger ones, so that objects compete for anchors. One class, because distinguishing digits
# takes long to learn and does not depend on the assigner. Fixed before any training on it.
ABLATION = Recipe(
    images={"train": 1200, "test": 200},
    side=128,
    digits=(3, 12),
    longer=(8, 120),
    log_aspect=1.0,
    overlap=0.3,
    large_first=True,
    classes=("digit",),
)


def make_digits(root: Path, recipe: Recipe) -> None:
    """Write ``train.json``, the folder ``train`` and so on for each split, unless they exist.

    Raises:
        UserError: if the folder is incomplete, or scikit-learn is missing.
    """
    if root.is_dir():
        for split, count in recipe.images.items():
            files = len(list((root / split).glob("*.png")))
            problem = f"{files} of {count} images in {split}" if files != count else ""
            if not (root / f"{split}.json").is_file():
                problem = f"no {split}.json"
            if problem:
                raise UserError(
                    f"{root} is not complete: it has {problem}; remove the folder to draw it again"
                )
        return
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UserError(
            "the digits are part of scikit-learn, which is missing: pip install scikit-learn"
        ) from error

    digits = load_digits()
    photographs = load_sample_images().images
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for seed, (split, count) in enumerate(recipe.images.items()):
        (unfinished / split).mkdir(parents=True)
        train = split == "train"
        half = slice(None, FIRST_TEST_DIGIT) if train else slice(FIRST_TEST_DIGIT, None)
        glyphs, labels = digits.images[half] / 16, digits.target[half]
        middle = photographs[0].shape[1] // 2
        grounds = [p[:, :middle] if train else p[:, middle:] for p in photographs]
        rng = np.random.default_rng(seed)
        images = []
        annotations: list[dict] = []
        for i in tqdm(range(count), desc=f"drawing digits ({split})"):
            canvas, objects = _draw(rng, recipe, grounds, glyphs, labels)
            name = f"{i:04d}.png"
            Image.fromarray(canvas).save(unfinished / split / name, compress_level=1)
            image = {"id": i, "file_name": name, "width": recipe.side, "height": recipe.side}
            images.append(image)
            for label, (x, y, w, h) in objects:
                category = label + 1 if len(recipe.classes) > 1 else 1
                annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
                annotation |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                annotations.append(annotation)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(recipe.classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (unfinished / f"{split}.json").write_text(json.dumps(content))
    unfinished.rename(root)


def _draw(
    rng: np.random.Generator,
    recipe: Recipe,
    grounds: list[np.ndarray],
    glyphs: np.ndarray,
    labels: np.ndarray,
) -> tuple[np.ndarray, list[tuple[int, tuple[int, ...]]]]:
    """Draw a canvas, (side, side, 3), with (label, (x, y, width, height)) of each digit."""
    side = recipe.side
    ground = grounds[rng.integers(len(grounds))]
    top = rng.integers(ground.shape[0] - side + 1)
    left = rng.integers(ground.shape[1] - side + 1)
    canvas = 0.6 * ground[top : top + side, left : left + side].astype(np.float64)
    least, greatest = recipe.longer
    tries = []
    for _ in range(rng.integers(recipe.digits[0], recipe.digits[1] + 1)):
        index = rng.integers(len(glyphs))
        longer = least * (greatest / least) ** rng.uniform()
        aspect = np.exp(rng.uniform(-recipe.log_aspect, recipe.log_aspect))  # width / height
        width = max(1, round(longer * min(1, aspect)))
        height = max(1, round(longer / max(1, aspect)))
        x, y = rng.integers(side - width + 1), rng.integers(side - height + 1)
        tries.append((index, x, y, width, height, rng.integers(100, 256, size=3)))
    if recipe.large_first:
        tries.sort(key=lambda t: -t[3] * t[4])

    drawn: list[np.ndarray] = []
    objects = []
    for index, x, y, width, height, colour in tries:
        corners = np.array([x, y, x + width, y + height])
        if any(_iou(corners, other) > recipe.overlap for other in drawn):
            continue
        drawn.append(corners)
        glyph = Image.fromarray(glyphs[index].astype(np.float32))
        cover = np.asarray(glyph.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
        place = (slice(y, y + height), slice(x, x + width))
        canvas[place] += cover[..., None] * (colour - canvas[place])
        rows, columns = (np.flatnonzero((cover > INK).any(axis=axis)) for axis in (1, 0))
        box = (x + columns[0], y + rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
        objects.append((int(labels[index]), tuple(int(v) for v in box)))
    return canvas.round().astype(np.uint8), objects


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(min=0)
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())
