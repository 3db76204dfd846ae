"""Learning rate and weight decay of each parameter; epochs become iterations."""

import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2s

from atss.config import complete_schedule, derive, enter_schedule
from atss.config.derive import describe_schedule
from atss.data import datasets
from atss.engine.solver import build_optimizer

RECIPE = "ATSS_lite0_FPN_fine_tune.yaml"


def settings(optimizer, model) -> dict[str, tuple[float, float]]:
    """Return name -> (rate, decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture(scope="module")
def model():
    return build_model(make_cfg(config=RECIPE))


def test_rates_and_decays_of_the_recipe(model):
    optimizer = build_optimizer(make_cfg(config=RECIPE), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = settings(optimizer, model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        in_backbone = name.startswith("backbone.bottom_up.")
        assert rate == pytest.approx(0.0002 if in_backbone else 0.001), name
        assert decay == (0.05 if dict(model.named_parameters())[name].ndim > 1 else 0.0), name
    assert any(name.endswith(".scale") for name in found)
    assert found["backbone.fpn_lateral3.weight"] == (0.001, 0.05)


def test_scales_decay_as_weights_by_default(model):
    cfg = make_cfg("SOLVER.WEIGHT_DECAY_SCALE", None, config=RECIPE)
    found = settings(build_optimizer(cfg, model), model)
    assert {decay for name, (_, decay) in found.items() if name.endswith(".scale")} == {0.05}


def test_optimizer_of_the_paper_equals_detectron2s():
    cfg = make_cfg()
    model = build_model(cfg)
    ours, theirs = build_optimizer(cfg, model), detectron2s(cfg, model)
    assert type(ours).__mro__[1] is type(theirs).__mro__[1] is torch.optim.SGD
    assert ours.state_dict() == theirs.state_dict()
    assert settings(ours, model) == settings(theirs, model)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (
            ("SOLVER.OPTIMIZER", "Adam"),
            r"unknown SOLVER\.OPTIMIZER 'Adam': choose from \['AdamW', 'SGD'\]",
        ),
        (("SOLVER.BIAS_LR_FACTOR", 2.0), r"BACKBONE_LR_FACTOR and SOLVER\.BIAS_LR_FACTOR cannot"),
    ],
)
def test_impossible_settings_are_refused(model, opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_optimizer(make_cfg(*opts, config=RECIPE), model)


def test_backbone_factor_needs_an_fpn():
    with pytest.raises(ValueError, match=r"needs a backbone under an FPN, but this model has no"):
        build_optimizer(make_cfg(config=RECIPE), torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("images", "opts", "wanted"),
    [
        # 448 images are 56 iterations.
        (448, ("SOLVER.EPOCHS", 12.0, "TEST.EVAL_EPOCHS", 2.0), (672, 5000, 112)),
        (449, ("SOLVER.EPOCHS", 1.0), (57, 5000, 0)),
        (448, ("SOLVER.CHECKPOINT_EPOCHS", 0.5), (90, 28, 0)),
        # 20 images: at least 600 iterations, with equally many evaluations.
        (
            20,
            ("SOLVER.EPOCHS", 12.0, "SOLVER.MIN_ITER", 600, "TEST.EVAL_EPOCHS", 2.0),
            (600, 5000, 100),
        ),
        (4, ("SOLVER.CHECKPOINT_EPOCHS", 0.1), (90, 1, 0)),
        (448, (), (90, 5000, 0)),
        # 78.125 iterations: four evaluations and the last, each after a checkpoint.
        (
            625,
            ("SOLVER.EPOCHS", 10.0, "SOLVER.CHECKPOINT_EPOCHS", 1.0, "TEST.EVAL_EPOCHS", 2.0),
            (782, 79, 158),
        ),
    ],
)
def test_epochs_become_iterations(monkeypatch, images, opts, wanted):
    calls = []
    monkeypatch.setattr(
        datasets,
        "open_records",
        lambda names, filter_empty: calls.append((names, filter_empty)) or [{}] * images,
    )
    cfg = make_cfg("DATASETS.TRAIN", ("x",), "SOLVER.MAX_ITER", 90, "SOLVER.IMS_PER_BATCH", 8)
    cfg.merge_from_list(["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_EPOCHS", 0.0, *opts])
    complete_schedule(cfg)
    found = cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    assert found == wanted
    assert calls == ([(("x",), False)] if opts else [])


def test_iterations_of_the_command_line_replace_epochs(monkeypatch):
    """A trial of ten iterations must not become the recipe's six hundred."""
    monkeypatch.setattr(datasets, "open_records", lambda *_, **__: [{}] * 80)
    opts = ("SOLVER.EPOCHS", 10.0, "SOLVER.MAX_ITER", 7, "TEST.EVAL_EPOCHS", 1.0)
    for given, wanted in ((["SOLVER.MAX_ITER"], 7), (["SOLVER.MAX_ITER", "SOLVER.EPOCHS"], 200)):
        cfg = make_cfg(*opts, "SOLVER.IMS_PER_BATCH", 4)
        complete_schedule(cfg, given)
        assert (wanted, 20) == (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD)


def test_max_iter_of_the_command_line_keeps_the_periods(monkeypatch):
    """Also after --resume, by the config.yaml of the run. Explicit epochs are kept."""
    monkeypatch.setattr(datasets, "open_records", lambda *_, **__: [{}] * 40)
    opts = ["SOLVER.EPOCHS", 8.0, "SOLVER.MIN_ITER", 480, "SOLVER.MAX_ITER", 110]
    opts += ["SOLVER.CHECKPOINT_EPOCHS", 1.0, "TEST.EVAL_EPOCHS", 2.0, "SOLVER.IMS_PER_BATCH", 8]

    def periods(cfg, *given):
        complete_schedule(cfg, given)
        return cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD

    assert periods(make_cfg(*opts)) == (480, 60, 120)
    cfg = make_cfg(*opts)
    assert periods(cfg, "SOLVER.MAX_ITER") == (110, 60, 120)
    assert periods(cfg) == (110, 60, 120)
    given = ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_EPOCHS", "TEST.EVAL_EPOCHS")
    assert periods(make_cfg(*opts), *given) == (110, 5, 10)


def test_negative_epochs_are_refused():
    with pytest.raises(ValueError, match=r"TEST\.EVAL_EPOCHS must be >= 0, got -1\.0"):
        complete_schedule(make_cfg("TEST.EVAL_EPOCHS", -1.0))


@pytest.mark.parametrize(
    ("images", "opts", "done", "seen", "wanted"),
    [
        # 66 images are 17 iterations; the 44 remaining images are 11.
        (11, ("SOLVER.EPOCHS", 6.0), 11, 22, 6),
        (11, ("SOLVER.EPOCHS", 6.0), 7, 70, 17),
        # At least 600 iterations: the remaining number does not depend on the images.
        (20, ("SOLVER.EPOCHS", 12.0, "SOLVER.MIN_ITER", 600), 300, 2400, 300),
        # 1344 iterations for 5376 images, 3376 of which are left.
        (448, ("SOLVER.EPOCHS", 12.0, "SOLVER.MIN_ITER", 600), 1000, 2000, 500),
        (448, ("SOLVER.EPOCHS", 12.0, "SOLVER.MIN_ITER", 2000), 1000, 2000, 1000),
        # MAX_ITER without EPOCHS, also scaled to the number of processes.
        (11, ("SOLVER.MAX_ITER", 100), 40, 80, 40),
        (11, ("SOLVER.MAX_ITER", 100, "SOLVER.REFERENCE_WORLD_SIZE", 1), 40, 320, 80),
    ],
)
def test_other_batch_size_enters_the_schedule(monkeypatch, images, opts, done, seen, wanted):
    monkeypatch.setattr(datasets, "open_records", lambda *_, **__: [{}] * images)
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_EPOCHS", 0.0, *opts)
    complete_schedule(cfg)
    assert enter_schedule(cfg, done, seen) == wanted


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (
            (
                *("SOLVER.EPOCHS", 5.0, "SOLVER.MIN_ITER", 480),
                *("TEST.EVAL_PERIOD", 120, "DATASETS.TEST", ("val",)),
            ),
            "480 iterations of 8 images (96 passes over 40 images; SOLVER.MIN_ITER 480 is the "
            "least, SOLVER.EPOCHS 5 alone would be 25), evaluations every 120",
        ),
        (
            ("SOLVER.EPOCHS", 100.0, "SOLVER.MIN_ITER", 480, "DATASETS.TEST", ()),
            "500 iterations of 8 images (100 passes over 40 images)",
        ),
        (
            ("SOLVER.MAX_ITER", 12, "DATASETS.TEST", ()),
            "12 iterations of 8 images (2.4 passes over 40 images)",
        ),
    ],
)
def test_the_length_of_a_training_is_described(monkeypatch, opts, expected):
    monkeypatch.setattr(derive, "count_training_images", lambda *_: 40)
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", 8, "SOLVER.CHECKPOINT_EPOCHS", 0.0, *opts)
    complete_schedule(cfg)
    assert describe_schedule(cfg, 40) == expected
