"""Checks of time and memory: what the host waits for, a step beside other detectors', memory."""

import itertools
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmarks import model as measured
from benchmarks.model import training_step
from benchmarks.peers import Peer
from benchmarks.timing import in_turn
from detectron2.config import CfgNode

from atss.engine import Trainer

from .setting import Finding, Setting

# Where a training waits: AMP's scaler asks whether gradients are infinite.
DECLARED = {"fp16": ("amp/grad_scaler.py",)}
PEERS = ("detectron2-retinanet", "detectron2-fcos")
# Iterations that neither begin a training nor write a log.
ORDINARY = range(4, 16)


@contextmanager
def recorded_waits() -> Iterator[Counter]:
    """Counts the calls for which the host waits for the GPU, by file and line."""
    found: Counter = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            path = Path(warning.filename)
            found[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1


class OneBatch(Trainer):
    """Trains on the same images in every iteration."""

    def __init__(self, cfg: CfgNode, batch: list[dict]):
        self.batch = batch
        super().__init__(cfg)

    def build_train_loader(self, cfg: CfgNode) -> list[list[dict]]:
        return [self.batch] * cfg.SOLVER.MAX_ITER


class Recording(OneBatch):
    """Counts waits in ordinary iterations."""

    def __init__(self, *args: Any):
        self.found: Counter = Counter()
        super().__init__(*args)

    def run_step(self) -> None:
        self._record(super().run_step)

    def after_step(self) -> None:
        self._record(super().after_step)

    def _record(self, function: Callable[[], None]) -> None:
        with recorded_waits() if self.iter in ORDINARY else nullcontext({}) as found:
            function()
        self.found.update(found)


def waits(setting: Setting) -> Finding:
    """The calls of torch for which the host waits for the GPU in an iteration of a training, in
    each precision; not the event by which it learns the losses."""
    figures = {}
    for precision in ("fp32", *setting.precisions):
        folder = setting.folder / f"waits_{precision}"
        folder.mkdir(exist_ok=True)
        options = ("MODEL.ATSS.PRECISION", precision, "SOLVER.MAX_ITER", 18, "OUTPUT_DIR", folder)
        options = (*options, "SOLVER.CHECKPOINT_PERIOD", 100)
        cfg = setting.config("ATSS_R_18_FPN_small", *options)
        trainer = Recording(cfg, setting.images(2, (128, 128)))
        trainer.train()
        figures[precision] = {k: n / len(ORDINARY) for k, n in trainer.found.most_common()}
    said = "; ".join(
        f"{precision}: {sum(places.values()):.1f} an iteration, "
        + (", ".join(f"{place} {n:g}" for place, n in places.items()) or "nowhere")
        for precision, places in figures.items()
    )
    undeclared = [
        place
        for precision, places in figures.items()
        for place in places
        if not place.startswith(DECLARED.get(precision, ()))
    ]
    return Finding(not undeclared, said, figures)


def steps(setting: Setting) -> Finding:
    """A training step and inference beside Detectron2's detectors, and the parts of ours: of two
    images, which a fast GPU does sooner than the host can tell it what to do, and of eight."""
    runs = 1 if setting.small else 7
    figures = {}
    cases = [*((x, 2) for x in ("fp32", *setting.precisions)), ("bf16", 8)]
    for precision, batch in cases[:1] if setting.small else cases:
        case = setting.case(precision, "ATSS_R_50_FPN_1x", batch=batch)
        compared = measured.beside_peers((measured.OURS, *PEERS), case, runs)
        parts = measured.parts(case, runs)["training step"]
        figures[f"{precision}, {batch} images"] = {
            what: {
                name: {"ms": 1e3 * x.median, "interval": [1e3 * y for y in x.interval]}
                for name, x in seconds.items()
            }
            for what, seconds in compared.items()
        } | {"parts, ms": {name: 1e3 * x.median for name, x in parts.items()}}
    return Finding(None, "; ".join(f"{k}: {_compared(x)}" for k, x in figures.items()), figures)


def _compared(figures: dict) -> str:
    step = {name: x["ms"] for name, x in figures["training step"].items()}
    ours = step[measured.OURS]
    against = ", ".join(f"{ours / step[peer]:.3f} of {peer}'s" for peer in PEERS)
    assignment = figures["parts, ms"]["assignment"]
    return f"step {ours:.1f} ms, {against}, assignment {assignment:.2f} ms"


def memory(setting: Setting) -> Finding:
    """Peak memory of a training step with few and with many objects an image."""
    figures = {}
    for name in (measured.OURS, *PEERS):
        for objects in (7, 100, 1000):
            case = setting.case("bf16", "ATSS_R_50_FPN_1x", objects)
            figures[f"{name}, {objects}"] = measured.peak_memory(name, case)
    said = ", ".join(f"{name} objects: {mib:.0f} MiB" for name, mib in figures.items())
    return Finding(None, said, figures)


def iterations(setting: Setting) -> Finding:
    """An iteration of a training, with loading from memory, hooks and logs, against a bare step."""
    count = 8 if setting.small else 60
    case = setting.case("bf16", "ATSS_R_50_FPN_1x")
    batch = measured.random_batch(case)
    folder = setting.folder / "iterations"
    folder.mkdir(exist_ok=True)
    cfg = setting.config(
        "ATSS_R_50_FPN_1x",
        *("MODEL.ATSS.PRECISION", case.precision, "MODEL.ATSS.CHANNELS_LAST", case.channels_last),
        *("SOLVER.MAX_ITER", count, "SOLVER.CHECKPOINT_PERIOD", 1000, "OUTPUT_DIR", folder),
    )

    class Timed(OneBatch):
        def run_step(self) -> None:
            moments.append(time.perf_counter())
            super().run_step()

    moments: list[float] = []
    trainer = Timed(cfg, batch)
    trainer.train()
    whole = statistics.median(b - a for a, b in itertools.pairwise(moments[count // 4 :]))
    peer = Peer(trainer.model, (), list, trainer.model, trainer.model)
    bare = in_turn(
        {"": training_step(peer, batch)}, 3 if setting.small else 11, torch.device(setting.device)
    )
    figures = {"iteration, ms": 1e3 * whole, "bare step, ms": 1e3 * bare[""].median}
    said = f"{1e3 * whole:.1f} ms, a bare step {1e3 * bare[''].median:.1f} ms"
    return Finding(None, said, figures)
