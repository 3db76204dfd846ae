"""Comparisons of trainings: of one seed, all rows of a plan have the same images in the same order
and begin with the same weights."""

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..config.checks import flatten
from ..engine.folder import lock_folder
from ..errors import UserError
from .comparison import Results, read_results, write_results
from .digits import ABLATION, make_digits
from .plans import SPLITS, Plan, Row
from .runs import Run, in_own_process


@dataclass(frozen=True)
class Comparison:
    """A plan and its places.

    Attributes:
        data: folder of the data.
        output: folder with a folder for each run, in which an interrupted one continues.
        results: csv files; the first one is written.
        imports: as for --import.
    """

    plan: Plan
    data: Path
    output: Path
    results: Sequence[Path]
    imports: Sequence[str] = ()

    def find(self) -> Results:
        """Return the results of the plan's rows.

        Raises:
            UserError: if a result is that of another config or other data.
        """
        found = read_results(self.results)
        marks = {row: self._fingerprint(row) for row in self.plan.rows if row in found}
        for row, mark in marks.items():
            for seed, record in found[row].items():
                if record["fingerprint"] != mark:
                    raise UserError(
                        f"{' or '.join(map(str, self.results))} has a run of another config or "
                        f"other data: row {row}, seed {seed}; remove its line, or choose other "
                        "--results"
                    )
        return {row: found[row] for row in marks}

    def carry_out(self, chosen: Sequence[tuple[str, int]], jobs: int) -> bool:
        """Train the chosen (row, seed) that have no result, and add their lines. Return whether
        all succeeded; the others are named.

        Args:
            jobs: runs at a time, each with its share of the threads.

        Raises:
            UserError: as :meth:`find`; for no jobs; if another process uses the folder.
        """
        if jobs < 1:
            raise UserError(f"--jobs {jobs}: use 1 or more")
        found = self.find()
        missing = [x for x in chosen if x[1] not in found.get(x[0], {})]
        if found:
            print(f"{len(chosen) - len(missing)} of {len(chosen)} runs are done.", flush=True)
        self.output.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(str(self.output))
        try:
            return self._train([self._run(*x, jobs) for x in missing], jobs)
        finally:
            if lock is not None:
                lock.close()

    def _train(self, runs: list[Run], jobs: int) -> bool:
        """Each run has its own pool, so that a process that is killed ends no other."""
        context = multiprocessing.get_context("spawn")
        running: dict[Future, tuple[Run, int, ProcessPoolExecutor]] = {}
        left, free, done, failed = iter(runs), [*range(jobs)], 0, 0
        while True:
            while free and (run := next(left, None)):
                pool, place = ProcessPoolExecutor(1, context), free.pop(0)
                running[pool.submit(in_own_process, run, place)] = run, place, pool
            if not running:
                return not failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, place, pool = running.pop(future)
                pool.shutdown()
                free.append(place)
                done += 1
                print(f"{done} of {len(runs)}: {run.row}, seed {run.seed}: ", end="")
                failed += not self._finish(run, future)

    def _finish(self, run: Run, future: Future) -> bool:
        try:
            record = future.result()
        except (Exception, SystemExit) as error:
            kind = "its process was killed" if isinstance(error, BrokenProcessPool) else error
            expected = isinstance(error, UserError | SystemExit | BrokenProcessPool)
            reason = kind if expected else f"{type(error).__name__}: {error}"
            print(f"{str(reason).removeprefix('error: ')} (log: {run.folder})", flush=True)
            return False
        first, *_ = self.results
        found = read_results([first])
        found.setdefault(run.row, {})[run.seed] = record
        write_results(found, first)
        facts = (run.folder / "trained.json", run.folder / "fingerprint")
        for file in (*run.folder.glob("training/model_*.pth"), *facts):
            file.unlink()
        (run.folder / "training").rename(_unused(run.folder / "finished"))
        print(f"AP {record['AP']:.1f}", flush=True)
        return True

    def _run(self, name: str, seed: int, jobs: int) -> Run:
        row = self.plan.rows[name]
        first = next(iter(self.plan.rows.values()))
        about = {
            "runs_at_a_time": jobs,
            "config": "+".join(Path(x).stem for x in row.configs),
            "data": "digits" if "digits" in row.data else row.data["train"],
        }
        return Run(
            *(name, seed, _load(row).dump(), row.opts, _load(first).dump()),
            evaluations=self.plan.evaluations,
            sources=self._sources(row),
            folder=self.output / name / f"seed{seed}",
            fingerprint=self._fingerprint(name),
            about=about,
            threads=max(torch.get_num_threads() // jobs, 1),
            imports=self.imports,
        )

    def _fingerprint(self, name: str) -> str:
        row, first = self.plan.rows[name], next(iter(self.plan.rows.values()))
        configs = [_changed(_load(x)) for x in (row, first)]
        for keys in self.plan.evaluations.values():
            _load(row, keys)  # refuses wrong keys before the training
        content = repr((configs, row.data, self.plan.evaluations))
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def _sources(self, row: Row) -> dict[str, str]:
        if "digits" not in row.data:
            return {split: _below(self.data, source) for split, source in row.data.items()}
        folder = self.output / ".digits"
        make_digits(folder, replace(ABLATION, images=row.data["digits"]))
        return {split: f"{folder}/{split}.json:{folder}/{split}" for split in SPLITS}


def _load(row: Row, keys: Sequence[Any] = ()) -> CfgNode:
    return load_config(*row.configs, opts=[*row.opts, *keys])


@cache
def _defaults() -> dict[str, Any]:
    return dict(flatten(load_config()))


def _changed(cfg: CfgNode) -> list[tuple[str, Any]]:
    """Return the keys without their default: a later version that has more keys has the same."""
    defaults = _defaults()
    return sorted(
        (key, value)
        for key, value in flatten(cfg)
        if not isinstance(value, CfgNode) and (key not in defaults or defaults[key] != value)
    )


def _below(folder: Path, source: str) -> str:
    """Return ``annotations:images`` in a folder; ``images`` may be the name of a split."""
    annotations, _, images = source.rpartition(":")
    if annotations.endswith(".json"):
        images = str(folder / images)
    return f"{folder / annotations}:{images}"


def _unused(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{i}") for i in count(1))
    return next(x for x in names if not x.exists())
