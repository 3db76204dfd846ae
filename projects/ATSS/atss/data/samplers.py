"""How often each image is seen: Detectron2's samplers by name, for data in which some classes, or
some data sets, are rare."""

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

# Detectron2's names, and what each weighs images by: whether by class, whether by data set.
WEIGHS = {
    "TrainingSampler": (False, False),
    "RepeatFactorTrainingSampler": (True, False),
    "WeightedTrainingSampler": (False, True),
    "WeightedCategoryTrainingSampler": (True, True),
}
# Classes that the log shows: the rarest, and as many of the commonest.
SHOWN = 10


def repeat_factors(cfg: CfgNode, records: Records) -> Tensor | None:
    """(number of images,) how often a pass goes through each on average; None for once.

    DATALOADER.SAMPLER_TRAIN says by what: by class, an image of class c as often as
    max(1, sqrt(t / f(c))), with f(c) the share of images with such an object, t
    DATALOADER.REPEAT_THRESHOLD, and of several classes the rarest (arXiv 1908.03195, appendix B.2;
    without the root where not REPEAT_SQRT); by data set, as DATASETS.TRAIN_REPEAT_FACTOR says; or
    by both, the classes of each data set by itself, over the least that comes out. Unlike in
    Detectron2 crowds, from which nothing is learnt, do not count.

    Args:
        records: images of DATASETS.TRAIN.

    Raises:
        ValueError: for an unknown sampler, or one that would do nothing.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in WEIGHS:
        known = [*WEIGHS]
        raise UserError(f"unknown DATALOADER.SAMPLER_TRAIN {name!r}: choose from {known}")
    by_class, by_set = WEIGHS[name]
    threshold, root = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
    if by_class and not threshold > 0:
        raise UserError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold}, with which {name} repeats nothing: it is "
            "the share of images below which a class is rare, such as 0.1"
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
    image, which, _ = _classes_of_images(records)
    factor = np.maximum(1.0, threshold * len(records) / np.bincount(which))
    if root:
        factor = np.sqrt(factor)
    rarest = np.ones(len(records))
    np.maximum.at(rarest, image, factor[which])
    return torch.from_numpy(rarest).float()


def _classes_of_images(records: Records) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pairs of an image and a class of which it has objects, each once: positions of the images, of
    the classes in the list, and this list."""
    image, number = records.objects()
    names, which = np.unique(number, return_inverse=True)
    pairs = np.unique(image * len(names) + which)
    return pairs // max(len(names), 1), pairs % max(len(names), 1), names.tolist()


def _weights(cfg: CfgNode) -> list[float]:
    """The factor of each of DATASETS.TRAIN."""
    given = cfg.DATASETS.TRAIN_REPEAT_FACTOR
    if not given:
        raise UserError(
            f"{cfg.DATALOADER.SAMPLER_TRAIN} needs DATASETS.TRAIN_REPEAT_FACTOR, such as "
            "\"[['my_train', 3.0]]\""
        )
    factors = {}
    for entry in given:
        if not isinstance(entry, Sequence) or len(entry) != 2 or entry[0] not in cfg.DATASETS.TRAIN:
            raise UserError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has {entry!r}, where one of {cfg.DATASETS.TRAIN} "
                "and its factor belong"
            )
        name, factor = entry
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise UserError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has {factor!r} for {name}, where a positive number "
                "belongs"
            )
        factors[name] = float(factor)
    return [factors.get(name, 1.0) for name in cfg.DATASETS.TRAIN]


def make_sampler(size: int, factors: Tensor | None) -> Callable[[int], Sampler]:
    """From a seed to the endless stream of images' indices, of which each process takes its share.

    Args:
        factors: as of :func:`repeat_factors`; a pass has each image as often, rounded up or down by
            chance.
    """
    if factors is None:
        return lambda seed: TrainingSampler(size, seed=seed)
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


def format_report(records: Records, factors: Tensor, names: Mapping[int, str]) -> str:
    """How often a pass sees each class, for the log: images that have it, and how often on average
    such an image comes; not as one of the other three of a mosaic, for which all are alike."""
    image, which, numbers = _classes_of_images(records)
    count = np.bincount(which, minlength=len(numbers)).tolist()
    seen = np.bincount(which, factors.double().numpy()[image], len(numbers)).tolist()
    found = dict(zip(numbers, zip(count, seen, strict=True), strict=True))
    names = {**{c: f"class {c}" for c in numbers}, **names}
    order = sorted(names, key=lambda c: (found.get(c, (0, 0))[0], names[c]))
    rows = []
    for c in order:
        n, s = found.get(c, (0, 0.0))
        rows.append(f"{n:>9,}  {s:>11,.1f}  {s / max(n, 1):>6.2f}  {names[c]}")
    total = f"A pass sees {float(factors.double().sum()):,.1f} images, of {len(records):,}"
    return "\n".join([total, "   images  seen a pass  factor  class", *abridge(rows, 31)])


def abridge(rows: list[str], indent: int) -> list[str]:
    """The first and the last SHOWN of a table's rows, one of each class."""
    if len(rows) > 2 * SHOWN:
        rows[SHOWN:-SHOWN] = [f"{'':{indent}}... {len(rows) - 2 * SHOWN} more classes ..."]
    return rows
