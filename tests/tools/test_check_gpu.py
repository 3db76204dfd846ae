"""The checks for a machine with a GPU, as far as they say anything on a CPU."""

import json
from dataclasses import replace

import check_gpu
import pytest
from gpu import cost, numbers
from gpu.setting import Finding, Setting

SMALL = ["--device", "cpu", "--small"]


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="error: no GPU here"):
        check_gpu.main([])


def test_it_writes_what_it_prints_and_names_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    images, case = Setting.images, Setting.case
    small = {"height": 64, "width": 64}
    monkeypatch.setattr(Setting, "images", lambda self, count, hw: images(self, count, (64, 64)))
    monkeypatch.setattr(Setting, "case", lambda *x, **y: replace(case(*x, **y), **small))
    report = tmp_path / "report.json"
    only = ("precisions", "steps", *(x.__name__ for x in check_gpu.ON_GPUS))
    check_gpu.main([*SMALL, "--only", *only, "--json", str(report)])
    printed = capsys.readouterr().out
    checks = json.loads(report.read_text())["checks"]
    assert set(checks) == set(only)
    assert checks["precisions"]["passed"] is True
    worst = checks["precisions"]["figures"]["worst"]["bf16"]
    assert 0 < worst <= numbers.LOSS_TOLERANCE
    assert f"{worst:.2%} in bf16" in printed
    for function, reason in check_gpu.ON_GPUS.items():
        assert checks[function.__name__]["said"] == f"not run: {reason}"
        assert reason in printed
    step = checks["steps"]["figures"]["fp32, 2 images"]["training step"]
    assert set(step) == {"ours", *cost.PEERS}


def test_what_fails_is_named_and_the_others_run(monkeypatch, capsys):
    ran = []
    checks = {
        "bug": lambda setting: 1 / 0,
        "wrong": lambda setting: Finding(False, "wrong"),
        "right": lambda setting: ran.append(setting) or Finding(True, "right"),
    }
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    with pytest.raises(SystemExit, match="failed: bug, wrong; ") as stop:
        check_gpu.main([*SMALL, "--only", *checks])
    assert ran
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert isinstance(stop.value.code, str)


def test_losses_that_differ_fail(monkeypatch, tmp_path):
    exact = numbers._losses

    def wrong(model, images, precision, scale):
        losses = exact(model, images, precision, scale)
        return {k: x * (1.05 if precision == "bf16" else 1) for k, x in losses.items()}

    monkeypatch.setattr(numbers, "_losses", wrong)
    monkeypatch.setattr(Setting, "configs", ["tables/atss_box"])
    finding = numbers.precisions(Setting("cpu", True, tmp_path))
    assert finding.passed is False
    assert "tables/atss_box in bf16: losses off by 0.0" in finding.said


@pytest.mark.slow
def test_trainings_and_processes(tmp_path):
    setting = Setting("cpu", True, tmp_path)
    for check in (numbers.trainings, numbers.processes, cost.iterations):
        finding = check(setting)
        assert finding.passed is not False, finding.said
