"""A run that is stopped and resumed ends with the weights of an uninterrupted run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import LARGER, ROOT, TINY, make_cfg, make_input
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer
from PIL import Image
from processes import Script
from trainings import arguments, assert_equal, final, train

import atss.engine.run as way_in
from atss.checkpoints import TrainingCheckpointer
from atss.engine import Trainer
from atss.engine.steps import Float16StepTrainer


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return the option that registers 9 images of noise with a bright box; every third is wide."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(9):
        height, width = (120, 96) if i % 3 else (96, 120)
        x, y = (int(v) for v in rng.integers(0, 50, 2))
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        pixels[y : y + 40, x : x + 40] = 250
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        box = {"bbox": [x, y, 40, 40], "area": 1600, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i, "category_id": 1, **box})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "box"}]
    (root / "mixed.json").write_text(json.dumps(content))
    yield f"mixed={root}/mixed.json:{root}"
    if "mixed" in DatasetCatalog:
        DatasetCatalog.remove("mixed")
        MetadataCatalog.remove("mixed")


@pytest.fixture(scope="module")
def uninterrupted(mixed, tmp_path_factory):
    """Return (losses, final checkpoint) of a run of 8 iterations."""
    output = tmp_path_factory.mktemp("uninterrupted")
    return train(arguments(mixed, output)), final(output)


def test_runs_with_one_seed_are_equal(mixed, uninterrupted, tmp_path):
    losses, checkpoint = uninterrupted
    assert train(arguments(mixed, tmp_path)) == losses
    assert_equal(final(tmp_path), checkpoint)
    assert train(arguments(mixed, tmp_path, SEED=2), stop_after=0)[0] != losses[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_for_bit(mixed, uninterrupted, tmp_path, workers):
    losses, checkpoint = uninterrupted
    opts = {"DATALOADER.NUM_WORKERS": workers}
    before = train(arguments(mixed, tmp_path, **opts), stop_after=4)
    after = train(arguments(mixed, tmp_path, "--resume", **opts))
    assert list(after) == [3, 4, 5, 6, 7]
    assert before | after == losses
    assert {i: before[i] for i in (3, 4)} == {i: after[i] for i in (3, 4)}
    assert_equal(final(tmp_path), checkpoint)


def test_random_seed_is_resumed(mixed, tmp_path):
    before = train(arguments(mixed, tmp_path, SEED=-1), stop_after=4)
    after = train(arguments(mixed, tmp_path, "--resume", SEED=-1), stop_after=5)
    assert {i: before[i] for i in (3, 4)} == {i: after[i] for i in (3, 4)}
    other = train(arguments(mixed, tmp_path, SEED=-1), stop_after=0)
    assert other[0] != before[0]


def test_checkpoint_without_seed_is_resumed(mixed, uninterrupted, tmp_path):
    """From Detectron2's trainer, or without images as in older versions."""
    train(arguments(mixed, tmp_path), stop_after=4)
    checkpoint = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    for name in ("seed", "images_seen", "stream", "parameters"):
        del checkpoint["trainer"][name]
    torch.save(checkpoint, tmp_path / "model_0000002.pth")
    after = train(arguments(mixed, tmp_path, "--resume"))
    assert after == {i: uninterrupted[0][i] for i in range(3, 8)}


def test_precise_bn_and_accumulation_resume(mixed, tmp_path):
    """PreciseBN's loader has a position of its own, which evaluations do not change, and it refuses
    batch norms that run twice in a forward pass."""
    node = "TEST.PRECISE_BN"
    opts = {f"{node}.ENABLED": True, f"{node}.NUM_ITER": 2, "TEST.EVAL_PERIOD": 2}
    opts |= {"DATASETS.TEST": ("mixed",), "INPUT.MIN_SIZE_TEST": 64, "SOLVER.ACCUMULATE": 2}
    train(arguments(mixed, tmp_path / "whole", **opts))
    train(arguments(mixed, tmp_path / "parts", **opts), stop_after=4)
    train(arguments(mixed, tmp_path / "parts", "--resume", **opts))
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_random_numbers_of_the_model_resume(mixed, tmp_path, monkeypatch):
    """For example dropout in a backbone."""
    build_model = Trainer.build_model

    def build_with_dropout(cfg):
        model = build_model(cfg)
        model.head.register_forward_pre_hook(
            lambda _, args: ([torch.nn.functional.dropout(f, 0.1) for f in args[0]],)
        )
        return model

    monkeypatch.setattr(Trainer, "build_model", staticmethod(build_with_dropout))
    train(arguments(mixed, tmp_path / "whole"))
    train(arguments(mixed, tmp_path / "parts"), stop_after=4)
    train(arguments(mixed, tmp_path / "parts", "--resume"))
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_run_killed_before_its_last_file(mixed, uninterrupted, tmp_path):
    """After the last iteration's numbered checkpoint."""
    opts = {"SOLVER.CHECKPOINT_PERIOD": 4}
    train(arguments(mixed, tmp_path, **opts))
    os.remove(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    assert not train(arguments(mixed, tmp_path, "--resume", **opts))
    assert_equal(final(tmp_path), uninterrupted[1])


def test_resumption_after_the_end(mixed, uninterrupted, tmp_path):
    train(arguments(mixed, tmp_path))
    assert not train(arguments(mixed, tmp_path, "--resume"))
    assert_equal(final(tmp_path), uninterrupted[1])
    longer = {"SOLVER.MAX_ITER": 10}
    assert list(train(arguments(mixed, tmp_path, "--resume", **longer))) == [8, 9]


# ------------------------------------------------------------------------------------------------
# With another config
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def see(mixed, monkeypatch):
    """see(output, *options, stop_in=None, **opts): train without learning. Return the images and
    the rate of each iteration."""

    def run(output, *options, stop_in=None, **opts):
        seen = {}

        def step(self):
            if self.iter == stop_in:
                raise KeyboardInterrupt
            names = [
                os.path.basename(x["file_name"]) for x in next(self._trainer._data_loader_iter)
            ]
            seen[self.iter] = names, self.optimizer.param_groups[0]["lr"]

        monkeypatch.setattr(Trainer, "run_step", step)
        args = way_in.make_parser().parse_args(arguments(mixed, output, *options, **opts))
        try:
            way_in.run(args, way_in.prepare(args))
        except KeyboardInterrupt:
            assert max(seen) == stop_in - 1
        return seen

    return run


def in_order(seen):
    return [name for names, _ in seen.values() for name in names]


PASSES = {
    "SOLVER.EPOCHS": 3.0,
    "SOLVER.CHECKPOINT_PERIOD": 6,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
}


@pytest.mark.parametrize(("batch", "goes_on", "last"), [(1, 12, 26), (4, 3, 6)])
def test_other_batch_size_trains_the_remaining_epochs(
    see, tmp_path, monkeypatch, batch, goes_on, last
):
    """Three epochs of nine images in batches of two are 14 iterations, 6 of which are made. The
    best weights are of the third."""
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": 1.0}})
    other = {"SOLVER.IMS_PER_BATCH": batch}
    evaluated = {"DATASETS.TEST": ("mixed",), "TEST.EVAL_PERIOD": 3}
    order = in_order(see(tmp_path / "whole", **PASSES))
    see(tmp_path, **PASSES | evaluated, stop_in=7)
    after = see(tmp_path, "--resume", **PASSES | evaluated | other)
    best = final(tmp_path)["trainer"]["hooks"]["Best"]
    assert best["iteration"] == (goes_on // 2 - 1)
    assert list(after) == list(range(goes_on, last + 1))
    assert in_order(after)[:15] == order[12:27]
    fresh = see(tmp_path / "fresh", **PASSES | other)
    assert [rate for _, rate in after.values()] == [fresh[i][1] for i in after]
    assert final(tmp_path)["trainer"]["images_seen"] == 12 + len(in_order(after))


def test_other_batch_size_continues_in_the_stream(see, tmp_path):
    """MAX_ITER does not change."""
    opts = {"DATALOADER.ASPECT_RATIO_GROUPING": False}
    order = in_order(see(tmp_path / "whole", **opts, **{"SOLVER.MAX_ITER": 12}))
    see(tmp_path, **opts, stop_in=7)
    after = see(tmp_path, "--resume", **opts, **{"SOLVER.IMS_PER_BATCH": 4})
    assert list(after) == [6, 7]
    assert in_order(after) == order[12:20]


def test_interruptions_after_another_batch_size(see, tmp_path):
    """Images wait for others of their group."""
    see(tmp_path, stop_in=4)
    opts = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.CHECKPOINTS_TO_KEEP": 0}
    opts |= {"SOLVER.CHECKPOINT_PERIOD": 1}
    whole = see(tmp_path, "--resume", **opts)
    assert list(whole) == list(range(3, 8))
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    assert see(tmp_path, "--resume", **opts) == {i: whole[i] for i in (5, 6, 7)}


SGD = {
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.BIAS_LR_FACTOR": 1.0,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
}
ADAM = SGD | {"SOLVER.OPTIMIZER": "AdamW"}


@pytest.fixture(scope="module")
def three_iterations(tmp_path_factory):
    """Return {optimizer: folder with a checkpoint after three of four iterations}."""
    folders = {}
    for name, opts in (("SGD", SGD), ("AdamW", ADAM)):
        folders[name] = tmp_path_factory.mktemp(name)
        trainer_of(folders[name], opts).train()
        (folders[name] / "last_checkpoint").write_text("model_0000002.pth")
    return folders


def trainer_of(output, opts):
    """Make a trainer on one image."""

    class OneImage(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [[make_input([[10, 10, 60, 60]], [0]) | {"file_name": "x.png"}]] * 4

    values = TINY | {"OUTPUT_DIR": str(output), "SOLVER.IMS_PER_BATCH": 1} | opts
    return OneImage(make_cfg(*(x for item in values.items() for x in item)))


def by_name(trainer):
    """Return {parameter's name: (settings, momenta)}."""
    settings = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            settings[parameter] = {k: x for k, x in group.items() if k != "params"}
    state = trainer.optimizer.state
    return {
        name: (settings[x], state.get(x, {}))
        for name, x in trainer.checkpointer.model.named_parameters()
        if x in settings
    }


@pytest.mark.parametrize(
    ("kind", "opts", "changes"),
    [
        ("SGD", {}, []),
        (
            "SGD",
            {
                "SOLVER.BASE_LR": 0.003,
                "SOLVER.WEIGHT_DECAY": 0.01,
                "SOLVER.MOMENTUM": 0.5,
                "SOLVER.NESTEROV": True,
            },
            [
                "learning rate now 0.003, was 0.01 (from SOLVER.BASE_LR, ",
                "momentum now 0.5, was 0.9 (from SOLVER.MOMENTUM)",
                "Nesterov's momentum now True, was False (from SOLVER.NESTEROV)",
                "weight decay now 0.0, 0.0001, 0.01, was 0.0, 0.0001 (from SOLVER.WEIGHT_DECAY, ",
            ],
        ),
        (
            "SGD",
            {
                "SOLVER.BIAS_LR_FACTOR": 2.0,
                "SOLVER.WEIGHT_DECAY_NORM": 0.01,
                "SOLVER.WEIGHT_DECAY_BIAS": 0.02,
            },
            ["now 0.01, 0.02, was 0.01 (from"],
        ),
        ("SGD", {"SOLVER.BACKBONE_LR_FACTOR": 0.5}, ["now 0.005, 0.01, was 0.01 (from"]),
        ("SGD", {"SOLVER.MAX_ITER": 30, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}, []),
        ("SGD", {"SOLVER.STEPS": (2,), "SOLVER.GAMMA": 0.5, "SOLVER.WARMUP_ITERS": 1}, []),
        (
            "AdamW",
            {"SOLVER.BASE_LR": 0.003, "SOLVER.WEIGHT_DECAY_SCALE": 0.3},
            ["learning rate now 0.003, was 0.01 (from SOLVER.BASE_LR, "],
        ),
    ],
)
def test_config_sets_the_optimizer_of_a_resumed_run(three_iterations, kind, opts, changes, caplog):
    """Settings are those of a run that always had them; momenta are the checkpoint's, also with
    other groups."""
    folder = three_iterations[kind]
    opts = {"SGD": SGD, "AdamW": ADAM}[kind] | opts
    checkpoint = torch.load(folder / "model_0000002.pth", weights_only=True)["trainer"]
    momenta = checkpoint["_trainer"]["optimizer"]["state"]
    resumed = trainer_of(folder, opts)
    with caplog.at_level("INFO"):
        resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    fresh = trainer_of(folder, opts)
    for _ in range(3):
        fresh.scheduler.step()
    wanted, found = by_name(fresh), by_name(resumed)
    assert len(found) == len(momenta) == len(wanted)
    for place, name in enumerate(checkpoint["parameters"]):
        settings, state = found[name]
        assert settings == wanted[name][0], name
        assert_equal(state, momenta[place])
    lines = [x for x in caplog.text.splitlines() if "--resume follows the config" in x]
    assert len(lines) == bool(changes)
    assert all(x in lines[0] for x in changes), lines


def test_gradient_scale_starts_anew_after_fp32():
    """An fp32 checkpoint has no scale, and fp32 ignores one."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SimpleTrainer(model, [], optimizer).state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    in_fp16 = Float16StepTrainer(model, [], optimizer, grad_scaler=scaler)
    in_fp16.load_state_dict(state | {"iteration": 5})
    assert (in_fp16.iter, scaler.get_scale()) == (5, 8.0)
    in_fp32 = SimpleTrainer(model, [], optimizer)
    in_fp32.load_state_dict(in_fp16.state_dict())
    assert in_fp32.iter == 5


# Imported by tools/train_net.py: append iteration and total loss after each step.
PROGRESS = """
from detectron2.utils import comm
from atss.engine import Trainer

run_step = Trainer.run_step

def step(self):
    run_step(self)
    if comm.is_main_process():
        with open("progress", "a") as file:
            print(self.iter, self.storage.latest()["total_loss"][0].hex(), file=file)

Trainer.run_step = step
"""


class Run:
    """tools/train_net.py in new processes, each resuming the last."""

    def __init__(self, folder, argv, processes, port):
        (folder / "progress_of_steps.py").write_text(PROGRESS)
        self.progress = folder / "progress"
        self.log = folder / "out" / "log.txt"
        self.begun = size(self.log), size(self.progress)
        command = [ROOT / "tools/train_net.py", *argv]
        meeting = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = [meeting | {"RANK": i, "LOCAL_RANK": i} for i in range(processes)]
        self.scripts = [Script(command, folder, **x) for x in variables if processes > 1]
        self.scripts = self.scripts or [Script(command, folder)]
        name = f"{TrainingCheckpointer.UNFINISHED}_{self.scripts[0].pid}"
        self.unfinished = folder / "out" / name

    def stop(self, moment, rng, whole, number):
        """Signal a process and its workers at its start, some iterations later, or during the write
        of a checkpoint of ``whole`` bytes. Return whether the write was cut."""
        part, growth, patience = rng.randrange(1, whole), rng.randrange(1, 80), rng.randrange(300)
        reached = {
            "start": lambda: size(self.log) > self.begun[0],
            "step": lambda: size(self.progress) > self.begun[1] + growth,
            "write": lambda: self.writes() and size(self.unfinished) >= part,
        }[moment]
        while not reached() or (moment != "write" and (patience := patience - 1) > 0):
            for script in self.scripts:
                assert script.exit_code is None, script.lines.read()[-2000:]
            time.sleep(0.001)
        victim = rng.choice(self.scripts)
        os.killpg(victim.pid, number)
        others = {signal.SIGKILL: 1, signal.SIGINT: 130}.get(number, 75)
        for script in self.scripts:
            text, exit_code = script.communicate(timeout=120)
            killed = script is victim and number == signal.SIGKILL
            assert exit_code == (-number if killed else others), text[-2000:]
        return self.writes()

    def writes(self):
        """Return whether the run is writing a checkpoint."""
        return self.unfinished.exists()

    def finish(self):
        for script in self.scripts:
            text, exit_code = script.communicate()
            assert exit_code == 0, text[-2000:]


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


STOPS = (signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(
    ("processes", "stops", "iterations"),
    [
        (1, 2, 8),
        pytest.param(1, 30, 150, marks=pytest.mark.slow),
        pytest.param(2, 30, 150, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_run_is_equal(mixed, tmp_path, processes, stops, iterations, free_port):
    opts = LARGER | {"SOLVER.MAX_ITER": iterations, "SOLVER.CHECKPOINT_PERIOD": 2}
    whole = tmp_path / "whole"
    whole.mkdir()
    options = ("--resume", "--import", "progress_of_steps")
    Run(whole, arguments(mixed, whole / "out", *options, **opts), processes, free_port).finish()
    rng = random.Random(0)
    cut = 0
    for i in range(stops + 1):
        opts |= {"DATALOADER.NUM_WORKERS": 2 * (i % 2), "SOLVER.CHECKPOINTS_TO_KEEP": 2}
        argv = arguments(mixed, tmp_path / "out", *options, **opts)
        run = Run(tmp_path, argv, processes, free_port)
        if i == stops:
            run.finish()
        else:
            moment = ("write", "step", "write", "start")[i % 4]
            checkpoint = size(whole / "out" / "model_final.pth")
            cut += run.stop(moment, rng, checkpoint, STOPS[i % len(STOPS)])
    print(f"{stops} stops, {cut} within the write of a checkpoint")
    assert cut
    assert_equal(final(tmp_path / "out"), final(whole / "out"))
    expected, seen = ((x / "progress").read_text().splitlines() for x in (whole, tmp_path))
    assert {*seen} == {*expected}
    starts = re.findall(r"Starting at iteration (\d+)", (tmp_path / "out/log.txt").read_text())
    assert starts == sorted(starts, key=int)
    assert len(list((tmp_path / "out").glob("model_0*.pth"))) == 2
    assert not list((tmp_path / "out").glob("unfinished*"))


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit(mixed, tmp_path):
    """The sum of three numbers depends on their order."""

    def launch(output, *options):
        opts = {"SOLVER.IMS_PER_BATCH": 6, "SOLVER.ACCUMULATE": 2}
        argv = arguments(mixed, output, "--num-gpus", 3, *options, **opts)
        command = [sys.executable, "-W", "ignore", str(ROOT / "tools/train_net.py"), *argv]
        done = subprocess.run(map(str, command), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return final(output)

    whole = launch(tmp_path)
    for name in ("model_final.pth", "model_0000005.pth"):
        os.remove(tmp_path / name)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert_equal(launch(tmp_path, "--resume"), whole)
