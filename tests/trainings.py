"""Short trainings in this process, by arguments of tools/train_net.py."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

import atss.engine.run as way_in
from atss.engine import Trainer

CONFIG = str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")
SMALL = {
    **TINY,
    "MODEL.ATSS.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SEED": 1,
}
# Order, sizes, flips and crops are drawn at random.
RANDOM = {
    "DATASETS.TRAIN": ("mixed",),
    "DATASETS.TEST": (),
    **TINY,
    "MODEL.ATSS.PRECISION": "fp32",
    "INPUT.MIN_SIZE_TRAIN": (64, 80, 96),
    "INPUT.CROP.ENABLED": True,
    "INPUT.FULL_SIZE_CROP": 0.5,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 8,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SEED": 1,
}
AVERAGED = {
    "DATASETS.TRAIN": ("short",),
    "DATASETS.TEST": ("short",),
    "MODEL.ATSS.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.CHECKPOINTS_TO_KEEP": 0,
    "SOLVER.EMA_DECAY": 0.4,
}


def command_line(squares: Path, output_dir: Path, *options: str, **opts: object) -> list[str]:
    """Return a command line of tools/train_net.py for a training on the squares."""
    values = {"DATASETS.TRAIN": ("squares",), "DATASETS.TEST": ("squares",)}
    values |= SMALL | {"OUTPUT_DIR": output_dir} | opts
    register = f"squares={squares}/annotations.json:{squares}/images"
    script = f"{ROOT}/tools/train_net.py"
    return [script, "--config-file", CONFIG, "--register", register, *options, *flatten(values)]


def arguments(register, output, *options, **opts):
    """Return arguments of tools/train_net.py for a training that draws at random."""
    values = RANDOM | {"OUTPUT_DIR": output} | opts
    return ["--config-file", CONFIG, "--register", register, *options, *flatten(values)]


def flatten(values: dict) -> list[str]:
    return [str(x) for item in values.items() for x in item]


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
    """Train in this process and return the losses by iteration."""
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


def run(squares, output, *options, stop_after=None, **opts):
    """Train on the squares, with averaged weights, and return the losses by iteration."""
    register = f"short={squares}/annotations.json:{squares}/images"
    return train(arguments(register, output, *options, **AVERAGED | opts), stop_after)


def final(output):
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_equal(one, other):
    """Compare two checkpoints bit for bit: weights, statistics, momenta, rates, counters."""
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


def forget(*names):
    """Remove data sets from the catalogs, as in a new process."""
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
