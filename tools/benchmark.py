#!/usr/bin/env python3
"""Measures what the project claims to be fast at.

    tools/benchmark.py assignment

compares the assigner with a straightforward dense implementation (distances and overlaps of every
object with every anchor, image by image), in one run, interleaved, by medians.
"""

import argparse
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.ops import box_iou

from atss import Anchors, GroundTruth
from atss.assigners import ATSS


def dense_atss(anchors: Anchors, gt: GroundTruth, k: int = 9) -> torch.Tensor:
    """The baseline: Algorithm 1 on (R, G) matrices. Returns gt_index (N, R)."""
    result = []
    centre = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    for image in range(gt.num_images):
        own = (gt.image_index == image).nonzero().squeeze(1)
        boxes = gt.boxes[own]
        owner = torch.full((len(anchors.boxes),), -1)
        if len(boxes):
            overlap = box_iou(anchors.boxes, boxes)
            # Not torch.cdist: it expands the square, and loses the digits that order neighbours.
            difference = centre[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2
            distance = difference.square().sum(dim=2).sqrt()
            first, candidates = 0, []
            for level in distance.split(anchors.per_level):
                nearest = level.topk(min(k, len(level)), dim=0, largest=False).indices
                candidates.append(nearest + first)
                first += len(level)
            candidates = torch.cat(candidates)
            values = overlap.gather(0, candidates)
            threshold = values.mean(dim=0) + values.std(dim=0)
            points = centre[candidates]
            sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=2)
            positive = (values >= threshold) & (sides.amin(dim=2) > 0.01)
            chosen = torch.full_like(overlap, -1)
            chosen.scatter_(0, candidates, torch.where(positive, values, -1))
            best, winner = chosen.max(dim=1)
            owner = torch.where(best >= 0, own[winner], -1)
        result.append(owner)
    return torch.stack(result)


def random_objects(count: int, canvas_hw: tuple[int, int], num_images: int = 1) -> GroundTruth:
    """Boxes of 8 to 512 pixels, sizes log-uniform, anywhere on the canvas; fixed seed."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas_hw
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    size = 8 * 64 ** torch.rand(count, 2, generator=generator)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    image_index = torch.arange(count) % num_images
    return GroundTruth(boxes, torch.zeros(count, dtype=torch.long), image_index, num_images)


def median_seconds(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Medians of several functions called in turn, after one uncounted call each."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _peak_mebibytes() -> float:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def _memory_child(count: int, canvas_hw: tuple[int, int], num_images: int, queue) -> None:
    anchors, gt = Anchors.grid(canvas_hw), random_objects(count, canvas_hw, num_images)
    ATSS()(anchors, random_objects(1, canvas_hw))  # what the library itself loads
    before = _peak_mebibytes()
    ATSS()(anchors, gt)
    queue.put(_peak_mebibytes() - before)


def extra_mebibytes(count: int, canvas_hw: tuple[int, int], num_images: int) -> float:
    """By how much one call raises a fresh process's peak memory, output included."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_memory_child, args=(count, canvas_hw, num_images, queue))
    child.start()
    child.join()
    return queue.get()


def assignment(runs: int) -> None:
    """Prints a table of seconds and ratios."""
    print("boxes  canvas      images  closed form [ms]  dense [ms]   ratio  anchors that differ")
    small, large = (800, 1344), (2160, 3840)
    seconds = {}
    for count, canvas_hw in ((7, small), (100, small), (1000, small), (1000, large)):
        anchors, gt = Anchors.grid(canvas_hw), random_objects(count, canvas_hw)
        functions = {
            "ours": lambda a=anchors, g=gt: ATSS()(a, g),
            "dense": lambda a=anchors, g=gt: dense_atss(a, g),
        }
        ours, dense = median_seconds(functions, runs).values()
        seconds[count, canvas_hw] = ours
        size = "x".join(map(str, canvas_hw))
        row = (f"{count:5d}  {size:<10}  {1:6d}", f"{ours * 1e3:16.2f}", f"{dense * 1e3:10.1f}")
        differ = (ATSS()(anchors, gt).gt_index != dense_atss(anchors, gt)).sum()
        print("  ".join(row), f"{dense / ours:7.1f}  {differ:19d}")
    anchors, gt = Anchors.grid(small), random_objects(75000, small, 128)
    ours = median_seconds({"ours": lambda: ATSS()(anchors, gt)}, runs)["ours"]
    print(f"75000  800x1344       128  {ours * 1e3:16.2f}")
    ratio = seconds[1000, large] / seconds[1000, small]
    print(f"1,000 boxes on 2160x3840 against 800x1344: {ratio:.2f} times the seconds")
    print(f"75,000 boxes on 128 images: {extra_mebibytes(75000, small, 128):.0f} MiB of memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["assignment"])
    parser.add_argument("--runs", type=int, default=11, help="counted calls of each function")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    assignment(args.runs)


if __name__ == "__main__":
    main()
