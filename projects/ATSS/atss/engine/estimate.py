"""Estimate of a training's time and memory, after the first iterations."""

import logging
import resource
import statistics
import sys
import time
from datetime import timedelta

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from .memory import total_memory

LESS_MEMORY = (
    "lower SOLVER.IMS_PER_BATCH, and SOLVER.BASE_LR with it, or the size of images "
    "(INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN; with INPUT.SCALE_JITTER also SCALE_JITTER_SIZE), or "
    "set MODEL.ATSS.PRECISION to bf16; in an evaluation lower MODEL.ATSS.IMS_PER_BATCH_TEST, "
    "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST"
)


class TrainingEstimate(HookBase):
    """Hook that logs time and memory once, after the first iterations. For the main process, before
    PeriodicCheckpointer, whose time does not count."""

    # The first iterations are slower: loading and compiling start.
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
        if hasattr(trainer.data_loader, "records"):  # a user's own loader may have none
            images = len(trainer.data_loader.records)
            epoch = _duration(seconds * images / trainer.cfg.SOLVER.IMS_PER_BATCH)
            one_pass = f"one pass over the {images} training images {epoch}, "
        evaluates = trainer.cfg.TEST.EVAL_PERIOD and trainer.cfg.DATASETS.TEST
        used, total = peak_memory(next(trainer.model.parameters()).device)
        logger = logging.getLogger(__name__)
        logger.info(
            "One iteration takes %.2f s, %sthe %d remaining iterations %s%s. Peak memory: "
            "%.1f of %.1f GB (%.0f %%)",
            seconds,
            one_pass,
            left,
            _duration(seconds * left),
            " plus evaluations" if evaluates else "",
            used / 1e9,
            total / 1e9,
            100 * used / total,
        )
        if used > 0.9 * total:
            logger.warning("Memory is almost full; if it runs out: %s", LESS_MEMORY)


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Return peak and total memory, in bytes, of the GPU, or of the machine or container if all its
    processes use equally much. Loader processes do not count."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device), total
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit * comm.get_local_size()
    return used, total_memory()


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
