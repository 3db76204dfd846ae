"""SOLVER.IMS_PER_BATCH -1: the largest batch that fits into memory."""

import argparse
import copy
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ..config import load_config
from ..data.datasets import open_records
from ..errors import UserError
from .checks import MEASURED, check_batch
from .environment import is_started, local_size, world_size
from .estimate import peak_memory
from .explain import explain
from .folder import read_if_exists
from .imports import import_modules
from .launch import keep_freed_memory
from .memory import memory_left, resident
from .solver import RATE_EXPONENTS, build_optimizer
from .values import check_training_values

# Share of the memory that a step may use. The rest is for the processes that load images, for
# evaluations, and for blocks of other sizes than those of the measured steps.
SHARE = 0.8
# Share of the memory by which two measured steps must differ.
CLEAR = 0.03


def choose_batch(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Replace SOLVER.IMS_PER_BATCH -1, in place, by the largest batch that fits into the memory of
    the GPU or of this process, or by that of the resumed run. SOLVER.BASE_LR, of the batch in the
    config file, is scaled: linearly for SGD, by the root for AdamW.

    Raises:
        UserError: if no batch fits, or the config file has no batch.
    """
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH != MEASURED:
        return
    reference = load_config(args.config_file).SOLVER.IMS_PER_BATCH
    if reference < 1 or solver.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {MEASURED} belongs on the command line: {args.config_file} must "
            "have the batch of its SOLVER.BASE_LR, and REFERENCE_WORLD_SIZE 0"
        )
    saved = read_if_exists(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) if args.resume else None
    if saved:
        solver.IMS_PER_BATCH = yaml.safe_load(saved)["SOLVER"]["IMS_PER_BATCH"]
        reason = "that of the resumed run"
    else:
        solver.IMS_PER_BATCH, reason = _measure_batch(args, cfg)
    check_batch(cfg, world_size(args))
    exponent = RATE_EXPONENTS.get(solver.OPTIMIZER, 1.0)
    solver.BASE_LR *= (solver.IMS_PER_BATCH / reference) ** exponent
    print(
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, {reason}; SOLVER.BASE_LR "
        f"{solver.BASE_LR:.3g}, scaled from that of {reference} images",
        file=sys.stderr,
    )


def _measure_batch(args: argparse.Namespace, cfg: CfgNode) -> tuple[int, str]:
    """Return the batch of all processes, and its reason."""
    if is_started():
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {MEASURED} measures before processes start, but torchrun has "
            "started them: set a number"
        )
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {MEASURED} measures steps on boxes alone: set a number with "
                f"MODEL.{key} True"
            )
    check_training_values(cfg, unknown=["SOLVER.IMS_PER_BATCH"])
    records = open_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    objects = int(np.bincount(records.objects()[0], minlength=1).max())
    objects *= 4 if cfg.INPUT.MOSAIC else 1  # a mosaic has those of four images
    height, width = canvas = largest_canvas(cfg)
    parts, processes = cfg.SOLVER.ACCUMULATE, world_size(args)
    most = max(len(records) // processes, 1)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    # Before the other process takes its part.
    limit = 0.0 if on_gpu else SHARE * _memory_of_process(local_size(args))
    measured: list[tuple[int, int]] = []
    with _measuring(cfg, args.imports, canvas, objects) as measure:
        size = parts
        while result := measure(size):
            used, memory = result
            limit = limit or SHARE * memory
            measured.append((size, used))
            if used - measured[0][1] > CLEAR * limit or used > limit or 2 * size > most:
                break
            size *= 2
    described = f"{height} x {width} pixels"
    if not measured or measured[0][1] > limit:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {MEASURED}: a step of one image of {described} does not fit "
            "into memory: lower INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN"
        )
    each = largest_batch(measured, limit, parts, most)
    last, used = measured[-1]
    return each * processes, (
        f"the largest that fits into {limit / 1e9:.2f} GB ({SHARE:.0%} of the memory) for images "
        f"of {described}: a step needs {measured[0][1] / 1e9:.2f} GB for {measured[0][0]} and "
        f"{used / 1e9:.2f} GB for {last}"
    )


def largest_batch(measured: Sequence[tuple[int, int]], limit: float, parts: int, most: int) -> int:
    """Return the largest batch of a process, a multiple of ``parts`` up to ``most``, whose memory,
    linear in the images, is within the limit.

    Args:
        measured: (images, bytes) of steps; the last one may exceed the limit.
    """
    (first, least), (last, used) = measured[0], measured[-1]
    slope = max(used - least, 1) / max(last - first, 1)
    if len(measured) == 1:  # the next step failed
        return first
    fitting = first + int((limit - least) / slope)
    return max(min(fitting, most) // parts * parts, parts)


def largest_canvas(cfg: CfgNode) -> tuple[int, int]:
    """Return (height, width) of the largest batch of the config."""
    node = cfg.INPUT
    if node.SCALE_JITTER:
        return node.SCALE_JITTER_SIZE, node.SCALE_JITTER_SIZE
    longest = node.MAX_SIZE_TRAIN
    if node.RESIZE == "stretch":
        return node.MIN_SIZE_TRAIN[0], longest
    short = min(max(node.MIN_SIZE_TRAIN), longest)
    # Without groups a batch may contain a high and a wide image.
    return (short if cfg.DATALOADER.ASPECT_RATIO_GROUPING else longest), longest


def _memory_of_process(processes: int) -> float:
    if processes > 1:
        return memory_left() / processes
    return memory_left() + resident()  # this process will train


@contextmanager
def _measuring(
    cfg: CfgNode, imports: list[str], canvas: tuple[int, int], objects: int
) -> Iterator[Callable[[int], tuple[int, int] | None]]:
    """Start a process that makes training steps, and that a lack of memory may kill.

    Args:
        canvas: (height, width) of each image.
        objects: number of objects in each image.

    Yields:
        function from a number of images to the bytes used so far at most and the memory of the GPU,
        0 on a CPU; it returns None if memory is not enough.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (cfg, imports, canvas, objects, there)
    process = context.Process(target=_make_steps, args=arguments, daemon=True)
    process.start()
    there.close()

    def measure(images: int) -> tuple[int, int] | None:
        try:
            here.send(images)
            result = here.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            if (process.exitcode or 0) > 0:  # by a bug, not by a signal
                raise RuntimeError("the process that measures memory has failed") from error
            return None
        if isinstance(result, Exception):
            raise result
        return result

    try:
        yield measure
    finally:
        process.kill()
        process.join()


def _make_steps(
    cfg: CfgNode, imports: list[str], canvas: tuple[int, int], objects: int, asked: Connection
) -> None:
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    try:
        import_modules(imports)
        if not on_gpu:
            keep_freed_memory()
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # without a warm-up, weights could diverge, which Detectron2 refuses
        averages = copy.deepcopy(model) if cfg.SOLVER.EMA_DECAY else None  # noqa: F841
        while True:
            example = _made_up(canvas, objects, len(cfg.MODEL.PIXEL_MEAN))
            batch = [example] * asked.recv()
            for _ in range(2):  # the first one allocates the optimizer's moments
                with torch.autocast(model.device.type, enabled=cfg.SOLVER.AMP.ENABLED):
                    loss = sum(model(batch).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            asked.send(_used(on_gpu))
    except UserError as error:
        asked.send(error)
    except (RuntimeError, MemoryError) as error:
        if explain(error, cfg.OUTPUT_DIR) is None:  # no lack of memory
            raise


def _made_up(canvas: tuple[int, int], objects: int, channels: int) -> dict:
    height, width = canvas
    instances = Instances(canvas)
    corners = torch.rand(objects, 2) * torch.tensor([0.9 * width, 0.9 * height])
    sides = torch.tensor([0.1 * width, 0.1 * height])
    instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    instances.gt_classes = torch.zeros(objects, dtype=torch.long)
    return {
        "image": torch.zeros(channels, height, width, dtype=torch.uint8),
        "instances": instances,
    }


def _used(on_gpu: bool) -> tuple[int, int]:
    """Return the bytes used at most, and the memory of the GPU, or 0 on a CPU."""
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        return total - free, total
    return int(peak_memory(torch.device("cpu"))[0]), 0
