"""Hooks that stop a training: NaN losses and weights, signals, a full disk."""

import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import LARGER, ROOT, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from trainings import SMALL

import atss.engine.run as way_in
from atss.data.mapper import Mapper
from atss.engine import Trainer
from atss.engine.all_gather import ScalarAllGather
from atss.engine.launch import launch
from atss.engine.watch import EXIT_PREEMPTED, Watch


@pytest.fixture
def start(squares, tmp_path):
    """start(*options, KEY=VALUE): train on the squares, in this process."""

    def run(*options, **opts):
        values = {
            "DATASETS.TRAIN": ("squares",),
            "DATASETS.TEST": (),
            "OUTPUT_DIR": tmp_path / "out",
        }
        values |= SMALL | {"SOLVER.CHECKPOINT_PERIOD": 2} | opts
        register = f"squares={squares}/annotations.json:{squares}/images"
        config = str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")
        argv = ["--config-file", config, "--register", register, *options]
        argv += [str(x) for item in values.items() for x in item]
        args = way_in.make_parser().parse_args(argv)
        launch(way_in.run, args, way_in.prepare(args))

    yield run
    if "squares" in DatasetCatalog:
        DatasetCatalog.remove("squares")
        MetadataCatalog.remove("squares")


@pytest.fixture
def at(monkeypatch):
    """at(iteration, act): call act(trainer) before an iteration."""

    def add(iteration, act):
        class Act(HookBase):
            def before_step(self):
                if self.trainer.iter == iteration:
                    act(self.trainer)

        build_hooks = Trainer.build_hooks
        monkeypatch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), Act()])

    return add


def last(tmp_path) -> tuple[str, int]:
    """Return the last checkpoint's name and iteration."""
    name = (tmp_path / "out/last_checkpoint").read_text()
    return name, torch.load(tmp_path / "out" / name, weights_only=False)["iteration"]


def sigterm(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_the_iteration_and_exits_with_75(start, at, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    at(2, sigterm)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == EXIT_PREEMPTED == 75
    assert last(tmp_path) == ("model_0000002.pth", 2)
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []
    at(3, lambda trainer: seen.append(trainer.start_iter))
    at(4, sigterm)
    with pytest.raises(SystemExit):
        start("--resume")
    assert seen == [3]
    assert last(tmp_path) == ("model_0000004.pth", 4)


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_other_signals_save_too(start, at, tmp_path, name, code, capfd):
    at(2, lambda _: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == code
    assert last(tmp_path) == ("model_0000002.pth", 2)
    assert f"{name}: stopped after iteration 2; --resume" in (tmp_path / "out/log.txt").read_text()
    assert ("a second ctrl-C ends at once" in capfd.readouterr().err) == (name == "SIGINT")


def test_ignored_signal_stays_ignored(start, at, tmp_path, monkeypatch):
    """For example SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at(2, lambda _: signal.raise_signal(signal.SIGHUP))
        start()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert last(tmp_path) == ("model_final.pth", 5)


def test_signal_before_mark_saved_ends_the_run(start, monkeypatch, tmp_path):
    """It came after the all-gather; no evaluation delays the exit."""
    mark_saved = Watch.mark_saved

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        mark_saved(self)

    monkeypatch.setattr(Watch, "mark_saved", signalled)
    with pytest.raises(SystemExit, match="75"):
        start()
    assert last(tmp_path) == ("model_0000001.pth", 1)


def test_process_sends_losses_wait_and_signal():
    exchange, losses = ScalarAllGather(lambda: 15), {"a": torch.ones(1, requires_grad=True)}
    losses["b"] = losses["c"] = torch.tensor(2.0)
    for waited in (0.0, 0.25):
        exchange.send(losses)
        assert not exchange.sent.requires_grad
        exchange.receive()
        assert exchange.rows == [[1.0, 2.0, 2.0, waited, 15.0]]
        assert exchange.losses(0) == {"a": 1.0, "b": 2.0, "c": 2.0}
        assert exchange.stop_signal == 15
        with EventStorage():
            exchange.write(0.25)


def test_process_receives_the_rows_of_all(monkeypatch):
    def all_gather(rows, own):
        for i, row in enumerate(rows):
            row.copy_(own + i)

    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    exchange = ScalarAllGather(lambda: 0)
    exchange.send({"a": torch.tensor(2.0)})
    exchange.receive()
    assert exchange.rows == [[2, 0, 0], [3, 1, 1]]


def test_longest_wait_for_images_is_logged(monkeypatch):
    """This process's wait of this iteration, others' waits of the iteration before."""
    exchange = ScalarAllGather(lambda: 0)
    exchange.names, exchange.rows = ["loss"], [[1.0, 0.875, 0], [3.0, 0.75, 0], [2.0, 0.25, 0]]
    with EventStorage() as storage:
        monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
        exchange.write(0.125)
        assert not storage.latest()
        monkeypatch.undo()
        exchange.write(0.125)
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest == {"data_time": 0.75, "loss": 2, "total_loss": 2}


@pytest.mark.parametrize(
    ("numbers", "decides"),
    [([0, 0], 0), ([0, 15], 15), ([10, 0], 10), ([15, 2], 2), ([2, 15], 2)],
)
def test_signal_of_any_process_decides(numbers, decides):
    """Ctrl-C decides over other signals, which a launcher relays."""
    exchange = ScalarAllGather(lambda: 0)
    exchange.rows = [[1.0, 0.0, float(number)] for number in numbers]
    assert exchange.stop_signal == decides


def test_iterations_are_profiled(start, tmp_path):
    start(**{"SOLVER.PROFILE": "[1, 2]", "SOLVER.MAX_ITER": 4})
    folders = sorted(x.name for x in (tmp_path / "out/log").iterdir())
    assert folders == ["profiler-tensorboard-iter1", "profiler-tensorboard-iter2"]
    for wrong in ("[2, 1]", "[1]", "[-1, 1]"):
        with pytest.raises(ValueError, match=r"^SOLVER.PROFILE must be \[first, last\] iteration"):
            start(**{"SOLVER.PROFILE": wrong})


def test_sigterm_stops_a_custom_run_step(start, at, monkeypatch, tmp_path):
    """The step calls neither the trainer's hooks nor its log."""

    def run_step(self):
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()

    monkeypatch.setattr(Trainer, "run_step", run_step)
    at(2, sigterm)
    with pytest.raises(SystemExit, match="75"):
        start()
    assert last(tmp_path) == ("model_0000002.pth", 2)


def test_sigterm_in_last_iteration_saves_the_final_model(start, at, tmp_path):
    at(5, sigterm)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == EXIT_PREEMPTED
    assert last(tmp_path) == ("model_final.pth", 5)


def test_sigterm_ends_an_evaluation_after_a_checkpoint(start, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "test", sigterm)
    with pytest.raises(SystemExit) as stop:
        start(**{"TEST.EVAL_PERIOD": 2})
    assert stop.value.code == EXIT_PREEMPTED
    assert last(tmp_path) == ("model_0000001.pth", 1)


def test_sigterm_in_an_evaluation_waits_for_a_checkpoint(start, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "test", lambda *_: sigterm() or {})
    with pytest.raises(SystemExit) as stop:
        start(**{"TEST.EVAL_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 4})
    assert stop.value.code == EXIT_PREEMPTED
    assert last(tmp_path) == ("model_0000001.pth", 1)


def test_sigterm_after_last_iteration_skips_evaluation(start, monkeypatch, tmp_path):
    evaluated = []
    monkeypatch.setattr(Trainer, "test", lambda *_: evaluated.append(1) or {})
    after_train = Trainer.after_train

    def signalled(self):
        with pytest.raises(SystemExit):
            self.preemption.watch._handle(signal.SIGTERM, None)
        after_train(self)
        raise SystemExit(EXIT_PREEMPTED)

    monkeypatch.setattr(Trainer, "after_train", signalled)
    with pytest.raises(SystemExit):
        start(**{"DATASETS.TEST": ("squares",)})
    assert not evaluated
    assert last(tmp_path) == ("model_final.pth", 5)
    monkeypatch.setattr(Trainer, "after_train", after_train)
    start("--resume", **{"DATASETS.TEST": ("squares",)})
    assert evaluated


def test_nan_loss_is_reported_with_its_images(start, monkeypatch, tmp_path):
    """Images are infinite from iteration 4 on. The checkpoint of iteration 3 has given no finite
    losses yet."""
    seen = []

    class Blinding(Mapper):
        def __call__(self, record):
            mapped = super().__call__(record)
            seen.append(mapped["file_name"])
            if len(seen) > 8:
                mapped["image"] = mapped["image"].float() + torch.inf
            return mapped

    monkeypatch.setattr("atss.engine.trainer.Mapper", Blinding)
    with pytest.raises(SystemExit) as stop:
        start()
    sentence = stop.value.code
    assert sentence.startswith("error: loss_cls is NaN")
    for name in seen[8:10]:
        assert name in sentence
    assert sentence.endswith(f"the last good checkpoint is {tmp_path}/out/model_0000001.pth")
    assert "\n" not in sentence
    assert last(tmp_path) == ("model_0000003.pth", 3)


def test_infinite_weights_are_not_saved(start, at, tmp_path):
    """The gradients of iteration 3 are infinite, its losses are finite."""

    def poison(trainer):
        trainer.model.head.cls_score.weight.register_hook(lambda gradient: gradient + torch.inf)

    at(3, poison)
    with pytest.raises(
        SystemExit, match="error: weights are NaN or infinite after iteration 3"
    ) as e:
        start()
    assert str(e.value).endswith(f"the last good checkpoint is {tmp_path}/out/model_0000001.pth")
    assert last(tmp_path) == ("model_0000001.pth", 1)
    assert not (tmp_path / "out/model_0000003.pth").exists()


def test_checkpoint_of_another_run_is_not_good(start, at, tmp_path):
    """Neither in a new run nor in one resumed from an earlier iteration. The checkpoint from which
    a run is resumed is good."""
    keep_all = {"SOLVER.CHECKPOINTS_TO_KEEP": 0}
    start(**keep_all)
    out = tmp_path / "out"
    (out / "last_checkpoint").unlink()
    (out / "model_final.pth").unlink()

    def poison(trainer):
        trainer.model.head.cls_score.weight.register_hook(lambda gradient: gradient + torch.inf)

    at(5, poison)
    never = {"SOLVER.CHECKPOINT_PERIOD": 100, **keep_all}
    with pytest.raises(SystemExit, match=r"this run has no earlier checkpoint$"):
        start(**never)
    (out / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(SystemExit, match=r"good checkpoint is .*/model_0000001\.pth$"):
        start("--resume", **never)
    (out / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(SystemExit, match=r"good checkpoint is .*/model_0000003\.pth$"):
        start("--resume", **keep_all)


def test_exploding_learning_rate_is_reported(start):
    with pytest.raises(SystemExit, match=r"error: .* (NaN|inf|infinite) (at|after) iteration \d"):
        start(**{"SOLVER.BASE_LR": 1e30})


def test_full_disk_is_reported_before_training(start, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(
        SystemExit, match=rf"error: OUTPUT_DIR {tmp_path}/out has 1 MB free, but 3 "
    ):
        start()
    assert not list((tmp_path / "out").glob("model_*"))


def test_free_space_check_uses_the_checkpoint_size(start, monkeypatch, tmp_path):
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(SystemExit, match=r"3 checkpoints take (\d+) MB") as stop:
        start(**LARGER)
    megabytes = int(str(stop.value).split()[-2])
    disk.free = (megabytes + 1) * 10**6
    start(**LARGER, **{"SOLVER.MAX_ITER": 1})
    size = (tmp_path / "out/model_final.pth").stat().st_size
    assert size / 1e6 == pytest.approx(megabytes / 3, rel=0.02)


@pytest.mark.parametrize(
    ("keep", "there", "free"),
    [
        (2, [], 3),
        (2, ["model_0000001", "model_0000003"], 1),
        (2, ["model_0000003"], 2),
        # Excess checkpoints are deleted only after a new one is written.
        (2, [f"model_000000{i}" for i in range(5)], 1),
        # Files of another run stay.
        (2, ["model_0000001", "model_0000010", "other"], 2),
        (0, ["model_0000001", "model_0000003"], 2),
        (0, ["model_0000003", "model_final"], 1),
    ],
)
def test_replaced_files_need_no_free_space(monkeypatch, tmp_path, keep, there, free):
    """Sizes are in checkpoints."""
    model = torch.nn.Linear(1000, 1000)
    size = 8_008_000  # weights and momenta
    for name in there:
        with open(tmp_path / f"{name}.pth", "wb") as file:
            file.truncate(size)
    disk = SimpleNamespace(free=free * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    opts = {"OUTPUT_DIR": str(tmp_path), "SOLVER.CHECKPOINTS_TO_KEEP": keep, "SOLVER.MAX_ITER": 10}
    cfg = make_cfg(*(x for item in opts.items() for x in item), "SOLVER.EMA_DECAY", 0.0)
    way_in.check_free_space(cfg, model)
    disk.free -= 1
    with pytest.raises(ValueError, match=r"MB free, but .* take"):
        way_in.check_free_space(cfg, model)


def test_failed_write_names_the_folder(start, at, tmp_path):
    """Files may grow to 1 MB from iteration 3 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard)))
    try:
        with pytest.raises(SystemExit) as stop:
            start(**LARGER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == f"error: cannot write into OUTPUT_DIR {tmp_path}/out: File too large"
    assert last(tmp_path) == ("model_0000001.pth", 1)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_unwritable_folder_is_refused(start, tmp_path, below):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        ValueError, match=rf"^cannot write into OUTPUT_DIR {tmp_path}/out{below}: Not a"
    ):
        start(OUTPUT_DIR=f"{tmp_path}/out{below}")
