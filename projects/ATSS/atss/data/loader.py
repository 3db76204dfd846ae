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
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .datasets import classes_of, open_records
from .mosaic import Mosaic
from .records import Records
from .samplers import abridge, format_report, make_sampler, repeat_factors

LOADER_DIED = (
    "a process that loads images has died, or was killed as if memory had run out: lower "
    "DATALOADER.NUM_WORKERS or DATALOADER.PREFETCH_FACTOR"
)


class WatchedLoader(DataLoader):
    """torch's, which ends with a sentence if a process that loads images hangs or dies; torch's own
    timeout does not notice one that stops while it hands over a batch.

    Args:
        timeout: seconds to wait for a batch, after which these processes are killed; 0 for any.

    Raises:
        OSError: with the sentence, in iterating.
    """

    def __init__(self, *args: Any, timeout: float = 0, **options: Any):
        super().__init__(*args, **options)
        self.limit = timeout

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        while True:
            try:
                batch = self._next(iterator)
            except StopIteration:
                return
            yield batch

    def _next(self, iterator: Iterator[Any]) -> Any:
        workers = getattr(iterator, "_workers", ())
        is_late = threading.Event()

        def kill() -> None:
            for worker in workers:
                worker.kill()

        def count_down() -> None:
            # In short steps: time in which all of this is stopped, as by ctrl-Z, does not count.
            step = min(self.limit, 1)
            for _ in range(math.ceil(self.limit / step)):
                if arrived.wait(step):
                    return
            is_late.set()
            kill()

        arrived = threading.Event()
        if workers and self.limit:
            threading.Thread(target=count_down, daemon=True).start()
        try:
            return next(iterator)
        except (OSError, EOFError, RuntimeError):  # the end of a pipe may be the first sign
            if not is_late.is_set() and all(x.is_alive() for x in workers):
                raise
        finally:
            arrived.set()
        # The others may wait for a lock that the dead one holds. torch raises an error once it
        # learns of an end, wherever this process is.
        with suppress(RuntimeError):
            kill()
            for worker in workers:
                worker.join(timeout=5)
        if is_late.is_set():
            raise OSError(
                f"no batch came for {self.limit:g} s (DATALOADER.TIMEOUT) from the processes that "
                "load images: do their disk and network answer?"
            )
        raise OSError(LOADER_DIED)


class TrainLoader:
    """Endless batches of this process, lists of mapped images.

    Args:
        records: images in Detectron2's format.
        mapper: makes of a record what the model takes.
        late_mapper: does it from position ``late_from`` on.
        sampler: from a seed to one of Detectron2's samplers.
        batch_size: images of one batch of this process.
        groups: (number of images,) of each: a batch is of one group, but for what comes in place of
            images that are left out.
        seed: of the order of images and of what is drawn while they are mapped.
        options: of torch's DataLoader, on which the batches do not depend: num_workers, the
            processes that map images, and others.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        sampler: Callable[[int], Sampler],
        *,
        batch_size: int,
        groups: Sequence[bool] | np.ndarray,
        seed: int,
        late_mapper: Callable[[dict], dict] | None = None,
        late_from: float = math.inf,
        **options: Any,
    ):
        self.groups = groups
        self.records = records
        self.mapper = mapper
        self.late_mapper = late_mapper or mapper
        self.late_from = late_from
        self.sampler = sampler
        self.batch_size = batch_size
        self.options = options
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
        loader = WatchedLoader(
            MappedByPosition(
                self.records,
                self.mapper,
                self.seed,
                self.late_mapper,
                self.late_from + self.ahead,
            ),
            batch_sampler=islice(batches, self.start, None),
            collate_fn=list,
            # Without its own, it draws from the one that the model may draw from.
            generator=torch.Generator(),
            **self.options,
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
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes cannot share evenly"
        )
    records = open_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    names = dict(enumerate(classes_of(cfg.DATASETS.TRAIN[0]) or ()))
    factors = repeat_factors(cfg, records)
    if factors is None:
        _log(_count_objects(records, names))
    else:
        _log(f"{cfg.DATALOADER.SAMPLER_TRAIN}: {format_report(records, factors, names)}")
    groups = is_wide(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else [False] * len(records)
    late_mapper, until = late_mapper or mapper, cfg.INPUT.AUGMENT_UNTIL
    mapper, late_mapper = InPlaceOfNone(mapper, records), InPlaceOfNone(late_mapper, records)
    if cfg.INPUT.MOSAIC:
        mapper = Mosaic(mapper, records, cfg.INPUT.MOSAIC)
    return TrainLoader(
        records,
        mapper,
        make_sampler(len(records), factors),
        batch_size=images // processes,
        groups=groups,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        late_mapper=late_mapper,
        # Where images wait for others of their group, positions run ahead of the iterations.
        late_from=until * cfg.SOLVER.MAX_ITER * images if until < 1 else math.inf,
        **loader_options(cfg),
    )


def loader_options(cfg: CfgNode) -> dict[str, Any]:
    """What DATALOADER asks of torch's DataLoader, in training and evaluation."""
    node = cfg.DATALOADER
    # Without a GPU torch warns, and pins nothing.
    pinned = node.PIN_MEMORY and cfg.MODEL.DEVICE.startswith("cuda")
    options = {"num_workers": node.NUM_WORKERS, "pin_memory": pinned}
    if node.NUM_WORKERS:  # torch refuses the rest for images that the process itself loads
        options["timeout"] = node.TIMEOUT
        options["prefetch_factor"] = node.PREFETCH_FACTOR
        options["persistent_workers"] = node.PERSISTENT_WORKERS
    return options


def _log(text: str) -> None:
    logging.getLogger(__name__).info("%s", text)


def _count_objects(records: Records, names: Mapping[int, str]) -> str:
    """Images and objects to train on, for the log."""
    left_out = sum(map(len, records.sets)) - len(records)
    count = Counter(dict.fromkeys(names, 0))
    for part in records.sets:  # what is left out has none
        numbers, counts = np.unique(part.classes, return_counts=True)
        count.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    order = sorted(count, key=lambda c: (count[c], names.get(c, "")))
    rows = [f"{count[c]:>9,}  {names.get(c, f'class {c}')}" for c in order]
    total = f"{len(records):,} training images; {left_out:,} without objects left out"
    return "\n".join([total, "  objects  class", *abridge(rows, 11)])


def is_wide(records: Records) -> np.ndarray:
    """(number of images,) bool: whether an image is wider than high.

    Raises:
        ValueError: naming an image that does not say.
    """
    sizes = records.sizes
    for i in np.flatnonzero((sizes < 0).any(axis=1)).tolist():
        raise UserError(
            f"{records[i]['file_name']} has no width and height in its record, which "
            "DATALOADER.ASPECT_RATIO_GROUPING needs"
        )
    return sizes[:, 0] > sizes[:, 1]


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
        raise UserError(
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
