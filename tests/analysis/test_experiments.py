"""tools/ablation.py: runs of a plan, resumed, in a table."""

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import ablation
import pytest
import torch
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog

from atss import load_config
from atss.analysis import experiments, runs
from atss.analysis.comparison import read_results

PLAN = {
    "data": {"digits": {"train": 8, "test": 4}},
    "recipe": ["ablation"],
    "keys": TINY
    | {"SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "SOLVER.CHECKPOINT_PERIOD": 1}
    | {"MODEL.ATSS.SCORE_THRESH_TEST": 0.0},
    "rows": {"IoU": "tables/iou_box", "ATSS": "tables/atss_box"},
    "evaluations": {"small": {"INPUT.MIN_SIZE_TEST": 64}},
    "compare": {"ATSS over IoU": ["ATSS", "IoU"]},
}


class Pool:
    """Runs in this process, instead of in a new one."""

    def __init__(self, *_):
        pass

    def submit(self, _, run, place):
        future: Future = Future()
        try:
            future.set_result(runs.carry_out(run))
        except BaseException as error:
            future.set_exception(error)
        finally:
            for name in ("train", "test"):
                DatasetCatalog.pop(name, None)
                MetadataCatalog.pop(name, None)
        return future

    def shutdown(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Pool)
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(PLAN, default=list))

    def call(*argv):
        code = 0
        try:
            ablation.main([str(plan), "--output", str(tmp_path / "out"), *argv])
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return call


def test_missing_runs_are_trained_and_compared(run, tmp_path):
    code, printed = run()
    assert code == 0
    assert "ATSS, seed 1: AP" in printed
    results = tmp_path / "plan.csv"
    first = read_results([results])
    assert {*first["ATSS"][1]} >= {"AP", "small/AP", "positives", "inference_ms", "megabytes"}
    assert "| ATSS over IoU |" in (tmp_path / "plan.md").read_text()
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("model_*.pth"))  # gigabytes, otherwise
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:2]) + "\n")  # as if it had been interrupted there
    assert "1 of 2 runs are done" in run()[1]
    again = read_results([results])
    assert again["ATSS"][1]["AP"] == first["ATSS"][1]["AP"]
    for option in (("--tables",), ("--rows", "ATSS")):
        code, _ = run("SOLVER.BASE_LR", "0.5", *option)
        assert "plan.csv has a run of another config or other data: row IoU, seed 1" in code


def test_killed_run_continues(run, tmp_path, monkeypatch):
    """With the same results, also if it is killed while the weights are evaluated."""
    run("--rows", "ATSS")
    after_step = runs.Trainer.after_step

    def stop(trainer):
        after_step(trainer)
        if trainer.iter == 0:
            raise KeyboardInterrupt

    again = ("--rows", "ATSS", "--results", str(tmp_path / "again.csv"), "--output")
    again = (*again, str(tmp_path / "again"))
    monkeypatch.setattr(runs.Trainer, "after_step", stop)
    assert run(*again)[0] == 1
    assert list(tmp_path.glob("again/ATSS/seed1/training/model_0000000.pth"))
    code, printed = run("SOLVER.BASE_LR", "0.5", *again)
    assert "seed1 has an unfinished run of another config or other data: remove it" in printed
    monkeypatch.setattr(runs.Trainer, "after_step", after_step)
    measure = runs._measure
    monkeypatch.setattr(runs, "_measure", lambda *_: 1 / 0)
    code, printed = run(*again)
    assert code == 1
    assert "ATSS, seed 1: ZeroDivisionError: division by zero (log: " in printed
    monkeypatch.setattr(runs, "_measure", measure)
    assert run(*again)[0] == 0
    one, two = (read_results([tmp_path / f"{x}.csv"])["ATSS"][1] for x in ("plan", "again"))
    assert one["AP"] > 0
    assert (one["AP"], one["small/AP"]) == (two["AP"], two["small/AP"])


def test_failed_run_leaves_the_others(run, tmp_path, monkeypatch):
    step = runs.Trainer.run_step

    def fail(trainer):
        if "IoU" in trainer.cfg.OUTPUT_DIR:
            raise FloatingPointError("the loss is not finite")
        step(trainer)

    monkeypatch.setattr(runs.Trainer, "run_step", fail)
    code, printed = run()
    assert code == 1
    assert "IoU, seed 1: " in printed
    assert "the loss is not finite" in printed
    assert list(read_results([tmp_path / "plan.csv"])) == ["ATSS"]


def test_killed_process_is_named(run, monkeypatch):
    def die(*_):
        future: Future = Future()
        future.set_exception(BrokenProcessPool("a process in the pool was terminated"))
        return future

    monkeypatch.setattr(Pool, "submit", die)
    code, printed = run()
    assert code == 1
    assert "2 of 2: ATSS, seed 1: its process was killed (log: " in printed


def test_runs_at_a_time_have_places(run, monkeypatch):
    """So that each can have its own GPU."""
    waiting, placed, started = [], {}, []

    def submit(_, __, run, place):
        placed[future := Future()] = place
        waiting.append(future)
        started.append((f"{run.row}{run.seed}", place))
        return future

    def one_ends(running, return_when):
        assert len({placed[x] for x in running}) == len(running) <= 2
        waiting.sort(key=placed.get)
        future = waiting.pop(0 if len(started) > 3 else -1)
        future.set_exception(FloatingPointError())
        return SimpleNamespace(done={future})

    monkeypatch.setattr(Pool, "submit", submit)
    monkeypatch.setattr(experiments, "wait", one_ends)
    run("--jobs", "2", "--seeds", "1", "2", "3")
    assert started[:4] == [("IoU1", 0), ("ATSS1", 1), ("IoU2", 1), ("ATSS2", 1)]
    assert started[4:] == [("IoU3", 0), ("ATSS3", 0)]


@pytest.mark.parametrize(("device", "chosen"), [("cuda", [1]), ("cpu", [])])
def test_places_have_gpus(tmp_path, monkeypatch, device, chosen):
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(runs, "carry_out", lambda run: {"AP": 1.0})
    monkeypatch.setattr(runs.os, "dup2", lambda *_: None)
    config = load_config(opts=["MODEL.DEVICE", device]).dump()
    run = SimpleNamespace(folder=tmp_path, threads=1, config=config)
    assert runs.in_own_process(run, 3) == {"AP": 1.0}
    assert found == chosen


def test_errors_come_before_training(run, tmp_path):
    (tmp_path / "out").write_text("")
    assert "error: cannot write --output" in run()[0]
    (tmp_path / "out").unlink()
    assert "unknown row 'FCOS': choose from ['IoU', 'ATSS']" in run("--rows", "FCOS")[0]
    (tmp_path / "out/.digits/test").mkdir(parents=True)
    assert ".digits is not complete: it has no train.json" in run()[0]
    assert "--jobs 0: use 1 or more" in run("--jobs", "0")[0]
    assert "unknown key SOLVER.BASE" in run("SOLVER.BASE", "3")[0]


def test_keys_after_results_are_refused(capsys):
    with pytest.raises(SystemExit):
        ablation.main(["plan.yaml", "--results", "a.csv", "SOLVER.MAX_ITER", "3"])
    assert "'SOLVER.MAX_ITER' is no .csv file" in capsys.readouterr().err
