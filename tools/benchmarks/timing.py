"""Time and memory: calls in turn, medians with intervals, peak memory."""

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
    """Measures the parts of a function; on a GPU by events, because the host runs ahead of it."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.moments = [("start", self._now())]

    def lap(self, name: str) -> None:
        """End a part."""
        self.moments.append((name, self._now()))

    def laps(self) -> dict[str, float]:
        """Wait for the GPU, and return the seconds of each part."""
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
    """Repeated measurements of one function."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Two order statistics that enclose the median with at least 95 % confidence (binomial
        distribution); for fewer than six values the extremes, with less confidence."""
        ordered = sorted(self.values)
        outside = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
        return ordered[outside], ordered[-1 - outside]

    def over(self, other: "Seconds") -> "Seconds":
        """Return the ratios to others turn by turn: a slow phase of the machine slows both."""
        return Seconds(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


def in_turn(
    functions: dict[str, Callable[[], object]], runs: int, device: torch.device
) -> dict[str, Seconds]:
    """Time several functions in turn, so that slow phases of the machine affect all of them.

    A function that takes less than a tenth of a second is called several times a turn; its value is
    the mean."""
    repeats = {}
    for name, function in functions.items():
        repeats[name] = enough_calls(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(mean_seconds(function, repeats[name], device))
    return {name: Seconds(tuple(values)) for name, values in times.items()}


def enough_calls(function: Callable[[], object], device: torch.device) -> int:
    """Return the number of calls that take a tenth of a second, after a first call."""
    function()
    return max(1, math.ceil(0.1 / mean_seconds(function, 1, device)))


def mean_seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the mean seconds of a call."""
    watch = Stopwatch(device)
    for _ in range(repeats):
        function()
    watch.lap("all")
    return watch.laps()["all"] / repeats


def parts_in_turn(
    function: Callable[[Stopwatch], None], runs: int, device: torch.device
) -> dict[str, Seconds]:
    """Time the parts of a function."""
    function(Stopwatch(device))
    laps = []
    for _ in range(runs):
        watch = Stopwatch(device)
        function(watch)
        laps.append(watch.laps())
    return {name: Seconds(tuple(lap[name] for lap in laps)) for name in laps[0]}


def peak_mebibytes() -> float:
    """Return the peak resident memory of this process (Linux)."""
    return _mebibytes("VmHWM")


def resident_mebibytes() -> float:
    """Return the present resident memory of this process (Linux)."""
    return _mebibytes("VmRSS")


def _mebibytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def in_fresh_process(function: Callable[..., float], *args) -> float:
    """Call a function in a new process, so that peak memory is that of the call."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns."""
    text = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in text]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
