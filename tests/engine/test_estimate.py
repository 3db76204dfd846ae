"""Estimate of time and memory in the log."""

import re
from types import SimpleNamespace

import pytest
import torch
from trainings import run

from atss.engine import estimate
from atss.engine.estimate import TrainingEstimate, peak_memory

RAW = {"SOLVER.EMA_DECAY": 0.0, "DATASETS.TEST": ()}


def estimates(output):
    return re.findall(r"One iteration takes.*", (output / "log.txt").read_text())


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that a test advances."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


class Lines(list):
    """A stand-in for the log."""

    def info(self, text, *values):
        self.append(text % values)

    warning = info


@pytest.fixture
def lines(monkeypatch):
    lines = Lines()
    monkeypatch.setattr(estimate, "logging", SimpleNamespace(getLogger=lambda name: lines))
    return lines


def trainer(start, max_iter, period=0):
    cfg = SimpleNamespace(
        TEST=SimpleNamespace(EVAL_PERIOD=period),
        DATASETS=SimpleNamespace(TEST=("a",)),
        SOLVER=SimpleNamespace(IMS_PER_BATCH=4),
    )
    loader = SimpleNamespace(records=range(1000))
    return SimpleNamespace(
        iter=start, max_iter=max_iter, cfg=cfg, data_loader=loader, model=torch.nn.Linear(1, 1)
    )


def iterate(hook, clock, *seconds):
    hook.before_train()
    for duration in seconds:
        hook.before_step()
        clock.seconds += duration
        hook.after_step()
        clock.seconds += 100  # a checkpoint, an evaluation
        hook.trainer.iter += 1


def test_first_iterations_do_not_count(clock, lines):
    hook = TrainingEstimate()
    hook.trainer = trainer(start=1000, max_iter=2020, period=50)
    iterate(hook, clock, 60.0, 30.0, 10.0, *[2.0] * 30)
    (line,) = lines
    assert line.startswith(
        "One iteration takes 2.00 s, one pass over the 1000 training images 0:08:20, the 1000 "
        "remaining iterations 0:33:20 plus evaluations. Peak memory: "
    )


def test_run_of_two_iterations(clock, lines):
    hook = TrainingEstimate()
    hook.trainer = trainer(start=0, max_iter=2)
    iterate(hook, clock, 5.0, 3.0)
    (line,) = lines
    assert line.startswith("One iteration takes 4.00 s, one pass over the 1000 training images 0:")
    assert "the 0 remaining iterations 0:00:00. Peak memory" in line


@pytest.mark.parametrize("used", ["8.9 of 10.0 GB (89 %)", "9.1 of 10.0 GB (91 %)"])
def test_low_memory_warning_names_keys_to_lower(clock, lines, monkeypatch, used):
    monkeypatch.setattr(estimate, "peak_memory", lambda device: (float(used[:3]) * 1e9, 10e9))
    hook = TrainingEstimate()
    hook.trainer = trainer(start=0, max_iter=1)
    iterate(hook, clock, 1.0)
    assert lines[0].endswith(f"Peak memory: {used}")
    warned = used.startswith("9")
    assert len(lines) == 1 + warned
    for key in ("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "INPUT.MIN_SIZE_TRAIN", "PRECISION"):
        assert (key in lines[-1]) == warned


def test_peak_memory_of_the_machine(monkeypatch):
    """Written memory counts, in bytes, once for each process of the machine."""
    before, total = peak_memory(torch.device("cpu"))
    torch.ones(int(before) + 300 * 2**20, dtype=torch.uint8)
    after, _ = peak_memory(torch.device("cpu"))
    assert 250 * 2**20 < after - before < total
    monkeypatch.setattr(estimate.comm, "get_local_size", lambda: 3)
    assert peak_memory(torch.device("cpu"))[0] == 3 * after


def test_peak_memory_of_a_gpu(monkeypatch):
    gpu = torch.device("cuda:1")
    properties = {gpu: SimpleNamespace(total_memory=8)}
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {gpu: 6}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    assert peak_memory(gpu) == (6, 8)


def test_estimate_is_logged_once_per_training(squares, tmp_path):
    """7 images have objects. A resumed run logs it once; an evaluation logs its duration."""
    run(squares, tmp_path, stop_after=2, **RAW)
    assert estimates(tmp_path) == []
    opts = {"DATASETS.TEST": ("short",), "TEST.EVAL_PERIOD": 2}
    run(squares, tmp_path, "--resume", **RAW | opts)
    (line,) = estimates(tmp_path)
    assert "one pass over the 7 training images" in line
    assert "plus evaluations" in line
    log = (tmp_path / "log.txt").read_text()
    assert len(re.findall(r"One evaluation takes \d+:\d\d:\d\d", log)) == 1
