"""Training batches as a function of seed and iteration, so that an interrupted run goes on with the
images, crops and flips that it would have seen.

Detectron2's samplers give an endless stream of indices, which the processes deal among themselves.
Here every image carries its position in that stream: batches are formed from positions before any
image is read, and what is drawn while an image is mapped follows from seed and position, whichever
worker maps it. To resume is then to skip batches that nobody has made.
"""

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .datasets import classes_of
from .mosaic import Mosaic
from .samplers import make_sampler, page, repeat_factors


class TrainLoader:
    """Endless batches of this process, lists of mapped images.

    Args:
        records: images in Detectron2's format.
        mapper: makes of a record what the model takes.
        late_mapper: does it from position ``late_from`` on.
        sampler: from a seed to one of Detectron2's samplers.
        batch_size: images of one batch of this process.
        num_workers: processes that map images; 0 for none. The batches do not depend on it.
        groups: (number of images,) of each: a batch is of one group, but for what comes in place of
            images that are left out.
        seed: of the order of images and of what is drawn while they are mapped.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        sampler: Callable[[int], Sampler],
        *,
        batch_size: int,
        num_workers: int,
        groups: Sequence[bool] | np.ndarray,
        seed: int,
        late_mapper: Callable[[dict], dict] | None = None,
        late_from: float = math.inf,
    ):
        self.groups = groups
        self.records = records
        self.mapper = mapper
        self.late_mapper = late_mapper or mapper
        self.late_from = late_from
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.start = self.first = self.ahead = 0

    def skip(self, batches: int, seed: int, origin: tuple[int, int] = (0, 0)) -> None:
        """Iteration will begin after so many batches of the stream of that seed.

        Args:
            origin: (batches, images) from before the batch size or the number of processes became
                what it is. Other batches are formed from the stream's next images on.
        """
        before, self.first = origin
        self.start, self.seed = batches - before, seed
        # late_from counts iterations, all of this batch size; positions count images.
        self.ahead = self.first - before * self.batch_size * comm.get_world_size()

    def __iter__(self) -> Iterator[list[dict]]:
        batches = make_batches(self.sampler(self.seed), self.batch_size, self.groups, self.first)
        loader = DataLoader(
            MappedByPosition(
                self.records,
                self.mapper,
                self.seed,
                self.late_mapper,
                self.late_from + self.ahead,
            ),
            batch_sampler=islice(batches, self.start, None),
            num_workers=self.num_workers,
            collate_fn=list,
            # Without its own, it draws from the one that the model may draw from.
            generator=torch.Generator(),
        )
        return iter(loader)


def build_train_loader(
    cfg: CfgNode,
    mapper: Callable[[dict], dict],
    late_mapper: Callable[[dict], dict] | None = None,
) -> TrainLoader:
    """What DATASETS.TRAIN, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH and SEED ask for; a negative
    SEED for one drawn for all processes.

    Args:
        mapper: until INPUT.AUGMENT_UNTIL; gives None, as Detectron2's may, for an image to leave
            out.
        late_mapper: from then on, where it is another.

    Raises:
        ValueError: as :func:`~atss.data.samplers.repeat_factors`, for a batch that the processes
            cannot share evenly, or an image without width and height, where they are needed.
    """
    images, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if images < 1 or images % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes cannot share evenly"
        )
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    factors = repeat_factors(cfg, records)
    if factors is not None:
        _log_classes(cfg, records, factors)
    groups = is_wide(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else [False] * len(records)
    # Packed, so that processes that load images share them.
    packed = DatasetFromList(records, copy=False)
    late_mapper, until = late_mapper or mapper, cfg.INPUT.AUGMENT_UNTIL
    mapper, late_mapper = InPlaceOfNone(mapper, packed), InPlaceOfNone(late_mapper, packed)
    if cfg.INPUT.MOSAIC:
        mapper = Mosaic(mapper, packed, cfg.INPUT.MOSAIC)
    return TrainLoader(
        packed,
        mapper,
        make_sampler(len(records), factors),
        batch_size=images // processes,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        groups=groups,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        late_mapper=late_mapper,
        # Where images wait for others of their group, positions run ahead of the iterations.
        late_from=until * cfg.SOLVER.MAX_ITER * images if until < 1 else math.inf,
    )


def _log_classes(cfg: CfgNode, records: Sequence[dict], factors: Tensor) -> None:
    names = classes_of(cfg.DATASETS.TRAIN[0]) or []
    table = page(records, factors, dict(enumerate(names)))
    logging.getLogger(__name__).info("%s: %s", cfg.DATALOADER.SAMPLER_TRAIN, table)


def is_wide(records: list[dict]) -> np.ndarray:
    """(number of images,) bool: whether an image is wider than high.

    Raises:
        ValueError: naming an image that does not say.
    """
    for record in records:
        if "width" not in record or "height" not in record:
            raise ValueError(
                f"{record['file_name']} has no width and height in its record, which "
                "DATALOADER.ASPECT_RATIO_GROUPING needs"
            )
    return np.array([record["width"] > record["height"] for record in records])


def make_batches(
    sampler: Iterable[int],
    batch_size: int,
    groups: Sequence[bool] | np.ndarray,
    first: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Batches of this process, each of (position, index) whose images are of one group. Positions
    count the images of all processes, those before ``first`` are passed over."""
    rank, processes = comm.get_rank(), comm.get_world_size()
    waiting: dict[bool, list[tuple[int, int]]] = defaultdict(list)
    for turn, index in enumerate(sampler):
        position = rank + turn * processes
        if position < first:
            continue
        batch = waiting[bool(groups[index])]
        batch.append((position, index))
        if len(batch) == batch_size:
            yield batch.copy()
            batch.clear()


class InPlaceOfNone:
    """A mapper that takes another record, of whatever group, where one gives None. What it draws
    comes from NumPy's generator, as all that is drawn in mapping.

    Raises:
        ValueError: where TRIES records in a row give None.
    """

    TRIES = 1000

    def __init__(self, mapper: Callable[[dict], dict | None], records: Sequence[dict]):
        self.mapper = mapper
        self.records = records

    def __call__(self, record: dict) -> dict:
        for _ in range(self.TRIES):
            mapped = self.mapper(record)
            if mapped is not None:
                return mapped
            record = self.records[np.random.randint(len(self.records))]
        raise ValueError(
            f"the mapper leaves out {self.TRIES} images in a row, {record.get('file_name')} last"
        )


class MappedByPosition(Dataset):
    """Maps the image of a (position, index). Its indices have no end: give it a sampler."""

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        seed: int,
        late_mapper: Callable[[dict], dict],
        late_from: float,
    ):
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.late_mapper = late_mapper
        self.late_from = late_from

    def __getitem__(self, where: tuple[int, int]) -> dict:
        position, index = where
        mapper = self.mapper if position < self.late_from else self.late_mapper
        with seeded(derive_seed(self.seed, position)):
            return mapper(self.records[index])


def derive_seed(seed: int, *key: int) -> int:
    """A seed of 32 bits for each ``key``, unrelated to those of other keys and seeds."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators begin at ``seed``, and go on afterwards as if
    nothing had been drawn. Of torch's, that of the CPU."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
