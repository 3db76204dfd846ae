"""Samplers that repeat images of rare classes or chosen data sets."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch import Tensor
from torch.utils.data import Sampler

from ..deprecated import renamed_names
from ..errors import UserError
from .records import Records

__getattr__ = renamed_names(__name__)

# Detectron2's name: (factors by class, factors by data set).
SAMPLERS = {
    "TrainingSampler": (False, False),
    "RepeatFactorTrainingSampler": (True, False),
    "WeightedTrainingSampler": (False, True),
    "WeightedCategoryTrainingSampler": (True, True),
}
# The log shows so many of the rarest classes, and of the most frequent ones.
SHOWN = 10


def repeat_factors(cfg: CfgNode, records: Records) -> Tensor | None:
    """Return how often a pass contains each image on average, (number of images,); None for once.

    DATALOADER.SAMPLER_TRAIN chooses the rule. By class: max(1, sqrt(t / f(c))), the greatest over
    an image's classes c, with f(c) the share of images that contain c and t REPEAT_THRESHOLD (LVIS,
    arXiv 1908.03195, appendix B.2; no root without REPEAT_SQRT). By data set:
    DATASETS.TRAIN_REPEAT_FACTOR. By both: the product, with f(c) within each data set, divided by
    the least. Crowds, which training ignores, do not count, unlike in Detectron2.

    Raises:
        UserError: if the sampler is unknown or would repeat nothing.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in SAMPLERS:
        raise UserError(f"unknown DATALOADER.SAMPLER_TRAIN {name!r}: choose from {[*SAMPLERS]}")
    by_class, by_set = SAMPLERS[name]
    threshold, root = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
    if by_class and not threshold > 0:
        raise UserError(
            f"DATALOADER.REPEAT_THRESHOLD must be > 0, got {threshold}: {name} repeats classes "
            "that a smaller share of the images contains; try 0.1"
        )
    if not by_set:
        return _by_class(records, threshold, root) if by_class else None
    factors = [
        weight * (_by_class(part, threshold, root) if by_class else torch.ones(len(part)))
        for part, weight in zip(records.split(), _weights(cfg), strict=True)
    ]
    joined = torch.cat(factors)
    return joined / joined.min() if by_class else joined


def _by_class(records: Records, threshold: float, root: bool) -> Tensor:
    image, class_index, _ = _classes_of_images(records)
    factor = np.maximum(1.0, threshold * len(records) / np.bincount(class_index))
    if root:
        factor = np.sqrt(factor)
    largest = np.ones(len(records))
    np.maximum.at(largest, image, factor[class_index])
    return torch.from_numpy(largest).float()


def _classes_of_images(records: Records) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return distinct pairs of image position and index into the list of classes, and this list."""
    image, object_class = records.objects()
    classes, class_index = np.unique(object_class, return_inverse=True)
    pairs = np.unique(image * len(classes) + class_index)
    return pairs // max(len(classes), 1), pairs % max(len(classes), 1), classes.tolist()


def _weights(cfg: CfgNode) -> list[float]:
    entries = cfg.DATASETS.TRAIN_REPEAT_FACTOR
    if not entries:
        raise UserError(
            f"{cfg.DATALOADER.SAMPLER_TRAIN} needs DATASETS.TRAIN_REPEAT_FACTOR, such as "
            "\"[['my_train', 3.0]]\""
        )
    factors = {}
    for entry in entries:
        if not isinstance(entry, Sequence) or len(entry) != 2 or entry[0] not in cfg.DATASETS.TRAIN:
            raise UserError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has {entry!r}: expected a pair of one of "
                f"{cfg.DATASETS.TRAIN} and its factor"
            )
        name, factor = entry
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise UserError(
                f"DATASETS.TRAIN_REPEAT_FACTOR of {name} must be a number > 0, got {factor!r}"
            )
        factors[name] = float(factor)
    return [factors.get(name, 1.0) for name in cfg.DATASETS.TRAIN]


def make_sampler(size: int, factors: Tensor | None) -> Callable[[int], Sampler]:
    """Return a function from a seed to the endless stream of indices. Each pass rounds the factors
    at random."""
    if factors is None:
        return lambda seed: TrainingSampler(size, seed=seed)
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


def format_report(records: Records, factors: Tensor, names: Mapping[int, str]) -> str:
    """Format images of each class, how many a pass contains, and their ratio, without partners in
    mosaics."""
    image, class_index, classes = _classes_of_images(records)
    count = np.bincount(class_index, minlength=len(classes)).tolist()
    repeated = np.bincount(class_index, factors.double().numpy()[image], len(classes)).tolist()
    counts = dict(zip(classes, zip(count, repeated, strict=True), strict=True))
    names = {**{c: f"class {c}" for c in classes}, **names}
    order = sorted(names, key=lambda c: (counts.get(c, (0, 0))[0], names[c]))
    rows = []
    for c in order:
        once, often = counts.get(c, (0, 0.0))
        rows.append(f"{once:>9,}  {often:>11,.1f}  {often / max(once, 1):>6.2f}  {names[c]}")
    total = f"{float(factors.double().sum()):,.1f} images per pass, {len(records):,} distinct"
    return "\n".join([total, "   images     per pass  factor  class", *abridge(rows, 31)])


def abridge(rows: list[str], indent: int) -> list[str]:
    if len(rows) > 2 * SHOWN:
        rows[SHOWN:-SHOWN] = [f"{'':{indent}}... {len(rows) - 2 * SHOWN} more classes ..."]
    return rows
