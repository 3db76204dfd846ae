"""Runs in Weights & Biases and MLflow, in folders of this machine, and in services of users."""

import json
import math
import os
import struct
from collections import defaultdict
from contextlib import suppress

import pytest
from conftest import make_cfg
from detectron2.utils.events import EventStorage
from trainings import SMALL, arguments, train

import atss.engine.run as way_in
from atss.engine import Trainer
from atss.engine.loggers import LOGGERS, RunWriter, build_run_writers, tracked
from atss.errors import UserError

SHORT = SMALL | {"DATASETS.TRAIN": ("squares",), "DATASETS.TEST": ("squares",)}


@pytest.fixture(autouse=True)
def local(monkeypatch, tmp_path):
    """Keep both services on this machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


class Recording:
    """Service that records its calls."""

    def __init__(self):
        self.calls = []

    def start(self, cfg, name, run_id):
        self.calls.append(("start", name, run_id))
        return run_id or f"run{len(self.calls)}"

    def log(self, values, iteration):
        self.calls.append(("log", iteration, values))

    def end(self, state):
        self.calls.append(("end", state))


@pytest.fixture
def register(monkeypatch):
    """register(name, service class), until the test ends."""
    monkeypatch.setattr(LOGGERS, "entries", dict(LOGGERS.entries))
    return lambda name, service: LOGGERS.register(service, name=name)


@pytest.fixture
def recorded(register):
    """The services of class Recording, which SOLVER.LOGGERS calls "recording"."""
    made = []

    class Kept(Recording):
        def __init__(self):
            super().__init__()
            made.append(self)

    register("recording", Kept)
    return made


def run(squares, output, *options, stop_after=None, **opts):
    """Train on the squares, and return the losses by iteration."""
    source = f"squares={squares}/annotations.json:{squares}/images"
    return train(arguments(source, output, *options, **SHORT | opts), stop_after)


def writer(tmp_path, service, name="recording", **opts):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path), *(x for pair in opts.items() for x in pair))
    return RunWriter(name, service, cfg)


def write(run_writer, *steps):
    """Write after each step has put its scalars."""
    with EventStorage() as storage:
        for iteration, scalars in steps:
            storage.iter = iteration
            storage.put_scalars(**scalars, smoothing_hint=False)
            run_writer.write()


def resume(name, folder):
    """Interrupt a run and resume it with another rate. Yield its id after both."""
    folder.mkdir()
    for resumed, rate, outcome in ((False, 0.5, KeyboardInterrupt), (True, 0.125, None)):
        service = LOGGERS.get(name)()
        run_writer = writer(folder, service, name, **{"SOLVER.BASE_LR": rate})
        with suppress(KeyboardInterrupt), tracked([run_writer], resumed):
            write(run_writer, (3, {"loss_cls": 0.25, "bbox/AP-cat": math.nan}))
            if outcome:
                raise outcome
        yield (folder / f"{name}_run_id").read_text().strip()


# ------------------------------------------------------------------------------------------------
# Any service
# ------------------------------------------------------------------------------------------------


def test_training_is_logged_and_resumed_in_one_run(squares, tmp_path, recorded):
    logged = {"SOLVER.LOGGERS": ("recording",), "TEST.EVAL_PERIOD": 3}
    run(squares, tmp_path / "my run", stop_after=4, **logged)
    run(squares, tmp_path / "my run", "--resume", **logged)
    first, second = (x.calls for x in recorded if x.calls)
    assert (first[0], first[-1]) == (("start", "my run", ""), ("end", "interrupted"))
    assert (second[0], second[-1]) == (("start", "my run", "run1"), ("end", "finished"))
    values = {name: x for kind, *rest in second if kind == "log" for name, x in rest[1].items()}
    assert {"total_loss", "loss_cls", "lr", "bbox/AP", "bbox/AP-blue"} <= values.keys()
    assert "bbox/APl" not in values  # NaN: no large objects
    assert [call[1] for call in second if call[0] == "log"] == [2, 5, 6]


def test_new_training_does_not_continue_an_aborted_run(squares, tmp_path, recorded):
    for _ in range(2):  # without a checkpoint
        run(squares, tmp_path, stop_after=1, **{"SOLVER.LOGGERS": ("recording",)})
    assert [x.calls[0] for x in recorded if x.calls] == [("start", tmp_path.name, "")] * 2


def test_failed_training_fails_its_run(squares, tmp_path, recorded, monkeypatch):
    def fail(self):
        raise RuntimeError("broken")

    monkeypatch.setattr(Trainer, "run_step", fail)
    with pytest.raises(RuntimeError, match="broken"):
        run(squares, tmp_path, **{"SOLVER.LOGGERS": ("recording",)})
    assert recorded[-1].calls[-1] == ("end", "failed")


@pytest.mark.parametrize("step", ["log", "end"])
def test_broken_service_is_a_warning(step, tmp_path, caplog):
    def fail(self, *arguments):
        raise ConnectionError("server gone\nand more")

    service = type("Broken", (Recording,), {step: fail})()
    run_writer = writer(tmp_path, service)
    with tracked([run_writer], resumed=False):
        write(run_writer, (0, {"lr": 0.5}), (1, {"lr": 0.5}))
    (warning,) = (x.getMessage() for x in caplog.records if x.levelname == "WARNING")
    sentence = "SOLVER.LOGGERS 'recording' failed and gets nothing more from this run: server gone"
    assert warning == sentence


def test_service_that_cannot_start_stops_before_training(tmp_path):
    class Closed(Recording):
        def start(self, cfg, name, run_id):
            raise UserError("no key: log in first")

    (tmp_path / "closed_run_id").write_text("old\n")
    first, second = Recording(), writer(tmp_path, Closed(), "closed")
    sentence = r"LOGGERS 'closed' cannot start with the run id in .*closed_run_id: no key: log in"
    with pytest.raises(UserError, match=sentence), tracked([writer(tmp_path, first), second], True):
        pytest.fail("started")
    assert first.calls[-1] == ("end", "failed")


def test_scalars_are_written_once(tmp_path):
    service = Recording()
    run_writer = writer(tmp_path, service)
    with tracked([run_writer], resumed=False):
        write(run_writer, (0, {"lr": 0.5}), (0, {}), (3, {"lr": 0.25, "AP": math.nan}))
    assert service.calls[1:-1] == [("log", 0, {"lr": 0.5}), ("log", 3, {"lr": 0.25})]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ("tensorbord",),
            r"unknown SOLVER.LOGGERS 'tensorbord': .* \['mlflow', 'wandb'\]",
        ),
        (("absent",), "'absent' needs the package no_such_package, which is not installed: pip"),
        (("results",), "'results' needs the package folder_of_results, which is not installed"),
        (("twice", "twice"), "names twice twice"),
        (([],), r"unknown SOLVER.LOGGERS '\[\]'"),
    ],
)
def test_unusable_logger_is_named_before_training(names, sentence, register, tmp_path, monkeypatch):
    if names[0] != "tensorbord":
        register("absent", type("Absent", (Recording,), {"package": "no_such_package"}))
        register("results", type("Results", (Recording,), {"package": "folder_of_results"}))
        register("twice", Recording)
    (tmp_path / "folder_of_results").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = make_cfg()
    cfg.SOLVER.LOGGERS = names
    with pytest.raises(UserError, match=sentence):
        build_run_writers(cfg)


def test_unknown_logger_is_refused_by_the_command(squares, tmp_path):
    source = f"squares={squares}/annotations.json:{squares}/images"
    opts = SHORT | {"SOLVER.LOGGERS": ("tensorbord",)}
    args = way_in.make_parser().parse_args(arguments(source, tmp_path, **opts))
    with pytest.raises(UserError, match=r"unknown SOLVER\.LOGGERS 'tensorbord'"):
        way_in.prepare(args)
    args.eval_only = True
    way_in.prepare(args)  # evaluation has no loggers


# ------------------------------------------------------------------------------------------------
# Weights & Biases
# ------------------------------------------------------------------------------------------------


def offline_records(file):
    """Yield the records of a run that wandb wrote offline, a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, data = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        data += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(data)
            data = b""


def test_wandb_has_scalars_config_name_and_state(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install -e '.[wandb]'")
    assert len({*resume("wandb", tmp_path / "my run")}) == 1
    wandb.teardown()  # its process may still write
    files = sorted((tmp_path / "my run").glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    run_id = (tmp_path / "my run" / "wandb_run_id").read_text().strip()
    assert [x.name for x in files] == [f"run-{run_id}.wandb"] * 2
    seen = []
    for file in files:
        kinds = defaultdict(list)
        for record in offline_records(file):
            kinds[record.WhichOneof("record_type")].append(record)
        about, end = kinds["run"][0].run, kinds["exit"][0].exit
        config = {x.key: json.loads(x.value_json) for x in about.config.update}
        seen.append((about.display_name, config["SOLVER"]["BASE_LR"], end.exit_code))
        assert bool(kinds["preempting"]) == (file is files[0])
        history = [
            {x.nested_key[0]: json.loads(x.value_json) for x in record.history.item}
            for record in kinds["history"]
        ]
        assert [[x[name] for name in ("iteration", "loss_cls")] for x in history] == [[3, 0.25]]
    assert seen == [("my run", 0.5, 1), ("my run", 0.125, 0)]


# ------------------------------------------------------------------------------------------------
# MLflow
# ------------------------------------------------------------------------------------------------


def test_mlflow_has_scalars_config_name_and_state(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    client = mlflow.MlflowClient()
    states = [client.get_run(x).info.status for x in resume("mlflow", tmp_path / "my run")]
    (found,) = client.search_runs(["0"])
    assert (found.info.run_name, found.info.status) == ("my run", "FINISHED")
    assert found.data.params["SOLVER.BASE_LR"] == "0.5"  # of the first start
    folder = tmp_path / "mlruns" / "0" / found.info.run_id
    assert "BASE_LR: 0.125" in (folder / "artifacts" / "config.yaml").read_text()
    history = client.get_metric_history(found.info.run_id, "loss_cls")
    assert [(x.step, x.value) for x in history] == [(3, 0.25)] * 2
    assert states == ["KILLED", "FINISHED"]
    assert mlflow.active_run() is None


def test_mlflow_takes_classes_of_any_name_and_number(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    run_writer = writer(tmp_path, LOGGERS.get("mlflow")(), "mlflow")
    classes = ["a(b)//é..", "/../x", "#%?", "x" * 300, *map(str, range(1200))]
    with tracked([run_writer], resumed=False):
        write(run_writer, (0, {f"bbox/AP-{x}": 1.0 for x in classes}))
        assert run_writer.active
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert len(found.data.metrics) == len(classes)


def test_mlflow_without_its_run_names_the_file(tmp_path):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    (tmp_path / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    run_writer = writer(tmp_path, LOGGERS.get("mlflow")(), "mlflow")
    with pytest.raises(UserError, match=r"cannot start with the run id in .*mlflow_run_id: Run"):
        run_writer.start(resumed=True)
