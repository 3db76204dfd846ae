"""Training batches as a function of seed and iteration: an interrupted run continues with the same
images, crops and flips.

Detectron2's samplers give an endless stream of image indices, dealt to the processes. Here each
image has a position in it. Batches are formed from positions before images are read, and mapping
draws random numbers by seed and position, in any worker, so resuming skips batches without loading
them.
"""

import logging
import math
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import connection
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
    "a process that loads images has died or was killed, perhaps because memory ran out: lower "
    "DATALOADER.NUM_WORKERS or DATALOADER.PREFETCH_FACTOR"
)


class WatchedLoader(DataLoader):
    """A DataLoader that raises an OSError if a worker hangs or dies, also while handing over a
    batch, which torch's timeout misses.

    Args:
        timeout: seconds to wait for a batch before workers are killed; 0 for no limit.
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
            # In short steps, so that time does not count while the process is stopped (ctrl-Z).
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
        except (OSError, EOFError, RuntimeError) as error:
            if not is_late.is_set() and not _has_died(workers, error):
                raise
        finally:
            arrived.set()
        # Other workers may wait for a lock of the dead one. torch's signal handler may raise a
        # RuntimeError at any point here.
        with suppress(RuntimeError):
            kill()
            for worker in workers:
                worker.join(timeout=5)
        if is_late.is_set():
            raise OSError(
                f"no batch came for {self.limit:g} s (DATALOADER.TIMEOUT) from the processes that "
                "load images: check their disk and network"
            )
        raise OSError(LOADER_DIED)


SECONDS_TO_END = 5  # after the connections of a dying worker break


def _has_died(workers: Sequence[Any], error: Exception) -> bool:
    """Return whether a worker has died, or is about to if an error is of its connections."""
    seconds = SECONDS_TO_END if isinstance(error, ConnectionError | EOFError) else 0
    with suppress(RuntimeError):  # of torch's signal handler, if a worker dies here
        return bool(connection.wait([x.sentinel for x in workers], seconds))
    return True


class TrainLoader:
    """Endless batches of this process: lists of mapped images.

    Args:
        sampler: a function from a seed to one of Detectron2's samplers.
        batch_size: images of a batch of this process.
        groups: (number of images,); a batch has images of one group, except replacements of images
            that the mapper leaves out.
        seed: of image order and mapping.
        late_mapper: replaces ``mapper`` from position ``late_from`` on.
        options: of torch's DataLoader, without effect on the batches.
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
        """Begin after this many batches of a seed's stream.

        Args:
            origin: (batches, images) at the last change of batch size or number of processes.
        """
        before, self.first = origin
        self.start, self.seed = batches - before, seed
        # late_from assumes this batch size from the start; positions count images.
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
            # Otherwise the DataLoader draws from the global generator, as the model may.
            generator=torch.Generator(),
            **self.options,
        )
        return iter(loader)


def build_train_loader(
    cfg: CfgNode,
    mapper: Callable[[dict], dict],
    late_mapper: Callable[[dict], dict] | None = None,
) -> TrainLoader:
    """Build the loader of DATASETS.TRAIN, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH and SEED. A
    negative SEED becomes a random one, equal in all processes.

    Args:
        mapper: until INPUT.AUGMENT_UNTIL. It may return None to leave out an image, as in
            Detectron2.
        late_mapper: from then on; by default ``mapper``.

    Raises:
        UserError: as :func:`~atss.data.samplers.repeat_factors`; if processes cannot share a batch
            evenly; if an image lacks a size for grouping.
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
        # Approximate: with groups, positions run ahead of the iterations.
        late_from=until * cfg.SOLVER.MAX_ITER * images if until < 1 else math.inf,
        **loader_options(cfg),
    )


def loader_options(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.DATALOADER
    # Without a GPU torch warns.
    pin_memory = node.PIN_MEMORY and cfg.MODEL.DEVICE.startswith("cuda")
    options = {"num_workers": node.NUM_WORKERS, "pin_memory": pin_memory}
    if node.NUM_WORKERS:  # torch refuses these options without workers
        options["timeout"] = node.TIMEOUT
        options["prefetch_factor"] = node.PREFETCH_FACTOR
        options["persistent_workers"] = node.PERSISTENT_WORKERS
    return options


def _log(text: str) -> None:
    logging.getLogger(__name__).info("%s", text)


def _count_objects(records: Records, names: Mapping[int, str]) -> str:
    left_out = sum(map(len, records.sets)) - len(records)
    count = Counter(dict.fromkeys(names, 0))
    for part in records.sets:  # images that are left out have no objects
        numbers, counts = np.unique(part.classes, return_counts=True)
        count.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    order = sorted(count, key=lambda c: (count[c], names.get(c, "")))
    rows = [f"{count[c]:>9,}  {names.get(c, f'class {c}')}" for c in order]
    total = f"{len(records):,} training images; {left_out:,} without objects left out"
    return "\n".join([total, "  objects  class", *abridge(rows, 11)])


def is_wide(records: Records) -> np.ndarray:
    """Return whether images are wider than high, (number of images,) bool.

    Raises:
        UserError: naming an image without width and height.
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
    """Form this process's batches of (position, index) of one group. Positions count images of all
    processes, from ``first`` on."""
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
    """Mapper that replaces images for which another returns None by random ones; UserError after
    TRIES in a row."""

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
    """Images by (position, index), mapped with random numbers of their position, without a
    length."""

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

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        mapper = self.mapper if position < self.late_from else self.late_mapper
        with seeded(derive_seed(self.seed, position)):
            return mapper(self.records[index])


def derive_seed(seed: int, *key: int) -> int:
    """Return 32 bits, independent for each seed and ``key``."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and restore them afterwards."""
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
