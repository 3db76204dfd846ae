"""Seconds and bytes: calls in turn, medians with intervals, peak memory."""

import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import binom


class Stopwatch:
    """Notes moments by name: on a GPU with events, since the host runs ahead of it."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.moments = [("start", self._now())]

    def lap(self, name: str) -> None:
        """Ends a part."""
        self.moments.append((name, self._now()))

    def laps(self) -> dict[str, float]:
        """Seconds of each part; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return {name: self._between(before, after) for (_, before), (name, after) in pairs}

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before, after) -> float:
        return before.elapsed_time(after) / 1e3 if self.on_gpu else after - before


@dataclass(frozen=True)
class Seconds:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Of at least 95 % confidence that the median lies within: two order statistics, by the
        binomial distribution; of fewer than six values the extremes, at less confidence."""
        ordered = sorted(self.values)
        outside = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
        return ordered[outside], ordered[-1 - outside]

    def over(self, other: "Seconds") -> "Seconds":
        """The ratios to another's, turn by turn: what slows the machine for a while slows both."""
        return Seconds(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


def in_turn(
    functions: dict[str, Callable[[], object]], runs: int, device: torch.device
) -> dict[str, Seconds]:
    """Times several functions, in turn so that a change of the machine's mood meets all. What takes
    less than a tenth of a second is called several times a turn, and counts with the mean."""
    repeats = {}
    for name, function in functions.items():
        repeats[name] = enough_calls(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(mean_seconds(function, repeats[name], device))
    return {name: Seconds(tuple(values)) for name, values in times.items()}


def enough_calls(function: Callable[[], object], device: torch.device) -> int:
    """How many calls take a tenth of a second, after a first one."""
    function()
    return max(1, math.ceil(0.1 / mean_seconds(function, 1, device)))


def mean_seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of one call, of so many."""
    watch = Stopwatch(device)
    for _ in range(repeats):
        function()
    watch.lap("all")
    return watch.laps()["all"] / repeats


def parts_in_turn(
    function: Callable[[Stopwatch], None], runs: int, device: torch.device
) -> dict[str, Seconds]:
    """Times the laps that a function takes."""
    function(Stopwatch(device))
    laps = []
    for _ in range(runs):
        watch = Stopwatch(device)
        function(watch)
        laps.append(watch.laps())
    return {name: Seconds(tuple(lap[name] for lap in laps)) for name in laps[0]}


def peak_mebibytes() -> float:
    """Peak resident memory of this process so far (Linux)."""
    return _mebibytes("VmHWM")


def resident_mebibytes() -> float:
    """Resident memory of this process now (Linux)."""
    return _mebibytes("VmRSS")


def _mebibytes(what: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status).group(1)) / 1024


def in_fresh_process(function: Callable[..., float], *args) -> float:
    """What a function returns in a new process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that reads well on a terminal and in Markdown."""
    text = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in text]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
