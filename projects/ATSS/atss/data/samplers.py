"""How often each image is seen: Detectron2's samplers by name, for data in which some classes, or
some data sets, are rare."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch import Tensor
from torch.utils.data import Sampler

# Detectron2's names, and what each weighs images by: whether by class, whether by data set.
WEIGHS = {
    "TrainingSampler": (False, False),
    "RepeatFactorTrainingSampler": (True, False),
    "WeightedTrainingSampler": (False, True),
    "WeightedCategoryTrainingSampler": (True, True),
}
# Classes that the log shows: the rarest, and as many of the commonest.
SHOWN = 10


def repeat_factors(cfg: CfgNode, records: Sequence[dict]) -> Tensor | None:
    """(number of images,) how often a pass goes through each on average; None for once.

    DATALOADER.SAMPLER_TRAIN says by what: by class, an image of class c as often as
    max(1, sqrt(t / f(c))), with f(c) the share of images with such an object, t
    DATALOADER.REPEAT_THRESHOLD, and of several classes the rarest (arXiv 1908.03195, appendix B.2;
    without the root where not REPEAT_SQRT); by data set, as DATASETS.TRAIN_REPEAT_FACTOR says; or
    by both, the classes of each data set by itself, over the least that comes out. Unlike in
    Detectron2 crowds, from which nothing is learnt, do not count.

    Args:
        records: images of DATASETS.TRAIN in Detectron2's format.

    Raises:
        ValueError: for an unknown sampler, or one that would do nothing.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in WEIGHS:
        known = [*WEIGHS]
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN is {name!r}; known are {known}")
    by_class, by_set = WEIGHS[name]
    threshold, root = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
    if by_class and not threshold > 0:
        raise ValueError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold}, with which {name} repeats nothing: it is "
            "the share of images below which a class is rare, such as 0.1"
        )
    if not by_set:
        return _by_class(records, threshold, root) if by_class else None
    factors, start = [], 0
    for size, weight in _sets(cfg):
        part = records[start : start + size]
        own = _by_class(part, threshold, root) if by_class else torch.ones(size)
        factors.append(weight * own)
        start += size
    joined = torch.cat(factors)
    return joined / joined.min() if by_class else joined


def _by_class(records: Sequence[dict], threshold: float, root: bool) -> Tensor:
    classes = [classes_in(record) for record in records]
    images = Counter(c for found in classes for c in found)
    factor = {c: max(1.0, threshold * len(records) / n) for c, n in images.items()}
    if root:
        factor = {c: math.sqrt(x) for c, x in factor.items()}
    return torch.tensor([max((factor[c] for c in found), default=1.0) for found in classes])


def classes_in(record: dict) -> set[int]:
    """Those of the objects on an image that are no crowds."""
    return {a["category_id"] for a in record["annotations"] if not a.get("iscrowd", 0)}


def _sets(cfg: CfgNode) -> list[tuple[int, float]]:
    """Number of images and factor of each of DATASETS.TRAIN."""
    given = cfg.DATASETS.TRAIN_REPEAT_FACTOR
    if not given:
        raise ValueError(
            f"{cfg.DATALOADER.SAMPLER_TRAIN} needs DATASETS.TRAIN_REPEAT_FACTOR, such as "
            "\"[['my_train', 3.0]]\""
        )
    factors = {}
    for entry in given:
        if not isinstance(entry, Sequence) or len(entry) != 2 or entry[0] not in cfg.DATASETS.TRAIN:
            raise ValueError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has {entry!r}, where one of {cfg.DATASETS.TRAIN} "
                "and its factor belong"
            )
        name, factor = entry
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has {factor!r} for {name}, where a positive number "
                "belongs"
            )
        factors[name] = float(factor)
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    return [
        (
            len(get_detection_dataset_dicts([name], filter_empty=filter_empty)),
            factors.get(name, 1.0),
        )
        for name in cfg.DATASETS.TRAIN
    ]


def make_sampler(size: int, factors: Tensor | None) -> Callable[[int], Sampler]:
    """From a seed to the endless stream of images' indices, of which each process takes its share.

    Args:
        factors: as of :func:`repeat_factors`; a pass has each image as often, rounded up or down by
            chance.
    """
    if factors is None:
        return lambda seed: TrainingSampler(size, seed=seed)
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


def page(records: Sequence[dict], factors: Tensor, names: Mapping[int, str]) -> str:
    """How often a pass sees each class, for the log: images that have it, and how often on average
    such an image comes; not as one of the other three of a mosaic, for which all are alike."""
    images, seen = Counter[int](), defaultdict[int, float](float)
    for record, factor in zip(records, factors.tolist(), strict=True):
        for c in classes_in(record):
            images[c] += 1
            seen[c] += factor
    names = {**{c: f"class {c}" for c in images}, **names}
    order = sorted(names, key=lambda c: (images[c], names[c]))
    rows = [
        f"{images[c]:>9,}  {seen[c]:>11,.1f}  {seen[c] / max(images[c], 1):>6.2f}  {names[c]}"
        for c in order
    ]
    if len(rows) > 2 * SHOWN:
        rows[SHOWN:-SHOWN] = [f"{'':31}... {len(rows) - 2 * SHOWN} more classes ..."]
    total = f"A pass sees {float(factors.double().sum()):,.1f} images, of {len(records):,}"
    return "\n".join([total, "   images  seen a pass  factor  class", *rows])
