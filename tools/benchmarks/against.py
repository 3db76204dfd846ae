"""Two commits compared: rules alone, training steps, and memory.

The package of each commit runs in its own process, with the tools of the working tree, and the
processes work in turn. So this file and its imports must run with both packages. With one thread
each, seconds are processor time, which depends less on other processes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import atss
from atss import assigners, load_config
from atss.config import config_names
from atss.engine.launch import keep_freed_memory

from .assignment import CPU
from .commits import checked_out, environment
from .model import Case, build_ours, random_batch, training_step
from .rules import RULES, extra_mebibytes, make_rule
from .scenes import random_scene
from .timing import Seconds, enough_calls, table

# Objects, images and engine of each measurement of memory.
MEMORY = {
    "lists": (1000, 1, "lists"),
    "tables": (1000, 1, "tables"),
    "crowd": (75_000, 128, "lists"),
}
FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """The measurements of both commits.

    Attributes:
        runs: turns of each pair of processes.
        rounds: pairs of processes, one after another: two processes with the same code differ by
            some percent for their whole life, because their memory lies elsewhere.
        names: only rules, and any configs, whose names contain one of these; by default all rules
            and :func:`configs`.
        objects: numbers of objects on an image; a table for each.
        canvas_hw: of training steps.
        batch: images of a training step.
        opts: changes to the configs.
        threads: of each process; None: torch's default.
        keep_freed_memory: see :func:`~atss.engine.launch.keep_freed_memory`.
    """

    runs: int = 7
    rounds: int = 3
    names: Sequence[str] = ("",)
    objects: Sequence[int] = (7, 100, 1000)
    canvas_hw: tuple[int, int] = (128, 160)
    batch: int = 1
    opts: Sequence[str] = ()
    threads: int | None = None
    keep_freed_memory: bool = False

    def of(self, names: Iterable[str]) -> list[str]:
        return [x for x in names if any(part in x for part in self.names)]


class Worker:
    """A process with the package of a commit, which runs :func:`serve`."""

    def __init__(self, folder: Path, options: Options):
        self.configs = folder / "configs"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.against", str(folder)]
        command += ["keep"] * options.keep_freed_memory
        self.process = subprocess.Popen(
            command,
            cwd=FOLDER,
            env=environment(folder, options.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # it ends with its input

    def ask(self, request: str, *arguments: object) -> float:
        """Send a request and return the answer.

        Raises:
            RuntimeError: if the process has stopped, after printing a traceback.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # the empty answer below shows it
            print(json.dumps([request, *arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{request} {arguments} failed with {self.configs.parent}")
        return json.loads(answer)


def serve(folder: str) -> None:
    """Answer each line of the standard input by a line, both in JSON: "call" and "step" by the
    number of calls that take a tenth of a second, "again" by their mean seconds, "memory" by MiB.
    """
    assert Path(atss.__file__).is_relative_to(folder), atss.__file__
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function: Callable[[], object] = nullcontext
    repeats = 1
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        with redirect_stdout(sys.stderr):  # stdout has only answers
            if request == "again":
                start = clock()
                for _ in range(repeats):
                    function()
                answer = (clock() - start) / repeats
            elif request == "memory":
                answer = _memory(*arguments)
            else:
                function = {"call": _call, "step": _step}[request](*arguments)
                answer = repeats = enough_calls(function, CPU)
        print(json.dumps(answer), flush=True)


def _call(rule: str, objects: int) -> Callable[[], object]:
    scene, assigner = random_scene(objects), make_rule(rule)
    return lambda: assigner(*scene)


def _step(
    file: str, objects: int, batch: int, height: int, width: int, opts: list[str]
) -> Callable:
    """Return a step of the last phase of a training."""
    case = Case("fp32", False, batch, height, width, objects, "cpu", file, tuple(opts))
    torch.manual_seed(0)
    last = load_config(file, opts=opts).SOLVER.MAX_ITER - 1
    return training_step(build_ours(case), random_batch(case), last)


def _memory(rule: str, objects: int, num_images: int, engine: str) -> float | None:
    """Return MiB of one call; None if the commit does not have the engine."""
    if hasattr(assigners, "use_engine"):
        with assigners.use_engine(engine):
            return extra_mebibytes(rule, objects, num_images)
    return extra_mebibytes(rule, objects, num_images) if engine == "lists" else None


def configs() -> list[str]:
    """Return a config of each rule, and the successors but for the two that differ from others only
    in backbone and head."""
    others = ["ATSS_R_50_FPN_1x", "tables/retinanet_A1", "tables/ssc_point"]
    successors = (x for x in config_names() if x.startswith("successors/"))
    return [*others, *(x for x in successors if "dcnv2" not in x)]


def configs_of(options: Options) -> list[str]:
    return configs() if "" in options.names else options.of(config_names())


def against(commits: Sequence[str | None], parts: Sequence[str], options: Options) -> dict:
    """Print tables of both commits, the second over the first; return their values.

    Args:
        commits: two; None is the working tree.
        parts: of "calls", "steps" and the keys of MEMORY.
    """
    report: dict = {}
    with ExitStack() as stack:
        folders = [stack.enter_context(checked_out(x)) for x in commits]
        height, width = options.canvas_hw
        for count in options.objects if "calls" in parts else ():
            requests = {x: [("call", x, count)] * 2 for x in options.of(RULES)}
            title = f"a rule alone, one image of 800 x 1344, {count} objects"
            report[title] = _beside(title, folders, requests, options)
        for count in options.objects if "steps" in parts else ():
            tail = (count, options.batch, height, width, list(options.opts))
            requests = {
                x: [("step", str(folder / "configs" / f"{x}.yaml"), *tail) for folder in folders]
                for x in configs_of(options)
            }
            images = "one image" if options.batch == 1 else f"{options.batch} images"
            title = f"a training step, {images} of {height} x {width}, {count} objects"
            report[title] = _beside(title, folders, requests, options)
        for part in MEMORY:
            if part in parts:
                report[part] = _memories(part, folders, options)
    return report


def _beside(title: str, folders: Sequence[Path], requests: dict, options: Options) -> dict:
    """Print a table of the requests to both, by name."""
    values: dict[str, list[list[float]]] = {name: [[], []] for name in requests}
    for _ in range(options.rounds):
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(x, options)) for x in folders]
            for name, pair in requests.items():
                print(f"{title}: {name}", file=sys.stderr, flush=True)
                for worker, request in zip(workers, pair, strict=True):
                    worker.ask(*request)
                for turn in range(options.runs):
                    for i in (0, 1) if turn % 2 else (1, 0):
                        values[name][i].append(workers[i].ask("again"))
    rows = []
    for name, both in values.items():
        old, new = (Seconds(tuple(x)) for x in both)
        ratio = new.over(old)
        low, high = ratio.interval
        cells = (f"{old.median * 1e3:.2f}", f"{new.median * 1e3:.2f}", f"{ratio.median:.3f}")
        rows.append([name, *cells, f"{low:.3f} to {high:.3f}"])
    print(f"\n{title}\n")
    print(table(["", "before [ms]", "after [ms]", "after / before", "95 %"], rows), flush=True)
    return values


def _memories(part: str, folders: Sequence[Path], options: Options) -> dict:
    rows, report = [], {}
    for rule in options.of(RULES):
        peaks = []
        for folder in folders:
            with Worker(folder, options) as worker:  # its peak memory is that of this call
                peaks.append(worker.ask("memory", rule, *MEMORY[part]))
        report[rule] = dict(zip(("before", "after"), peaks, strict=True))
        complete = all(x is not None for x in peaks)
        ratio = f"{peaks[1] / max(peaks[0], 1):.2f}" if complete else ""
        rows.append([rule, *("" if x is None else f"{x:.0f}" for x in peaks), ratio])
    objects, images, engine = MEMORY[part]
    print(f"\npeak memory of a call, {objects:,} objects, images: {images}, engine: {engine}\n")
    print(table(["", "before [MiB]", "after [MiB]", "after / before"], rows), flush=True)
    return report


if __name__ == "__main__":
    if sys.argv[2:]:
        keep_freed_memory()
    serve(sys.argv[1])
