"""The best weights and early stopping, also over interruptions."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import LARGER, make_cfg
from detectron2.engine import hooks
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from trainings import arguments, assert_equal, final, run

import atss.engine.run as way_in
from atss.checkpoints import TrainingCheckpointer
from atss.config import load_config
from atss.engine import Trainer
from atss.engine.best import ABOUT, Best, best_metric
from atss.engine.solver import MOMENTS
from atss.engine.watch import EXIT_PREEMPTED
from atss.predictor import Predictor

EVALUATED = {"TEST.EVAL_PERIOD": 2}


def best(output):
    return torch.load(output / "model_best.pth", weights_only=True)


def log(output):
    return (output / "log.txt").read_text()


def metrics(output):
    """Return {iteration: line} of the evaluations."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line for line in lines if "bbox/AP" in line}


@pytest.fixture
def by_weights(monkeypatch):
    """Replace evaluations by a function of the weights. Return the list of evaluated weights."""
    seen = []

    def test(cls, cfg, model):
        total = sum(x.double().abs().sum().item() for x in model.parameters())
        seen.append(total)
        return {"bbox": {"AP": 100 * math.modf(1e4 * total)[0], "AP50": -total}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    return seen


def scripted(monkeypatch, *values):
    """Replace the APs of evaluations by a list. Return the remaining list."""
    left = list(values)
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *_: {"bbox": {"AP": left.pop(0), "AP50": 0.0}})
    )
    return left


# ------------------------------------------------------------------------------------------------
# The best record
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path):
    return Best("bbox/AP", 0, TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path)))


def evaluated(*values, metric="AP"):
    """Return models whose weights and results are the values."""
    models = [nn.Linear(1, 1) for _ in values]
    for model, value in zip(models, values, strict=True):
        nn.init.constant_(model.weight, value)
    return [(m, {"bbox": {metric: v, "APs": -v}}) for m, v in zip(models, values, strict=True)]


def test_greatest_value_is_best_and_ties_keep_the_first(keeper, tmp_path):
    kept = []
    for i, values in enumerate([(1, 2), (3, 3), (3, 3), (0, 1), (4, 5)]):
        keeper.update(evaluated(*values), 10 * i)
        found = best(tmp_path)
        assert found["model"]["weight"].item() == found["value"]
        kept.append((found["value"], found["iteration"], found["averaged"]))
    first, second, last = (2.0, 0, True), (3.0, 10, False), (5.0, 40, True)
    assert kept == [first, second, second, second, last]
    assert found["metric"] == "bbox/AP"
    assert sorted(os.listdir(tmp_path)) == ["model_best.pth"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_best(keeper, tmp_path, value):
    keeper.update(evaluated(value, value), 0)
    assert not (tmp_path / "model_best.pth").exists()
    keeper.update(evaluated(-1.0, value), 1)
    assert best(tmp_path)["value"] == -1.0
    keeper.update(evaluated(value), 2)
    assert best(tmp_path)["iteration"] == 1
    assert keeper.record.since == 1


def test_unknown_metric_is_refused(keeper):
    results = {"bbox": {"AP50": 1.0, "APl": 2.0, "AP-orange": 3.0}}
    with pytest.raises(
        ValueError,
        match=r"^unknown TEST.BEST_METRIC 'bbox/AP': choose from \['bbox/AP50', 'bbox/APl'\]$",
    ):
        keeper.update([(nn.Linear(1, 1), results)], 0)


def results(ap):
    return {"bbox": {"AP": ap}}


def test_patience_starts_with_the_first_number(tmp_path):
    model = nn.Linear(1, 1)
    keeper = Best("bbox/AP", 2, TrainingCheckpointer(model, str(tmp_path)))
    exhausted = []
    for i, ap in enumerate([math.nan, math.nan, math.nan, 3.0, 2.0, 1.0]):
        keeper.update([(model, results(ap))], i)
        exhausted.append(keeper.exhausted)
    assert exhausted == [False] * 5 + [True]


def test_evaluation_without_metrics_saves_no_best(tmp_path):
    """Detections on data without annotations are only written."""
    keeper = Best("bbox/AP", 1, TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path)))
    keeper.update([(nn.Linear(1, 1), {})], 0)
    assert not keeper.exhausted
    assert not (tmp_path / "model_best.pth").exists()


class Nothing:
    """A stand-in for the trainer."""

    def state_dict(self):
        return {"iteration": 5}

    def load_state_dict(self, state):
        pass


def resumed(folder, standing=None, metric="bbox/AP", data=("a",)):
    """Return the hook of a run resumed from the checkpoint in a folder."""
    checkpointer = TrainingCheckpointer(nn.Linear(1, 1), str(folder), trainer=Nothing())
    checkpointer.resume_or_load("", resume=True)
    keeper = Best(metric, 0, checkpointer, data)
    if standing:
        keeper.load_state_dict(standing)
    keeper.adopt()
    return keeper


@pytest.fixture
def trained(tmp_path):
    """Return the hook of a run with a checkpoint of iteration 5, before its evaluation."""
    model = nn.Linear(1, 1)
    checkpointer = TrainingCheckpointer(model, str(tmp_path), trainer=Nothing())
    keeper = Best("bbox/AP", 0, checkpointer, ("a",))
    keeper.update([(model, results(20.0))], 2)
    checkpointer.save("model_0000005", iteration=5)
    return keeper


@pytest.mark.parametrize("iteration", [5, 8])
def test_better_weights_after_the_checkpoint_are_adopted(trained, tmp_path, iteration):
    before = trained.state_dict()
    trained.update(evaluated(50.0), iteration)
    after = resumed(tmp_path, before)
    after.update(evaluated(40.0), 5)
    assert (best(tmp_path)["value"], best(tmp_path)["iteration"]) == (50.0, iteration)
    for other in (resumed(tmp_path, metric="bbox/AP50"), resumed(tmp_path, data=("b",))):
        assert other.record.iteration == -1


def test_best_weights_of_another_run_are_not_adopted(trained, tmp_path):
    """The file is older than the checkpoint, which does not contain its record."""
    os.utime(tmp_path / "model_best.pth", (1, 1))
    assert resumed(tmp_path).record.iteration == -1


def test_last_weights_without_a_number_are_not_adopted(trained, tmp_path):
    about = {"metric": "bbox/AP", "data": "a", "value": -math.inf, "iteration": 5}
    trained.checkpointer.save_weights("model_best", nn.Linear(1, 1), **about, averaged=False)
    assert resumed(tmp_path).record.iteration == -1


def remove(file):
    file.unlink()


def zero(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(torch.tensor(70.0).numpy().tobytes(), bytes(4)))


@pytest.mark.parametrize("damage", [remove, zero])
def test_lost_best_weights_start_a_new_search(trained, tmp_path, caplog, damage):
    trained.update(evaluated(70.0), 5)
    damage(tmp_path / "model_best.pth")
    after = resumed(tmp_path, trained.state_dict())
    assert "model_best.pth" in caplog.text
    assert "the search for the best starts anew" in caplog.text
    after.update(evaluated(1.0), 9)
    assert best(tmp_path)["value"] == 1.0


def test_renumbered_iterations_keep_their_order(keeper):
    """Ten iterations become five. The evaluation of the last one does not count twice."""
    keeper.patience = 2
    for i, value in ((0, 5.0), (7, 9.0), (9, 1.0)):
        keeper.update(evaluated(value), i)
    keeper.renumber(10, 5)
    assert (keeper.record.iteration, keeper.record.evaluated) == (3, 4)
    keeper.update(evaluated(1.0), 4)
    assert not keeper.exhausted
    keeper.update(evaluated(1.0), 5)
    assert keeper.exhausted


def test_other_test_sets_start_a_new_search(tmp_path, caplog):
    model = nn.Linear(1, 1)
    first = Best("bbox/AP", 0, TrainingCheckpointer(model, str(tmp_path)), ("a",))
    first.update([(model, results(50.0))], 5)
    other = Best("bbox/AP", 0, TrainingCheckpointer(model, str(tmp_path)), ("b",))
    other.load_state_dict(first.state_dict())
    assert other.record.iteration == -1
    assert "The checkpoint has the best weights by bbox/AP on a" in caplog.text


def test_metric_of_one_of_several_test_sets(tmp_path):
    keeper = Best("b/bbox/AP", 0, TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path)))
    results = {"a": {"bbox": {"AP": 9.0}}, "b": {"bbox": {"AP": 4.0}}}
    keeper.update([(nn.Linear(1, 1), results)], 0)
    assert best(tmp_path)["value"] == 4.0


# ------------------------------------------------------------------------------------------------
# Whole trainings
# ------------------------------------------------------------------------------------------------


def test_saved_best_weights_give_the_same_value(squares, tmp_path):
    """With --eval-only; the predictor loads them, too."""
    run(squares, tmp_path, **EVALUATED, **{"TEST.BEST_METRIC": "bbox/AP50"})
    found = best(tmp_path)
    values = [line[f"bbox{x}/AP50"] for line in metrics(tmp_path).values() for x in ("", "_EMA")]
    assert found["value"] == max(values)
    assert set(found) == {"model", "class_names", "trained_with", *ABOUT}
    kind = "averaged weights (EMA)" if found["averaged"] else "weights"
    assert (
        f"The best weights are in {tmp_path}/model_best.pth (bbox/AP50 {found['value']:.3f}, with "
        f"the {kind} of iteration {found['iteration']}): pass this file as MODEL.WEIGHTS"
    ) in log(tmp_path).splitlines()[-1]
    register = f"short={squares}/annotations.json:{squares}/images"
    opts = {"MODEL.WEIGHTS": tmp_path / "model_best.pth", "DATASETS.TEST": ("short",)}
    opts |= {"INPUT.MIN_SIZE_TEST": 64, "MODEL.ATSS.SCORE_THRESH_TEST": 0.0}
    opts |= {"DATASETS.TRAIN": ()}
    argv = arguments(register, tmp_path / "again", "--eval-only", **opts)
    args = way_in.make_parser().parse_args(argv)
    assert way_in.run(args, way_in.prepare(args))["bbox"]["AP50"] == found["value"]
    predictor = Predictor(tmp_path / "config.yaml", tmp_path / "model_best.pth")
    assert_equal(dict(predictor.model.state_dict()), dict(found["model"]))


@pytest.mark.parametrize("checkpoints", [2, 3])
def test_interrupted_run_has_the_same_best(squares, tmp_path, by_weights, checkpoints):
    """Resumed after iteration 3, before its evaluation, or after 2."""
    opts = EVALUATED | {"SOLVER.MAX_ITER": 8, "SOLVER.CHECKPOINT_PERIOD": checkpoints}
    run(squares, tmp_path / "whole", **opts)
    run(squares, tmp_path / "parts", stop_after=4, **opts)
    run(squares, tmp_path / "parts", "--resume", **opts)
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
    assert_equal(best(tmp_path / "parts"), best(tmp_path / "whole"))
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert set(whole) == set(parts) == {1, 3, 5, 8}
    for iteration, line in whole.items():
        for name in ("bbox/AP", "bbox_EMA/AP"):
            assert line.get(name) == parts[iteration].get(name)
    assert (tmp_path / "parts/last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(("peak", "checkpoints"), [(1, 2), (3, 2), (3, 3), (5, 2)], ids=str)
def test_best_survives_an_interruption(squares, tmp_path, monkeypatch, peak, checkpoints):
    """The best evaluation is before the stop, at the checkpoint, or later. A repeated evaluation
    gives another value, as on a GPU."""
    values = {1: 20.0, 3: 20.0, 5: 20.0, 7: 20.0} | {peak: 50.0}

    def test(self, cfg, model):
        iteration = min(self.storage.iter, 7)
        value, values[iteration] = values[iteration], min(values[iteration], 40.0)
        return {"bbox": {"AP": value}}

    monkeypatch.setattr(Trainer, "test", test)
    opts = EVALUATED | {"SOLVER.EMA_DECAY": 0.0, "SOLVER.MAX_ITER": 8}
    opts |= {"SOLVER.CHECKPOINT_PERIOD": checkpoints}
    run(squares, tmp_path, stop_after=4, **opts)
    run(squares, tmp_path, "--resume", **opts)
    found = best(tmp_path)
    assert (found["value"], found["iteration"]) == (50.0, peak)


def test_best_weights_are_not_resumed_from(squares, tmp_path, by_weights, monkeypatch):
    tagged, tag = [], TrainingCheckpointer.tag_last_checkpoint
    monkeypatch.setattr(
        TrainingCheckpointer,
        "tag_last_checkpoint",
        lambda self, name: (tagged.append(name), tag(self, name)),
    )
    run(squares, tmp_path, **EVALUATED)
    assert "model_best.pth" not in tagged
    for path in tmp_path.glob("model_[0f]*.pth"):
        path.unlink()
    with pytest.raises(OSError, match=r"model_final.pth is missing .*, and no other checkpoint"):
        run(squares, tmp_path, "--resume", **EVALUATED)


def test_broken_weights_are_not_evaluated(squares, tmp_path, monkeypatch):
    """They could count as the best."""
    step = Trainer.run_step

    def spoil(self):
        step(self)
        if self.iter == 1:
            torch.nn.init.constant_(next(self.model.parameters()), math.nan)

    monkeypatch.setattr(Trainer, "run_step", spoil)
    left = scripted(monkeypatch, 50.0)
    with pytest.raises(FloatingPointError, match="weights are NaN or infinite after iteration 1"):
        run(squares, tmp_path, **EVALUATED | {"SOLVER.CHECKPOINT_PERIOD": 5})
    assert left == [50.0]
    assert not (tmp_path / "model_best.pth").exists()


def test_evaluation_is_written_once(squares, tmp_path, by_weights, monkeypatch):
    """Also in iterations in which all metrics are written."""
    written = []

    class Writer(EventWriter):
        def write(self):
            written.append(get_event_storage().iter)

    build_hooks = Trainer.build_hooks

    def every_third(self):
        built = build_hooks(self)
        next(x for x in built if isinstance(x, hooks.PeriodicWriter))._period = 3
        return built

    monkeypatch.setattr(Trainer, "build_hooks", every_third)
    monkeypatch.setattr(Trainer, "build_writers", lambda self: [Writer()])
    run(squares, tmp_path, **EVALUATED | {"SOLVER.MAX_ITER": 8, "SOLVER.EMA_DECAY": 0.0})
    # Evaluated in 1, 3, 5 and at the end (8); written in 2, 5, 7 and at the end.
    assert written == [1, 2, 3, 5, 7, 8]


def test_other_metric_starts_a_new_search(squares, tmp_path, by_weights):
    run(squares, tmp_path, stop_after=4, **EVALUATED)
    run(squares, tmp_path, "--resume", **EVALUATED | {"TEST.BEST_METRIC": "bbox/AP50"})
    assert "The checkpoint has the best weights by bbox/AP on " in log(tmp_path)
    assert best(tmp_path)["metric"] == "bbox/AP50"
    lines = [line for iteration, line in metrics(tmp_path).items() if iteration >= 3]
    values = [line[f"bbox{x}/AP50"] for line in lines for x in ("", "_EMA")]
    assert best(tmp_path)["value"] == max(values)


def test_no_best_weights_without_a_metric(squares, tmp_path, by_weights):
    run(squares, tmp_path, **EVALUATED | {"TEST.BEST_METRIC": ""})
    assert len(by_weights) == 6
    assert not (tmp_path / "model_best.pth").exists()
    last = log(tmp_path).splitlines()[-1]
    assert f"The last weights are in {tmp_path}/model_final.pth: pass this file as MODEL" in last


def test_last_weights_are_saved_without_a_number(squares, tmp_path, monkeypatch):
    """Any number in a longer run replaces them."""
    opts = EVALUATED | {"SOLVER.EMA_DECAY": 0.0, "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 5}
    scripted(monkeypatch, math.nan)
    run(squares, tmp_path, **opts)
    found, last = best(tmp_path), log(tmp_path).splitlines()[-1]
    assert_equal(found["model"], final(tmp_path)["model"])
    assert (found["value"], found["iteration"]) == (-math.inf, 1)
    assert "No evaluation gave a number for bbox/AP (no detections?): the training was" in last
    assert f"the last weights are in {tmp_path}/model_best.pth: pass this file as MODEL" in last
    scripted(monkeypatch, math.nan, 0.0)
    run(squares, tmp_path, "--resume", **opts | {"SOLVER.MAX_ITER": 6})
    assert (best(tmp_path)["value"], best(tmp_path)["iteration"]) == (0.0, 5)


def test_sigterm_ends_the_evaluation_of_a_resumed_run(squares, tmp_path, by_weights, monkeypatch):
    run(squares, tmp_path, stop_after=2, **EVALUATED)
    name = (tmp_path / "last_checkpoint").read_text()
    monkeypatch.setattr(Trainer, "test", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run(squares, tmp_path, "--resume", **EVALUATED)
    assert stop.value.code == EXIT_PREEMPTED
    assert (tmp_path / "last_checkpoint").read_text() == name == "model_0000001.pth"


def test_sigterm_in_last_iteration_defers_its_evaluation(
    squares, tmp_path, by_weights, monkeypatch
):
    step = Trainer.run_step

    def terminate_last(self):
        if self.iter == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", terminate_last)
        with pytest.raises(SystemExit) as stop:
            run(squares, tmp_path, **EVALUATED)
    assert stop.value.code == EXIT_PREEMPTED
    assert len(by_weights) == 4  # of iterations 1 and 3
    run(squares, tmp_path, "--resume", **EVALUATED)
    assert len(by_weights) == 6


# ------------------------------------------------------------------------------------------------
# Early stopping
# ------------------------------------------------------------------------------------------------

EARLY = {
    "TEST.EVAL_PERIOD": 1,
    "TEST.PATIENCE": 2,
    "SOLVER.EMA_DECAY": 0.0,
    "SOLVER.CHECKPOINT_PERIOD": 2,
}


def test_training_ends_when_patience_is_exhausted(squares, tmp_path, monkeypatch):
    left = scripted(monkeypatch, 1.0, 3.0, 2.0, 4.0, 4.0, math.nan, 9.0)
    losses = run(squares, tmp_path, **EARLY | {"SOLVER.MAX_ITER": 50})
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    assert left == [9.0]  # no second evaluation
    assert best(tmp_path)["iteration"] == 3
    assert final(tmp_path)["iteration"] == final(tmp_path)["trainer"]["iteration"] == 5
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    text = log(tmp_path)
    assert (
        "Training ends early, with iteration 5: 2 evaluations gave no better bbox/AP than 4.000, "
        "with the weights of iteration 3 (TEST.PATIENCE 2)"
    ) in text
    assert "The best weights are in" in text
    assert "Exception during training" not in text
    assert set(metrics(tmp_path)) == {0, 1, 2, 3, 4, 5}


def test_run_that_ended_early_does_not_continue(squares, tmp_path, monkeypatch):
    opts = EARLY | {"SOLVER.MAX_ITER": 50}
    scripted(monkeypatch, 5.0, 4.0, 3.0)
    run(squares, tmp_path, **opts)
    before, best_before = final(tmp_path), best(tmp_path)
    left = scripted(monkeypatch, 9.0, 9.0)  # a repeated evaluation does not count again
    assert run(squares, tmp_path, "--resume", **opts) == {}
    assert left == [9.0]
    assert_equal(final(tmp_path), before)
    assert_equal(best(tmp_path), best_before)
    scripted(monkeypatch, 4.0, 6.0, *[0.0] * 4)
    more = run(squares, tmp_path, "--resume", **opts | {"TEST.PATIENCE": 3})
    assert list(more) == [3, 4, 5, 6]
    assert best(tmp_path)["iteration"] == 3


class Stop(BaseException):
    """Stop like a kill."""


@pytest.mark.parametrize("stopped", ["evaluate", "_end_early"])
def test_interrupted_run_ends_in_the_same_iteration(squares, tmp_path, monkeypatch, stopped):
    """Interrupted before the evaluation that ends the run, or just after it."""
    opts = EARLY | {"SOLVER.MAX_ITER": 50, "TEST.EVAL_PERIOD": 2}
    scripted(monkeypatch, 3.0, 2.0, 1.0)
    assert list(run(squares, tmp_path / "whole", **opts)) == [0, 1, 2, 3, 4, 5]
    act = getattr(Trainer, stopped)

    def stop(self, *arguments):
        if self.iter == 5:
            raise Stop
        return act(self, *arguments)

    scripted(monkeypatch, 3.0, 2.0, 1.0)
    monkeypatch.setattr(Trainer, stopped, stop)
    with pytest.raises(Stop):
        run(squares, tmp_path / "parts", **opts)
    assert (tmp_path / "parts/last_checkpoint").read_text() == "model_0000005.pth"
    monkeypatch.setattr(Trainer, stopped, act)
    scripted(monkeypatch, 1.0)
    assert run(squares, tmp_path / "parts", "--resume", **opts) == {}
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
    assert_equal(best(tmp_path / "parts"), best(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("first", "iterations", "stop_after", "then"),
    [
        # The best is of the last iteration of a run that is prolonged.
        ([20.0, 10.0, 50.0], 5, None, [30.0, 30.0, 30.0]),
        # The best is of iteration 3, whose evaluation is repeated after the checkpoint of 2.
        ([20.0, 50.0], 50, 4, [40.0, 30.0, 30.0, 30.0]),
    ],
)
def test_patience_counts_from_the_best(
    squares, tmp_path, monkeypatch, first, iterations, stop_after, then
):
    opts = EARLY | {"TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 3}
    scripted(monkeypatch, *first)
    run(squares, tmp_path, stop_after=stop_after, **opts | {"SOLVER.MAX_ITER": iterations})
    left = scripted(monkeypatch, *then)
    after = run(squares, tmp_path, "--resume", **opts | {"SOLVER.MAX_ITER": 50})
    assert max(after) == 7
    assert left == [30.0]
    assert best(tmp_path)["value"] == 50.0


def test_early_end_is_tested_at_several_scales(squares, tmp_path, monkeypatch):
    opts = EARLY | {"TEST.PATIENCE": 1, "TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64,)}
    opts |= {"MODEL.ATSS.TTA.SIZE_RANGES": [[0, 1000]]}
    scripted(monkeypatch, 2.0, 1.0, 3.0)
    assert list(run(squares, tmp_path, **opts)) == [0, 1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["bbox_TTA/AP"] for line in lines if "bbox_TTA/AP" in line] == [3.0]


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        ({"TEST.PATIENCE": 3}, "TEST.PATIENCE 3 ends training by its evaluations: it needs TEST"),
        ({"TEST.PATIENCE": 3, "TEST.EVAL_PERIOD": 2, "DATASETS.TEST": ()}, "TEST.PATIENCE 3 ends"),
        ({"TEST.PATIENCE": 3, "TEST.EVAL_PERIOD": 2, "TEST.BEST_METRIC": ""}, "TEST.PATIENCE 3"),
        ({"TEST.PATIENCE": -1}, "TEST.PATIENCE must be >= 0, got -1"),
        ({"SOLVER.EMA_DECAY": 1.0}, "SOLVER.EMA_DECAY must be between 0 and 0.999999, got 1.0"),
    ],
)
def test_impossible_settings_are_refused_before_training(squares, tmp_path, opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(squares, tmp_path, **{"SOLVER.EMA_DECAY": 0.0} | opts)


def test_first_of_several_test_sets_decides():
    cfg = make_cfg("DATASETS.TEST", ("a", "b"), "TEST.EVAL_PERIOD", 2)
    assert best_metric(cfg) == "a/bbox/AP"
    cfg.TEST.BEST_METRIC = "b/bbox/AP50"
    assert best_metric(cfg) == "b/bbox/AP50"
    cfg.DATASETS.TEST = ("b",)
    cfg.TEST.BEST_METRIC = "bbox/AP"
    assert best_metric(cfg) == "bbox/AP"


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_free_space_counts_averages_and_best_weights(squares, tmp_path, monkeypatch, optimizer):
    opts = LARGER | {"SOLVER.MAX_ITER": 2, "SOLVER.OPTIMIZER": optimizer}
    run(squares, tmp_path / "out", **EVALUATED | opts)
    files = ("final", "final", "best", "final_EMA")  # for two checkpoints
    size = sum((tmp_path / f"out/model_{x}.pth").stat().st_size for x in files)
    config = tmp_path / "out/config.yaml"
    model = Predictor(config, tmp_path / "out/model_best.pth").model
    cfg = load_config(config, opts=["OUTPUT_DIR", str(tmp_path)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="2 checkpoints and the best weights take") as error:
        way_in.check_free_space(cfg, model)
    assert size / 1e6 == pytest.approx(int(str(error.value).split()[-2]), rel=0.05)
