"""tools/ablation.py: paired runs, resumed, in a table."""

import json
from concurrent.futures import Future

import ablation
import pytest
import torch
from conftest import TINY, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from atss.analysis import experiments
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

    def __init__(self, *_, **__):
        pass

    def submit(self, function, run):
        future: Future = Future()
        try:
            future.set_result(experiments.train_and_measure(run))
        except BaseException as error:
            future.set_exception(error)
        finally:
            for name in ("train", "test"):
                DatasetCatalog.pop(name, None)
                MetadataCatalog.pop(name, None)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Pool)
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(PLAN, default=list))

    def call(*argv):
        ablation.main([str(plan), "--output", str(tmp_path / "out"), *argv])
        return capsys.readouterr().out

    return call


def test_missing_runs_are_trained_and_compared(run, tmp_path):
    assert "of 2: ATSS, seed 1: AP" in run()
    results = tmp_path / "plan.csv"
    first = read_results(results)
    assert {*first["ATSS"][1]} >= {"AP", "small/AP", "positives", "inference_ms", "megabytes"}
    assert "| ATSS over IoU |" in (tmp_path / "plan.md").read_text()
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("model_*.pth"))  # gigabytes, otherwise
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:2]) + "\n")  # as if it had been interrupted there
    assert "1 of 2 runs are in" in run("--tables") + run()
    with pytest.raises(SystemExit, match=r"run of another config or .*: row IoU, seed 1; choose"):
        run("SOLVER.BASE_LR", "0.5")


def test_killed_run_continues(run, tmp_path, monkeypatch):
    """And ends with the same weights, also if it is killed while they are evaluated."""
    weights, evaluate = [], experiments._evaluate

    def keep(run, file):
        weights.append(torch.load(file)["model"])
        return evaluate(run, file)

    monkeypatch.setattr(experiments, "_evaluate", keep)
    run("--rows", "ATSS")
    after_step = experiments.Trainer.after_step

    def stop(trainer):
        after_step(trainer)
        if trainer.iter == 0:
            raise KeyboardInterrupt

    again = ("--rows", "ATSS", "--results", str(tmp_path / "again.csv"), "--output")
    again = (*again, str(tmp_path / "again"))
    monkeypatch.setattr(experiments.Trainer, "after_step", stop)
    with pytest.raises(SystemExit):
        run(*again)
    monkeypatch.setattr(experiments.Trainer, "after_step", after_step)
    monkeypatch.setattr(experiments, "_measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*again)
    monkeypatch.undo()
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Pool)
    run(*again)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    one, two = (read_results(tmp_path / f"{x}.csv")["ATSS"][1] for x in ("plan", "again"))
    assert (one["AP"], one["small/AP"]) == (two["AP"], two["small/AP"])


def test_errors_come_before_training(run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"error: cannot write --output .*out/log.txt: File exi"):
        run()
    (tmp_path / "out").unlink()
    with pytest.raises(SystemExit, match=r"unknown row 'FCOS': choose from \['IoU', 'ATSS'\]"):
        run("--rows", "FCOS")
    (tmp_path / "out/digits/test").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"digits is not complete: it has no train.json"):
        run()


def test_rows_of_a_seed_have_equal_initial_weights():
    """Their heads have different layers; what they share is equal."""

    def build(row, seed):
        seed_all_rng(seed)
        return build_model(make_cfg(config=f"tables/{row}.yaml"))

    names = ("retinanet_A1", "atss_point")
    plain = build(names[0], 1).state_dict()
    full, other = build(names[1], 1), build(names[1], 2).state_dict()
    before = {name: x.clone() for name, x in full.state_dict().items()}
    experiments.pair_weights(full, [make_cfg(config=f"tables/{names[0]}.yaml")], 1)
    after = full.state_dict()
    shared = [name for name in after.keys() & plain.keys() if after[name].ndim > 1]
    assert {name.split(".")[0] for name in shared} == {"backbone", "head"}
    assert all(torch.equal(after[name], plain[name]) for name in shared)
    assert any(not torch.equal(after[name], before[name]) for name in shared)
    for name in after.keys() - set(shared):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(other["head.cls_score.weight"], after["head.cls_score.weight"])
