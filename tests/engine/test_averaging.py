"""Averaged weights: formula, checkpoints, resumption, evaluation."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn
from trainings import assert_equal, final, run

from atss.engine import Trainer
from atss.engine.averaging import Averaging


def by_hand(history, decay):
    """Return the average of state dicts, one per step."""
    average = {name: x.clone() for name, x in history[0].items()}
    for n, latest in enumerate(history[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        for name, x in latest.items():
            average[name] = kept * average[name] + (1 - kept) * x if x.is_floating_point() else x
    return average


def copy(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def test_formula():
    """Parameters, frozen ones, BatchNorm's statistics and counter; PreciseBN replaces a tensor.
    From n = 4 on the decay is below the ramp."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    averaging = Averaging(model, decay=0.3)
    averaging.trainer = SimpleNamespace(start_iter=0)
    averaging.before_train()
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.5)
    history = []
    for step in range(7):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        if step == 3:
            model[1].running_mean = torch.randn(4)
        averaging.after_step()
        history.append(copy(model))
        torch.testing.assert_close(copy(averaging.model), by_hand(history, 0.3))
    assert (1 + 3) / (10 + 3) > 0.3 > (1 + 2) / (10 + 2)
    assert averaging.updates == 7
    assert averaging.model[1].num_batches_tracked == 7
    assert not torch.equal(averaging.model[0].weight, model[0].weight)


def test_checkpoint_contains_the_average_of_its_step(squares, tmp_path, monkeypatch):
    history = []

    class Recorder(HookBase):
        def after_step(self):
            history.append(copy(self.trainer.model))

    build_hooks = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [Recorder(), *build_hooks(self)])
    run(squares, tmp_path, **{"DATASETS.TEST": ()})
    for iteration in (1, 3, 5):
        saved = torch.load(tmp_path / f"model_{iteration:07d}.pth", weights_only=True)
        state = saved["trainer"]["hooks"]["Averaging"]
        assert state["updates"] == iteration + 1
        torch.testing.assert_close(state["model"], by_hand(history[: iteration + 1], 0.4))
        assert_equal(saved["model"], history[iteration])


@pytest.mark.parametrize("stopped_after", [2, 3])
def test_resumes_bit_for_bit(squares, tmp_path, stopped_after):
    opts = {"DATASETS.TEST": ()}
    run(squares, tmp_path / "whole", **opts)
    run(squares, tmp_path / "parts", stop_after=stopped_after, **opts)
    run(squares, tmp_path / "parts", "--resume", **opts)
    assert final(tmp_path / "whole")["trainer"]["hooks"]["Averaging"]["updates"] == 6
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_average_starts_in_a_resumed_run(squares, tmp_path, monkeypatch):
    """From the weights of the checkpoint, also in its evaluation."""
    run(squares, tmp_path, **{"SOLVER.EMA_DECAY": 0.0, "SOLVER.MAX_ITER": 2})
    before = final(tmp_path)
    assert "Averaging" not in before["trainer"]["hooks"]
    seen = []

    def remember(cls, cfg, model):
        seen.append((cfg.OUTPUT_DIR, copy(model)))
        return {"bbox": {"AP": 0.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(remember))
    run(squares, tmp_path, "--resume", stop_after=2, **{"TEST.EVAL_PERIOD": 2})
    log = (tmp_path / "log.txt").read_text()
    assert "the average starts with its weights, at iteration 2" in log
    assert [folder for folder, _ in seen] == [str(tmp_path), str(tmp_path / "ema")]
    for _, weights in seen:
        assert_equal(weights, dict(before["model"]))


def test_no_average_without_decay(squares, tmp_path):
    """As Detectron2's trainer without evaluations."""
    run(squares, tmp_path, **{"DATASETS.TEST": (), "SOLVER.EMA_DECAY": 0.0})
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.endswith(".pth")} == {
        *(f"model_{i:07d}.pth" for i in (1, 3, 5)),
        "model_final.pth",
    }
    assert set(final(tmp_path)["trainer"]["hooks"]) == {"LRScheduler"}


def test_evaluations_are_of_raw_and_averaged_weights(squares, tmp_path, monkeypatch):
    """Evaluations are more frequent than the log. The model stays in training mode."""
    test, modes = Trainer.test.__func__, []

    def check(cls, cfg, model):
        results = test(cls, cfg, model)
        modes.append(model.training)
        return results

    monkeypatch.setattr(Trainer, "test", classmethod(check))
    run(squares, tmp_path, **{"TEST.EVAL_PERIOD": 2})
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    evaluated = {line["iteration"]: line for line in lines if "bbox/AP" in line}
    assert set(evaluated) == {1, 3, 6}  # Detectron2 increments the last one
    for line in evaluated.values():
        assert {"bbox_EMA/AP", "bbox_EMA/AP50", "bbox/AP50"} <= line.keys()
    assert any(line["bbox/AP"] != line["bbox_EMA/AP"] for line in evaluated.values())
    assert modes == [True, False] * 3
    for folder in ("inference", "ema/inference"):
        assert (tmp_path / folder / "short/coco_instances_results.json").is_file()
