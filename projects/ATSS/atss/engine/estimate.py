"""What a run will take: a line in the log, early, on time and memory."""

import logging
import os
import resource
import statistics
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

LESS_MEMORY = (
    "lower SOLVER.IMS_PER_BATCH, and SOLVER.BASE_LR with it, or the size of images "
    "(INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN; with INPUT.SCALE_JITTER also SCALE_JITTER_SIZE), or "
    "set MODEL.ATSS.PRECISION to bf16; in an evaluation lower MODEL.ATSS.IMS_PER_BATCH_TEST, "
    "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST"
)


# Of a Linux container, by the two versions of control groups.
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class TrainingEstimate(HookBase):
    """Says once, after the first iterations, how long training will take, and how much of the
    memory it needs. For the main process; goes before PeriodicCheckpointer, whose time does not
    count."""

    # The first iterations, in which loading and compiling begin, tell little.
    WARM_UP = 3
    ITERATIONS = 20

    def before_train(self) -> None:
        self.seconds: list[float] = []

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        trainer, done = self.trainer, len(self.seconds) + 1
        left = trainer.max_iter - trainer.iter - 1
        if done > self.ITERATIONS:
            return
        self.seconds.append(time.perf_counter() - self.start)
        if done < self.ITERATIONS and left:
            return
        seconds = statistics.median(self.seconds[self.WARM_UP :] or self.seconds)
        one_pass = ""
        if hasattr(trainer.data_loader, "records"):  # not of a loader of somebody's own
            images = len(trainer.data_loader.records)
            took = _duration(seconds * images / trainer.cfg.SOLVER.IMS_PER_BATCH)
            one_pass = f"one pass over the {images} training images {took}, "
        evaluates = trainer.cfg.TEST.EVAL_PERIOD and trainer.cfg.DATASETS.TEST
        used, total = peak_memory(next(trainer.model.parameters()).device)
        logger = logging.getLogger(__name__)
        logger.info(
            "One iteration takes %.2f s: %sthe %d iterations to go %s%s. Memory needed until now: "
            "%.1f of %.1f GB (%.0f %%)",
            seconds,
            one_pass,
            left,
            _duration(seconds * left),
            ", and the evaluations besides" if evaluates else "",
            used / 1e9,
            total / 1e9,
            100 * used / total,
        )
        if used > 0.9 * total:
            logger.warning("Only little memory is left; where it runs out: %s", LESS_MEMORY)


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Bytes that were in use at most, and that there are: of the GPU, or of the machine or the
    container, of which each process of it is taken to use as much. Processes that load data are not
    counted."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device), total
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit * comm.get_local_size()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(file.read_text()))
    return used, total


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
