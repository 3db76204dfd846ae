"""Trainings that are compared seed by seed: of one seed, all rows of a plan have the same images in
the same order and begin with the same weights."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from .. import __version__
from ..config import build_sampling, complete_classes, input_size, load_config, uses_atss
from ..config.checks import flatten
from ..data.datasets import provide_json
from ..engine import Trainer
from ..engine import run as way_in
from ..engine.terminal import release_logs
from ..errors import UserError
from ..predictor import Predictor
from .comparison import read_results, write_results
from .digits import ABLATION, make_digits
from .plans import SPLITS, Plan, Row
from .statistics import looks_at_predictions, measure, predict_with, read_objects

# Images of the time of an inference, after as many that warm up.
TIMED, WARM_UP = 40, 5
WEIGHTS = "model_final.pth"


@dataclass(frozen=True)
class Run:
    """A training of a row with a seed.

    Attributes:
        rows: of the plan up to the one that is trained, the last: later ones take over the initial
            weights of earlier ones.
        evaluations: as in :class:`~atss.analysis.plans.Plan`.
        sources: {split: annotations:images}.
        threads: of the process.
        beside: number of runs at a time.
    """

    rows: Mapping[str, Row]
    seed: int
    evaluations: Mapping[str, Sequence[Any]]
    sources: Mapping[str, str]
    folder: Path
    threads: int
    beside: int

    @property
    def name(self) -> str:
        return [*self.rows][-1]

    @property
    def row(self) -> Row:
        return self.rows[self.name]

    def arguments(self, split: str, *options: str, opts: Sequence[Any] = ()) -> Namespace:
        """Return arguments of tools/train_net.py."""
        config = self.folder / "row.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(
            yaml.safe_dump({"_BASE_": [os.path.abspath(x) for x in self.row.configs]})
        )
        register = f"--register={split}={self.sources[split]}"
        args = way_in.make_parser().parse_args(["--config-file", str(config), register, *options])
        names = {name: (name,) if name == split else () for name in SPLITS}
        sets = ("DATASETS.TRAIN", names["train"], "DATASETS.TEST", names["test"])
        args.opts = [*self.row.opts, "SEED", self.seed, *sets, *opts]
        return args


def carry_out(plan: Plan, whole: Plan, data: Path, output: Path, results: Path, jobs: int) -> None:
    """Train the runs of ``plan`` that ``results`` lacks, and add them.

    Args:
        whole: the plan of which it is a part.
        data: folder of the data.
        output: folder with a folder for each run, in which an interrupted one continues.
        jobs: runs at a time, each with its share of the threads.

    Raises:
        UserError: if the results have runs of other configs, or a run cannot start.
        SystemExit: if a run fails.
    """
    found, missing = read_results(results), []
    for seed in plan.seeds:
        for name, row in plan.rows.items():
            mark = fingerprint(row)
            if (before := found.get(name, {}).get(seed)) is not None:
                if (before["fingerprint"], before["data"]) != (mark, _data_name(row)):
                    raise UserError(
                        f"{results} has a run of another config or of other data: row {name}, "
                        f"seed {seed}; choose another file"
                    )
                continue
            names = [*whole.rows]
            rows = {x: whole.rows[x] for x in names[: names.index(name) + 1]}
            sources = _sources(row, data, output)
            folder = output / name / f"seed{seed}"
            threads = max(torch.get_num_threads() // jobs, 1)
            missing.append(Run(rows, seed, plan.evaluations, sources, folder, threads, jobs))
    if found:
        total = len(plan.rows) * len(plan.seeds)
        print(f"{total - len(missing)} of {total} runs are in {results}.", flush=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, max_tasks_per_child=1)
    waiting = [pool.submit(_in_own_process, x) for x in missing]
    try:
        for number, future in enumerate(as_completed(waiting), start=1):
            record = future.result()
            found = read_results(results)  # to which another machine may have added
            found.setdefault(record["row"], {})[record["seed"]] = record
            write_results(found, results)
            _remove_weights(output / record["row"] / f"seed{record['seed']}")
            print(
                f"{number} of {len(missing)}: {record['row']}, seed {record['seed']}: "
                f"AP {record['AP']:.1f}, {record['minutes']:.1f} minutes",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)


def fingerprint(row: Row) -> str:
    """Return a text that differs between configs: of the values that are not the defaults, so that
    a later version with more keys has the same."""
    defaults = dict(flatten(load_config()))
    changed = {
        key: value
        for key, value in flatten(load_config(*row.configs, opts=row.opts))
        if not isinstance(value, CfgNode) and (key not in defaults or defaults[key] != value)
    }
    return hashlib.sha256(repr(sorted(changed.items())).encode()).hexdigest()[:8]


def _sources(row: Row, data: Path, output: Path) -> dict[str, str]:
    if "digits" not in row.data:
        return {split: _below(data, source) for split, source in row.data.items()}
    folder = output / "digits"
    make_digits(folder, replace(ABLATION, images=row.data["digits"]))
    return {split: f"{folder}/{split}.json:{folder}/{split}" for split in SPLITS}


def _below(folder: Path, source: str) -> str:
    """Return ``annotations:images`` in a folder; ``images`` may be the name of a split."""
    annotations, _, images = source.rpartition(":")
    if annotations.endswith(".json"):
        images = str(folder / images)
    return f"{folder / annotations}:{images}"


def _in_own_process(run: Run) -> dict[str, Any]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "terminal.txt", "a") as terminal:
        for stream in (1, 2):
            os.dup2(terminal.fileno(), stream)
    torch.set_num_threads(run.threads)
    try:
        return train_and_measure(run)
    except SystemExit as error:
        where = f"row {run.name}, seed {run.seed}"
        raise SystemExit(f"{where}: {error}") from error


def train_and_measure(run: Run) -> dict[str, Any]:
    """Train a run, or continue it, in this process; measure its last weights, and return its line
    of the results."""
    begun = time.perf_counter()
    weights = run.folder / WEIGHTS
    trained = run.folder / "trained.json"
    if not trained.is_file():
        if not (run.folder / "last_checkpoint").is_file():
            (run.folder / "metrics.json").unlink(missing_ok=True)  # of a run whose line is gone
        args = run.arguments("train", "--resume", opts=("OUTPUT_DIR", str(run.folder)))
        with release_logs():
            way_in.start(args, paired_trainer(run))
        steps = [json.loads(x) for x in (run.folder / "metrics.json").read_text().splitlines()]
        times = [x["time"] for x in steps if "time" in x]  # none in the first iterations
        facts = {"step_seconds": statistics.median(times)} if times else {}
        facts["megabytes"] = _peak_memory()
        trained.write_text(json.dumps(facts))
    args = run.arguments("test", "--eval-only", opts=("MODEL.WEIGHTS", str(weights)))
    cfg = load_config(args.config_file, opts=args.opts)
    record = {"row": run.name, "seed": run.seed, **_evaluate(run, weights)}
    record |= json.loads(trained.read_text()) | _measure(cfg, weights)
    record["minutes"] = (time.perf_counter() - begun) / 60
    return record | _circumstances(run, cfg)


def _remove_weights(folder: Path) -> None:
    for file in (*folder.glob("model_*.pth"), folder / "last_checkpoint", folder / "trained.json"):
        file.unlink()


def paired_trainer(run: Run) -> type[Trainer]:
    """Return a trainer whose model begins with the random weights of the plan's earlier rows."""

    class Paired(Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            seed_all_rng(run.seed)
            model = super().build_model(cfg)
            earlier = [x for name, x in run.rows.items() if name != run.name]
            pair_weights(model, (_row_config(x) for x in earlier), run.seed)
            return model

    return Paired


def _row_config(row: Row) -> CfgNode:
    opts = (*row.opts, "DATASETS.TRAIN", ("train",), "DATASETS.TEST", ())
    cfg = load_config(*row.configs, opts=(*opts, "MODEL.DEVICE", "cpu"))
    if uses_atss(cfg):
        complete_classes(cfg)
    return cfg


@torch.no_grad()
def pair_weights(model: nn.Module, cfgs: Iterable[CfgNode], seed: int) -> None:
    """Give a model's random weights the values of the first other model that has a weight of the
    same name, shape and deviation."""
    missing = {name: x for name, x in model.state_dict().items() if _is_random(x)}
    for cfg in cfgs:
        seed_all_rng(seed)
        for name, other in build_model(cfg).state_dict().items():
            weight = missing.get(name)
            if weight is None or weight.shape != other.shape or not _is_random(other):
                continue
            if math.isclose(float(weight.std()), float(other.std()), rel_tol=0.2):
                missing.pop(name).copy_(other)


def _is_random(weight: Tensor) -> bool:
    return weight.ndim > 1 and weight.is_floating_point() and float(weight.std()) > 0


def _evaluate(run: Run, weights: Path) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, keys in {"": (), **run.evaluations}.items():
        folder = run.folder / (name or "test")
        opts = ("MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder), *keys)
        with release_logs():
            args = run.arguments("test", "--eval-only", opts=opts)
            results = way_in.run(args, way_in.prepare(args)) or {}
        for task, values in results.items():
            prefix = "".join(f"{x}/" for x in (name, "" if task == "bbox" else task) if x)
            metrics |= {f"{prefix}{key}": x for key, x in values.items()}
    return metrics


def _measure(cfg: CfgNode, weights: Path) -> dict[str, float]:
    """Return the time of an inference, and positives per object of the test images."""
    provide_json("test")
    about = MetadataCatalog.get("test")
    content, objects = read_objects(about.json_file)
    predictor = Predictor(cfg, weights)
    files = [str(Path(about.image_root) / x["file_name"]) for x in content["images"]]
    seconds = []
    for file in [*files[:WARM_UP], *files[:TIMED]]:
        image = predictor.read(file)
        before = time.perf_counter()
        predictor(image)
        seconds.append(time.perf_counter() - before)
    measured = {"inference_ms": 1000 * statistics.median(seconds[WARM_UP:])}
    if cfg.MODEL.META_ARCHITECTURE != "ATSSDetector":
        return measured
    sampling = build_sampling(cfg)
    predict: Callable | None = None
    if looks_at_predictions(sampling.assigner):
        predict = predict_with(cfg, str(weights), content, about.image_root)
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _circumstances(run: Run, cfg: CfgNode) -> dict[str, Any]:
    versions = {"atss": __version__, "torch": torch.__version__}
    versions |= {"detectron2": detectron2.__version__, "python": platform.python_version()}
    return {
        "iterations": _iterations(run.folder),
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "threads": run.threads,
        "runs_at_a_time": run.beside,
        "config": "+".join(Path(x).stem for x in run.row.configs),
        "fingerprint": fingerprint(run.row),
        "data": _data_name(run.row),
        "versions": ", ".join(f"{name} {x}" for name, x in versions.items()),
        "machine": _machine(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _data_name(row: Row) -> str:
    return "digits" if "digits" in row.data else row.data["train"]


def _iterations(folder: Path) -> int:
    lines = (folder / "metrics.json").read_text().splitlines()
    return json.loads(lines[-1])["iteration"] + 1


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the checkout, with "-dirty" if code or configs differ from it, or ""."""
    root = Path(__file__).parents[4]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    with contextlib.suppress(OSError):
        changed = git("status", "--porcelain", "--", "projects", "configs")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return ""
