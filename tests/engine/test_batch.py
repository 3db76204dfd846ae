"""SOLVER.IMS_PER_BATCH -1: choice, rate, resumption, refusals."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, make_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import atss.engine.batch as batch
from atss.data.datasets import register
from atss.engine.batch import choose_batch, largest_batch, largest_canvas
from atss.engine.run import make_parser, prepare

CONFIG = ROOT / "configs/ATSS_R_18_FPN_small.yaml"  # 4 images, BASE_LR 0.03


@pytest.fixture
def measured(monkeypatch):
    """Steps that need 1 MB and 2 MB for each image, of 20 MB. Return the measured sizes."""
    sizes = []

    def measure(images):
        sizes.append(images)
        return (1 + 2 * images) * 10**6, 0

    monkeypatch.setattr(batch, "_measuring", lambda *_: nullcontext(measure))
    monkeypatch.setattr(batch, "memory_left", lambda: 20 * 10**6)
    monkeypatch.setattr(batch, "resident", lambda: 0)
    return sizes


@pytest.fixture
def choose(squares, tmp_path):
    def choose(*options, **opts):
        if "few" not in DatasetCatalog:
            register(f"few={squares}/annotations.json:{squares}/images")
        args = make_parser().parse_args(["--config-file", str(CONFIG), *options])
        values = {"SOLVER.IMS_PER_BATCH": -1, "DATASETS.TRAIN": ("few",), "OUTPUT_DIR": tmp_path}
        cfg = make_cfg(*(str(x) for item in (values | opts).items() for x in item))
        choose_batch(args, cfg)
        return cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR

    return choose


def test_largest_batch_is_chosen_and_its_rate_scaled(choose, measured, capsys):
    """80 % of 20 MB are 7 images; with 2 parts, 6; for each of two processes, half."""
    assert choose() == (7, pytest.approx(0.03 * 7 / 4))
    text = capsys.readouterr().err
    assert text.startswith("SOLVER.IMS_PER_BATCH 7, the largest that fits into 0.02 GB (80% of ")
    assert text.endswith("SOLVER.BASE_LR 0.0525, scaled from that of 4 images\n")
    assert choose(**{"SOLVER.OPTIMIZER": "AdamW"})[1] == pytest.approx(0.03 * (7 / 4) ** 0.5)
    assert measured == [1, 2] * 2
    assert choose(**{"SOLVER.ACCUMULATE": 2})[0] == 6
    assert choose("--num-gpus", "2")[0] == 6  # of 7 images, each process has 3
    assert choose(**{"SOLVER.IMS_PER_BATCH": 3}) == (3, 0.03)


def test_measured_steps_take_planes_and_keep_weights(monkeypatch):
    monkeypatch.setattr(batch, "keep_freed_memory", lambda: None)
    values = TINY | {"INPUT.FORMAT": "planes", "MODEL.ATSS.NUM_CLASSES": 2}
    values |= {"MODEL.PIXEL_MEAN": [0.0] * 5, "MODEL.PIXEL_STD": [1.0] * 5}
    cfg = make_cfg(*(x for item in values.items() for x in item))
    model, used = build_model(cfg), []
    monkeypatch.setattr(batch, "build_model", lambda _: model)
    weights = copy.deepcopy(model.state_dict())
    asked = SimpleNamespace(recv=iter([2]).__next__, send=used.append)
    with pytest.raises(StopIteration):
        batch._make_steps(cfg, [], (32, 64), 3, asked)
    assert len(used) == 1
    assert used[0][0] > 0
    for name, x in model.named_parameters():
        assert torch.equal(x, weights[name])


def test_resumed_run_keeps_its_batch(choose, measured, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("SOLVER:\n  IMS_PER_BATCH: 2\n  BASE_LR: 1.0\n")
    assert choose("--resume") == (2, pytest.approx(0.015))
    assert not measured
    assert "that of the resumed run" in capsys.readouterr().err


def test_no_batch_is_refused(choose, measured, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="belongs on the command line"):
        choose(**{"SOLVER.REFERENCE_WORLD_SIZE": 1})
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {CONFIG}\nSOLVER:\n  IMS_PER_BATCH: -1\n")
    with pytest.raises(ValueError, match=r"own.yaml must have the batch of its SOLVER.BASE_LR"):
        choose("--config-file", str(own))
    for key, value, reason in (
        ("MODEL.MASK_ON", True, "measures steps on boxes alone: .* with MODEL.MASK_ON True"),
        ("SOLVER.ACCUMULATE", 0, "SOLVER.ACCUMULATE must be >= 1, got 0"),
        ("INPUT.MAX_SIZE_TRAIN", 0, "INPUT.MAX_SIZE_TRAIN must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose(**{key: value})
    assert not measured
    monkeypatch.setattr(batch, "memory_left", lambda: 10**6)
    with pytest.raises(ValueError, match=r"a step of one image of .* does not fit into memory"):
        choose()
    monkeypatch.setattr(batch, "is_started", lambda: True)
    with pytest.raises(ValueError, match="but torchrun has started them"):
        choose()


@pytest.mark.parametrize(
    ("measured", "limit", "parts", "most", "expected"),
    [
        ([(1, 30), (2, 50)], 100, 1, 99, 4),
        ([(1, 30), (2, 50)], 100, 1, 3, 3),
        ([(1, 30), (2, 130)], 100, 1, 99, 1),
        ([(1, 30)], 100, 1, 99, 1),  # the next step failed
        ([(4, 30), (8, 50)], 100, 4, 99, 16),
        ([(4, 30), (8, 50)], 100, 4, 3, 4),
        ([(1, 30), (2, 30)], 100, 1, 99, 71),
    ],
)
def test_memory_is_linear_in_images(measured, limit, parts, most, expected):
    assert largest_batch(measured, limit, parts, most) == expected


def test_largest_canvas():
    sizes = ("INPUT.MIN_SIZE_TRAIN", (60, 80), "INPUT.MAX_SIZE_TRAIN", 100)
    assert largest_canvas(make_cfg(*sizes)) == (80, 100)
    assert largest_canvas(make_cfg(*sizes, "DATALOADER.ASPECT_RATIO_GROUPING", False)) == (100, 100)
    jitter = ("INPUT.SCALE_JITTER", [0.5, 1], "INPUT.SCALE_JITTER_SIZE", 64)
    assert largest_canvas(make_cfg(*sizes, *jitter)) == (64, 64)
    high = ("INPUT.RESIZE", "stretch", "INPUT.MIN_SIZE_TRAIN", (120,), "INPUT.MAX_SIZE_TRAIN", 100)
    assert largest_canvas(make_cfg(*high)) == (120, 100)


@pytest.mark.slow
def test_measured_batch_is_in_the_config(squares, tmp_path):
    """In a process of its own, within all of this machine's memory: all seven images."""
    values = TINY | {
        "INPUT.MIN_SIZE_TRAIN": (96,),
        "SOLVER.IMS_PER_BATCH": -1,
        "DATASETS.TRAIN": ("squares",),
        "DATASETS.TEST": ("squares",),
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": tmp_path / "out",
    }
    register = ("--register", f"squares={squares}/annotations.json:{squares}/images")
    pairs = [str(x) for item in values.items() for x in item]
    args = make_parser().parse_args(["--config-file", str(CONFIG), *register, *pairs])
    cfg = prepare(args)
    assert cfg.SOLVER.IMS_PER_BATCH == 7
    assert pytest.approx(0.03 * 7 / 4) == cfg.SOLVER.BASE_LR
