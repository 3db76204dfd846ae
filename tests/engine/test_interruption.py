"""A run that is stopped and resumed, however often, ends with the weights of one that was not."""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import LARGER, ROOT, TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image
from processes import Script

import atss.engine.run as way_in
from atss.checkpoints import TrainingCheckpointer
from atss.engine import Trainer

# Whatever is drawn at random: order, sizes, flips, crops, and wide and high images to be grouped.
OPTS = {
    "DATASETS.TRAIN": ("mixed",),
    "DATASETS.TEST": (),
    **TINY,
    "MODEL.ATSS.PRECISION": "fp32",
    "INPUT.MIN_SIZE_TRAIN": (64, 80, 96),
    "INPUT.CROP.ENABLED": True,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 8,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data set in COCO's format of 9 images of noise with a bright box, every third one wide.
    Gives the option that registers it."""
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


def arguments(mixed, output, *options, **opts):
    """For tools/train_net.py."""
    values = OPTS | {"OUTPUT_DIR": output} | opts
    config = str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")
    flat = [str(x) for item in values.items() for x in item]
    return ["--config-file", config, "--register", mixed, *options, *flat]


@dataclass
class Recorder(HookBase):
    """Total loss by iteration; stops the run after one of them."""

    stop_after: int | None
    losses: dict = field(default_factory=dict)

    def after_step(self):
        self.losses[self.trainer.iter] = self.trainer.storage.latest()["total_loss"][0]
        if self.trainer.iter == self.stop_after:
            raise KeyboardInterrupt


def train(argv, stop_after=None):
    """Losses by iteration of one run in this process."""
    recorder = Recorder(stop_after)
    build_hooks = Trainer.build_hooks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), recorder])
        args = way_in.make_parser().parse_args(argv)
        try:
            way_in.run(args, way_in.prepare(args))
        except KeyboardInterrupt:
            assert max(recorder.losses) == stop_after
    return recorder.losses


def final(output):
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_equal(one, other):
    """Bit for bit: weights, statistics, momenta, rates, counters."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def uninterrupted(mixed, tmp_path_factory):
    """(losses, final checkpoint) of a run of 8 iterations."""
    output = tmp_path_factory.mktemp("uninterrupted")
    return train(arguments(mixed, output)), final(output)


def test_two_runs_with_a_seed_agree(mixed, uninterrupted, tmp_path):
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


def test_a_seed_that_was_drawn_is_kept(mixed, tmp_path):
    before = train(arguments(mixed, tmp_path, SEED=-1), stop_after=4)
    after = train(arguments(mixed, tmp_path, "--resume", SEED=-1), stop_after=5)
    assert {i: before[i] for i in (3, 4)} == {i: after[i] for i in (3, 4)}
    other = train(arguments(mixed, tmp_path, SEED=-1), stop_after=0)
    assert other[0] != before[0]


def test_a_checkpoint_without_seed(mixed, tmp_path):
    """Of Detectron2's own trainer."""
    train(arguments(mixed, tmp_path), stop_after=4)
    checkpoint = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    del checkpoint["trainer"]["seed"]
    torch.save(checkpoint, tmp_path / "model_0000002.pth")
    assert list(train(arguments(mixed, tmp_path, "--resume"))) == [3, 4, 5, 6, 7]


def test_precise_batch_statistics_resume_too(mixed, tmp_path):
    """Their loader is another one, at a place of its own. Evaluations in between change nothing."""
    node = "TEST.PRECISE_BN"
    opts = {f"{node}.ENABLED": True, f"{node}.NUM_ITER": 2, "TEST.EVAL_PERIOD": 2}
    opts |= {"DATASETS.TEST": ("mixed",), "INPUT.MIN_SIZE_TEST": 64}
    train(arguments(mixed, tmp_path / "whole", **opts))
    train(arguments(mixed, tmp_path / "parts", **opts), stop_after=4)
    train(arguments(mixed, tmp_path / "parts", "--resume", **opts))
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_what_the_model_draws_resumes_too(mixed, tmp_path, monkeypatch):
    """As a backbone with dropout does."""
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


def test_killed_before_the_last_file(mixed, uninterrupted, tmp_path):
    """After the last iteration's numbered checkpoint: nothing is left to train."""
    opts = {"SOLVER.CHECKPOINT_PERIOD": 4}
    train(arguments(mixed, tmp_path, **opts))
    os.remove(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    assert not train(arguments(mixed, tmp_path, "--resume", **opts))
    assert_equal(final(tmp_path), uninterrupted[1])


def test_resumed_after_the_end(mixed, uninterrupted, tmp_path):
    train(arguments(mixed, tmp_path))
    assert not train(arguments(mixed, tmp_path, "--resume"))
    assert_equal(final(tmp_path), uninterrupted[1])
    longer = {"SOLVER.MAX_ITER": 10}
    assert list(train(arguments(mixed, tmp_path, "--resume", **longer))) == [8, 9]


# Imported by tools/train_net.py: appends iteration and total loss after each step.
PROGRESS = """
from atss.engine import Trainer

run_step = Trainer.run_step

def step(self):
    run_step(self)
    with open("progress", "a") as file:
        print(self.iter, self.storage.latest()["total_loss"][0].hex(), file=file)

Trainer.run_step = step
"""


class Run:
    """tools/train_net.py as a process of its own, which goes on from where the last one was."""

    def __init__(self, folder, argv):
        self.progress = folder / "progress"
        self.log = folder / "out" / "log.txt"
        self.begun = size(self.log), size(self.progress)
        self.script = Script([ROOT / "tools/train_net.py", *argv], folder)
        name = f"{TrainingCheckpointer.UNFINISHED}_{self.script.pid}"
        self.unfinished = folder / "out" / name

    def kill(self, moment, rng, whole):
        """Kills it and its workers while it starts, some iterations later, or within the write of
        a checkpoint of ``whole`` bytes. Whether a write was cut."""
        part, growth, patience = rng.randrange(1, whole), rng.randrange(1, 80), rng.randrange(300)
        reached = {
            "start": lambda: size(self.log) > self.begun[0],
            "step": lambda: size(self.progress) > self.begun[1] + growth,
            "write": lambda: self.writes() and size(self.unfinished) >= part,
        }[moment]
        while not reached() or (moment != "write" and (patience := patience - 1) > 0):
            assert self.script.exit_code is None, self.script.lines.read()[-2000:]
            time.sleep(0.001)
        self.script.kill()
        return self.writes()

    def writes(self):
        """Whether it is writing a checkpoint."""
        return self.unfinished.exists()

    def finish(self):
        said, exit_code = self.script.communicate()
        assert exit_code == 0, said[-2000:]


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("kills", "iterations"), [(2, 8), pytest.param(20, 100, marks=pytest.mark.slow)]
)
def test_kills_change_nothing(mixed, tmp_path, kills, iterations):
    opts = LARGER | {"SOLVER.MAX_ITER": iterations, "SOLVER.CHECKPOINT_PERIOD": 2}
    losses = train(arguments(mixed, tmp_path / "whole", **opts))
    (tmp_path / "progress_of_steps.py").write_text(PROGRESS)
    rng = random.Random(0)
    cut = 0
    for i in range(kills + 1):
        opts |= {"DATALOADER.NUM_WORKERS": 2 * (i % 2), "SOLVER.CHECKPOINTS_TO_KEEP": 2}
        options = ("--resume", "--import", "progress_of_steps")
        run = Run(tmp_path, arguments(mixed, tmp_path / "out", *options, **opts))
        if i == kills:
            run.finish()
        else:
            moment = ("write", "step", "write", "start")[i % 4]
            cut += run.kill(moment, rng, size(tmp_path / "whole" / "model_final.pth"))
    print(f"{kills} kills, {cut} within the write of a checkpoint")
    assert cut
    assert_equal(final(tmp_path / "out"), final(tmp_path / "whole"))
    seen = [line.split() for line in (tmp_path / "progress").read_text().splitlines()]
    assert {int(i): float.fromhex(loss) for i, loss in seen} == losses
    assert all(float.fromhex(loss) == losses[int(i)] for i, loss in seen)
    starts = re.findall(r"Starting at iteration (\d+)", (tmp_path / "out/log.txt").read_text())
    assert starts == sorted(starts, key=int)
    assert len(list((tmp_path / "out").glob("model_0*.pth"))) == 2
    assert not list((tmp_path / "out").glob("unfinished*"))


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit(mixed, tmp_path):
    """Sums of three numbers depend on their order."""

    def launch(output, *options):
        argv = arguments(mixed, output, "--num-gpus", 3, *options, **{"SOLVER.IMS_PER_BATCH": 6})
        command = [sys.executable, "-W", "ignore", str(ROOT / "tools/train_net.py"), *argv]
        done = subprocess.run(map(str, command), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return final(output)

    whole = launch(tmp_path)
    for name in ("model_final.pth", "model_0000005.pth"):
        os.remove(tmp_path / name)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert_equal(launch(tmp_path, "--resume"), whole)
