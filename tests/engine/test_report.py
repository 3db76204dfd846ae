"""The report at the end of a training, of the detections of the best weights."""

import json

import pytest
import torch
from conftest import make_cfg
from torch import nn
from trainings import arguments, run

import atss.engine.run as way_in
from atss.analysis import results
from atss.analysis.results import find_results
from atss.checkpoints import TrainingCheckpointer
from atss.engine.best import Best
from atss.engine.report import write_report


def save_results(folder, text):
    """Write ``text`` as the results of an evaluation."""
    (folder / "inference" / "squares").mkdir(parents=True, exist_ok=True)
    (folder / "inference" / "squares" / "coco_instances_results.json").write_text(text)


def best_results(folder):
    return (folder / "inference" / "squares" / "best_results.json").read_text()


def test_results_of_the_best_weights_are_kept(tmp_path):
    best = Best("bbox/AP", 0, TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path)), ["squares"])
    kept = []
    for iteration, values in enumerate([(2, 1), (1, 3), (3, 3), (float("nan"), 4), (5, 4)]):
        save_results(tmp_path, f"plain {iteration}")
        save_results(tmp_path / "ema", f"averaged {iteration}")
        best.update([(nn.Linear(1, 1), {"bbox": {"AP": x}}) for x in values], iteration)
        kept.append(best_results(tmp_path))
    assert kept == ["plain 0", "averaged 1", "averaged 1", "averaged 3", "plain 4"]


def test_results_of_killed_runs_match_the_next_best(tmp_path, monkeypatch):
    """Killed between both files, a run has the older weights, so it copies the results again."""

    def kill(*arguments, **about):
        raise KeyboardInterrupt

    checkpointer = TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path))
    best = Best("bbox/AP", 0, checkpointer, ["squares"])
    save_results(tmp_path, "new")
    monkeypatch.setattr(checkpointer, "save_weights", kill)
    with pytest.raises(KeyboardInterrupt):
        best.update([(nn.Linear(1, 1), {"bbox": {"AP": 1.0}})], 0)
    assert best_results(tmp_path) == "new"
    assert not (tmp_path / "model_best.pth").exists()


def test_report_measures_the_best_weights(squares, tmp_path):
    run(squares, tmp_path, **{"TEST.REPORT": True, "TEST.EVAL_PERIOD": 2, "SOLVER.BASE_LR": 0.001})
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["AP"] == pytest.approx(best["value"], abs=1e-9)
    assert find_results(str(tmp_path)).detections.endswith("inference/short/best_results.json")
    page = (tmp_path / "report.html").read_text()
    assert "Suspected" in page or "Worst images" in page
    assert f"The report is in {tmp_path}/report.html" in (tmp_path / "log.txt").read_text()
    # As after other weights than the best.
    (tmp_path / "inference/short/best_results.json").unlink()
    last = find_results(str(tmp_path)).detections
    assert last.endswith("inference/short/coco_instances_results.json")


def test_failed_report_is_a_warning(squares, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(results, "hotcoco", None)
    register = f"short={squares}/annotations.json:{squares}/images"
    opts = {"DATASETS.TRAIN": ("short",), "DATASETS.TEST": ("short",), "TEST.REPORT": True}
    opts |= {"SOLVER.MAX_ITER": 1, "INPUT.MIN_SIZE_TEST": 64}
    args = way_in.make_parser().parse_args(arguments(register, tmp_path, **opts))
    assert "AP" in way_in.run(args, way_in.prepare(args))["bbox"]
    assert (tmp_path / "model_final.pth").is_file()
    assert not (tmp_path / "report.html").exists()
    log = (tmp_path / "log.txt").read_text()
    assert log.count("TEST.REPORT: no report (UserError: the report needs hotcoco, which is") == 1
    assert "Traceback" not in log


def test_training_without_objects_to_measure_has_no_report(tmp_path, caplog):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    write_report(cfg)
    assert not caplog.records
    cfg.DATASETS.TEST = ("unregistered",)
    write_report(cfg)
    (warning,) = caplog.records
    assert "no report (UserError: " in warning.getMessage()
