"""One training of a comparison: trained or continued, then measured."""

import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from .. import __version__
from ..config import (
    begins_pretrained,
    build_sampling,
    complete_classes,
    input_size,
    load_config,
    uses_atss,
)
from ..data.datasets import provide_json
from ..engine import Trainer
from ..engine import run as way_in
from ..engine.folder import lock_folder
from ..engine.terminal import release_logs
from ..errors import UserError
from ..predictor import Predictor
from .plans import SPLITS
from .statistics import looks_at_predictions, measure, predict_with, read_objects

# Images of the time of an inference, after those that warm up.
TIMED, WARM_UP = 40, 5
BACKBONE = "backbone.bottom_up."


@dataclass(frozen=True)
class Run:
    """A training of a row with a seed.

    Attributes:
        config: of the row, merged, as a text; ``opts`` are those of the row again, because pixel
            values that a file sets follow the backbone.
        first: config of the plan's first row, from which the initial weights come.
        evaluations: as in :class:`~atss.analysis.plans.Plan`.
        sources: {split: annotations:images}.
        fingerprint: of everything that determines the results, apart from the seed.
        about: further columns of the results.
        threads: of the process.
        imports: as for --import.
    """

    row: str
    seed: int
    config: str
    opts: Sequence[Any]
    first: str
    evaluations: Mapping[str, Sequence[Any]]
    sources: Mapping[str, str]
    folder: Path
    fingerprint: str
    about: Mapping[str, Any]
    threads: int
    imports: Sequence[str] = ()

    def arguments(self, split: str, *options: str, opts: Sequence[Any] = ()) -> Namespace:
        """Return arguments of tools/train_net.py."""
        args = way_in.make_parser().parse_args(["--config-file", str(self.file), *options])
        args.register = [f"{split}={self.sources[split]}"]
        args.imports = [*self.imports]
        names = {name: (name,) if name == split else () for name in SPLITS}
        sets = ("DATASETS.TRAIN", names["train"], "DATASETS.TEST", names["test"])
        args.opts = [*self.opts, "SEED", self.seed, *sets, *opts]
        return args

    @property
    def file(self) -> Path:
        return self.folder / "row.yaml"


def carry_out(run: Run) -> dict[str, Any]:
    """Train a run, or continue it, in this process, and return its line of the results.

    Raises:
        UserError: if the folder has another run, or another process uses it.
        SystemExit: if the training fails or is interrupted.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock, at_start = lock_folder(str(run.folder)), commit()
    try:
        _claim(run)
        training = run.folder / "training"
        facts = run.folder / "trained.json"
        if not facts.is_file():
            args = run.arguments("train", "--resume", opts=("OUTPUT_DIR", str(training)))
            with release_logs():
                way_in.start(args, paired_trainer(run))
            _write(facts, _facts(training))
        cfg = load_config(run.file, opts=run.arguments("test").opts)
        averaged = "_EMA" if cfg.SOLVER.EMA_DECAY > 0 else ""
        weights = str(training / f"model_final{averaged}.pth")
        metrics = _evaluate(run, weights)
        return {
            **{"row": run.row, "seed": run.seed, **metrics, **_measure(cfg, weights)},
            **json.loads(facts.read_text()),
            **{"images_per_batch": cfg.SOLVER.IMS_PER_BATCH, "threads": run.threads},
            **{**run.about, "fingerprint": run.fingerprint, "commit": at_start},
            **{"versions": _versions(), "machine": _machine(), "date": date.today().isoformat()},
        }
    finally:
        if lock is not None:
            lock.close()


def _claim(run: Run) -> None:
    """Write the run's config, unless the folder has another run."""
    mark = run.folder / "fingerprint"
    if mark.is_file() and mark.read_text() != run.fingerprint:
        raise UserError(
            f"{run.folder} has an unfinished run of another config or other data: remove it, or "
            "choose another --output"
        )
    run.file.write_text(run.config)
    mark.write_text(run.fingerprint)


def _write(file: Path, content: dict) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(file)


def _facts(training: Path) -> dict[str, float]:
    """Return iterations, time and memory of a training that has just ended."""
    lines = [json.loads(x) for x in (training / "metrics.json").read_text().splitlines()]
    facts = {"iterations": load_config(training / "config.yaml").SOLVER.MAX_ITER}
    times = [x["time"] for x in lines if "time" in x]  # none in the first iterations
    if times:
        facts["step_seconds"] = statistics.median(times)
    return facts | {"megabytes": _peak_memory()}


def paired_trainer(run: Run) -> type[Trainer]:
    """Return a trainer whose model begins with the random weights of the plan's first row."""

    class Paired(Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            seed_all_rng(run.seed)
            model = super().build_model(cfg)
            first = CfgNode.load_cfg(run.first)
            first.DATASETS.TRAIN, first.DATASETS.TEST = cfg.DATASETS.TRAIN, ()
            first.MODEL.DEVICE = "cpu"
            if uses_atss(first):
                complete_classes(first)
            keep = BACKBONE if begins_pretrained(cfg) or begins_pretrained(first) else None
            seed_all_rng(run.seed)
            pair_weights(model, build_model(first), keep)
            return model

    return Paired


@torch.no_grad()
def pair_weights(model: nn.Module, other: nn.Module, keep: str | None = None) -> None:
    """Give a model's random weights the values of those of another model that have the same name,
    shape and deviation, except for names that begin with ``keep``."""
    weights = other.state_dict()
    for name, weight in model.state_dict().items():
        value = weights.get(name)
        if value is None or value.shape != weight.shape or (keep and name.startswith(keep)):
            continue
        both_random = _is_random(weight) and _is_random(value)
        if both_random and math.isclose(float(weight.std()), float(value.std()), rel_tol=0.2):
            weight.copy_(value)


def _is_random(weight: Tensor) -> bool:
    return weight.ndim > 1 and weight.is_floating_point() and float(weight.std()) > 0


def _evaluate(run: Run, weights: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, keys in {"": (), **run.evaluations}.items():
        folder = run.folder / (name or "test")
        opts = ("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder), *keys)
        with release_logs():
            args = run.arguments("test", "--eval-only", opts=opts)
            results = way_in.run(args, way_in.prepare(args)) or {}
        for task, values in results.items():
            prefix = "".join(f"{x}/" for x in (name, "" if task == "bbox" else task) if x)
            if task == "bbox" and math.isnan(values["AP"]):  # without any detection
                values = values | {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
            metrics |= {f"{prefix}{key}": x for key, x in values.items()}
    return metrics


def _measure(cfg: CfgNode, weights: str) -> dict[str, float]:
    """Return the time of an inference, and positives per object of the test images."""
    provide_json("test")
    about = MetadataCatalog.get("test")
    content, objects, _ = read_objects(about.json_file)
    predictor = Predictor(cfg, weights)
    files = [str(Path(about.image_root) / x["file_name"]) for x in content["images"]]
    seconds, warm_up = [], files[:WARM_UP]
    for file in [*warm_up, *files[:TIMED]]:
        image = predictor.read(file)
        before = time.perf_counter()
        predictor(image)
        seconds.append(time.perf_counter() - before)
    measured = {"inference_ms": 1000 * statistics.median(seconds[len(warm_up) :])}
    if cfg.MODEL.META_ARCHITECTURE != "ATSSDetector":
        return measured
    sampling = build_sampling(cfg)
    predict: Callable | None = None
    if looks_at_predictions(sampling.assigner):
        predict = predict_with(cfg, weights, content, about.image_root)
    records = measure(content, objects, {"n": sampling}, input_size(cfg), predict=predict)
    counts = np.array([x["n"] for x in records])
    return measured | {
        "positives": float(counts.mean()),
        "without_positives": float((counts == 0).mean()),
    }


def _peak_memory() -> float:
    """Return the peak of a GPU's memory, or of this process, in megabytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _versions() -> str:
    versions = {"atss": __version__, "torch": torch.__version__}
    versions |= {"detectron2": detectron2.__version__, "python": platform.python_version()}
    return ", ".join(f"{name} {x}" for name, x in versions.items())


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with "-dirty" if code or configs differ from it, or ""."""
    root = Path(__file__).parents[4]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    with contextlib.suppress(OSError):
        changed = git("status", "--porcelain", "--", "projects", "configs")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return ""


def in_own_process(run: Run, place: int) -> dict[str, Any]:
    """Carry out a run in a process that does nothing else, and that ends with its parent.

    Args:
        place: number of the run among those that run at the same time, from 0; with several GPUs
            each place has its own.
    """
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)  # a training saves a checkpoint

    threading.Thread(target=follow, daemon=True).start()
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "terminal.txt", "a") as terminal:
        for stream in (1, 2):
            os.dup2(terminal.fileno(), stream)
    torch.set_num_threads(run.threads)
    device = CfgNode.load_cfg(run.config).MODEL.DEVICE
    if device == "cuda" and (gpus := torch.cuda.device_count()):
        torch.cuda.set_device(place % gpus)
    try:
        return carry_out(run)
    finally:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # otherwise the process would wait for another run
