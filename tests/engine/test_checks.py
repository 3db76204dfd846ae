"""Checks of processes before they start."""

import re
from functools import partial

import pytest
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog

from atss.config import prune
from atss.config.checks import OF_DETECTIONS, flatten
from atss.engine.checks import (
    check_config,
    check_processes,
    describe_unread,
    describe_unread_by_proposals,
    describe_unused,
    scales_gradients,
    warn_of_objects,
)
from atss.engine.environment import is_started
from atss.engine.run import make_parser
from atss.engine.values import check_training_values, warn_of_frozen, warn_of_sizes, warn_of_warmup
from atss.errors import UserError


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(KEY=value): the environment of one of its two processes."""

    def set_environment(**more):
        environment = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1} | more
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def arguments(*argv):
    return make_parser().parse_args(argv)


def test_batch_must_be_divisible_by_processes(torchrun):
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", 3)
    check_processes(arguments(), cfg)
    with pytest.raises(ValueError, match="must be divisible by 2, the number of processes, got 3"):
        check_processes(arguments("--num-gpus", "2"), cfg)
    torchrun()
    with pytest.raises(ValueError, match="must be divisible by 2, the number of processes, got 3"):
        check_processes(arguments(), cfg)
    check_processes(arguments("--eval-only"), cfg)


@pytest.mark.parametrize(
    ("parts", "processes", "sentence"),
    [
        (
            3,
            1,
            "SOLVER.ACCUMULATE 3 must divide SOLVER.IMS_PER_BATCH 8 into parts of whole images$",
        ),
        (8, 2, "SOLVER.ACCUMULATE 8 must divide .* 8 into .* in each of 2 processes"),
        (0, 1, "SOLVER.ACCUMULATE must be >= 1, got 0"),
        (-2, 1, "SOLVER.ACCUMULATE must be >= 1, got -2"),
    ],
)
def test_parts_of_a_batch_must_be_whole_images(parts, processes, sentence):
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATE", parts)
    with pytest.raises(ValueError, match=sentence):
        check_processes(arguments("--num-gpus", str(processes)), cfg)


def test_key_points_have_no_augmented_test():
    """Detectron2 would refuse them after the training."""
    cfg = make_cfg("TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True)
    with pytest.raises(ValueError, match=r"^TEST\.AUG\.ENABLED True is not possible with .*KEYP"):
        check_config(cfg, training=True)


def test_jitter_does_not_stretch():
    cfg = make_cfg("INPUT.SCALE_JITTER", [0.5, 1.5], "INPUT.RESIZE", "stretch")
    with pytest.raises(ValueError, match=r"^INPUT\.SCALE_JITTER keeps the aspect ratio"):
        check_config(cfg, training=True)
    check_config(cfg, training=False)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("INPUT.RANDOM_FLIP", "both", r"INPUT\.RANDOM_FLIP is 'both': choose from \['none'"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "MIN_SIZE_TRAIN must be the least and the grea"),
        ("INPUT.CROP.TYPE", "random", r"INPUT\.CROP\.TYPE is 'random'"),
        ("SOLVER.BASE_LR", 0.0, r"SOLVER\.BASE_LR must be >= 1e-12, got 0"),
        ("SOLVER.WARMUP_FACTOR", -1.0, r"SOLVER\.WARMUP_FACTOR must be .* got -1"),
        ("SOLVER.WARMUP_METHOD", "x", r"SOLVER\.WARMUP_METHOD is 'x'"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", r"SOLVER\.LR_SCHEDULER_NAME is 'Cosine'"),
        ("SOLVER.STEPS", (10, 5), r"SOLVER\.STEPS must be rising iterations, got \(10, 5\)"),
        ("SEED", 2**40, "SEED must be between"),
    ],
)
def test_values_that_detectron2_finds_wrong_late(key, value, sentence):
    check_training_values(make_cfg())
    steps = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    with pytest.raises(UserError, match=sentence):
        check_training_values(make_cfg(*steps, key, value))


def test_sizes_beyond_the_longer_side_are_named(caplog):
    caplog.set_level("WARNING")
    opts = ("INPUT.MIN_SIZE_TRAIN", (320, 640), "INPUT.MAX_SIZE_TRAIN", 448)
    warn_of_sizes(make_cfg(*opts, "INPUT.MIN_SIZE_TEST", 320, "INPUT.MAX_SIZE_TEST", 448))
    assert [x.getMessage().partition(" is")[0] for x in caplog.records] == [
        "INPUT.MIN_SIZE_TRAIN 640"
    ]
    warn_of_sizes(make_cfg(*opts, "INPUT.RESIZE", "stretch", "INPUT.MAX_SIZE_TEST", 1333))
    assert len(caplog.records) == 1


def test_frozen_random_layers_are_named(caplog):
    caplog.set_level("WARNING")
    warn_of_frozen(make_cfg("MODEL.WEIGHTS", "x.pth"))
    warn_of_frozen(make_cfg("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0))
    warn_of_frozen(make_cfg("MODEL.WEIGHTS", "", config="ATSS_lite0_FPN_fine_tune.yaml"))
    assert not caplog.records
    warn_of_frozen(make_cfg("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 2))
    assert "FREEZE_AT 2 keeps its first layers so" in caplog.text


@pytest.mark.parametrize(
    ("config", "keys", "unused"),
    [
        ("ATSS_lite0_FPN_fine_tune", ["MODEL.RESNETS.DEPTH", "MODEL.TIMM.NAME"], [0]),
        ("ATSS_R_50_FPN_1x", ["MODEL.RESNETS.DEPTH", "MODEL.TIMM.NAME"], [1]),
        ("successors/TOOD_R_50_FPN_1x", ["MODEL.ATSS.DEFORM_TOWER", "MODEL.ATSS.NUM_CONVS"], [0]),
        ("successors/GFL_R_50_FPN_1x", ["MODEL.ATSS.FOCAL_LOSS_GAMMA", "SEED"], [0]),
        ("successors/POTO_R_50_FPN_1x", ["MODEL.ATSS.NMS_THRESH_TEST"], [0]),
        ("ATSS_R_50_FPN_1x", ["MODEL.ATSS.NMS_THRESH_TEST", "MODEL.ATSS.FOCAL_LOSS_GAMMA"], []),
    ],
)
def test_keys_that_nothing_reads_are_named(config, keys, unused):
    found = [x.partition(" ")[0] for x in describe_unused(make_cfg(config=f"{config}.yaml"), keys)]
    assert found == [keys[i] for i in unused]


def test_tiles_read_the_threshold_of_suppression():
    cfg = make_cfg("TEST.TILES.ENABLED", True, config="successors/POTO_R_50_FPN_1x.yaml")
    assert not [*describe_unused(cfg, ["MODEL.ATSS.NMS_THRESH_TEST"])]


def test_forgotten_overlay_is_named():
    cfg = make_cfg(config="successors/TAL_R_50_FPN_1x.yaml")
    assert not [*describe_unused(cfg, [])]
    cfg.MODEL.ATSS.PHASES = []
    assert [*describe_unused(cfg, [])] == [
        "MODEL.ATSS.BRANCH.warm_up has no effect: no branch, phase or part names it"
    ]


def test_tiles_of_masks_are_refused():
    """They would be evaluated as rectangles."""
    cfg = make_cfg("TEST.TILES.ENABLED", True, "MODEL.MASK_ON", True)
    with pytest.raises(ValueError, match=r"^TEST\.TILES merges boxes alone: E"):
        check_config(cfg, training=False)


def test_torchrun_and_launch_do_not_mix(torchrun):
    torchrun()
    with pytest.raises(ValueError, match="leave out --num-gpus"):
        check_processes(arguments("--num-gpus", "2"), make_cfg())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"):
        check_processes(arguments("--num-gpus", "2"), make_cfg("MODEL.DEVICE", "cuda"))


def test_num_gpus_needs_torchrun_on_the_cpu_of_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"MODEL.DEVICE cpu use torchrun"):
        check_processes(arguments("--num-gpus", "2"), make_cfg())


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_missing_variable_of_a_group_is_refused(torchrun, monkeypatch, name):
    torchrun()
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"RANK.* are set, but not {name}: ") as error:
        check_processes(arguments(), make_cfg())
    assert "\n" not in str(error.value)


def test_master_addr_alone_starts_no_group(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert not is_started()


def test_several_machines_need_dist_url():
    """On one machine a free port is found."""
    with pytest.raises(ValueError, match="--num-machines 2 needs --dist-url, such as tcp://"):
        check_processes(arguments("--num-machines", "2"), make_cfg())
    check_processes(arguments("--num-machines", "2", "--dist-url", "tcp://127.0.0.1:1"), make_cfg())


@pytest.mark.parametrize("option", ["--num-gpus", "--num-machines"])
def test_number_of_processes_must_be_positive(option):
    with pytest.raises(ValueError, match=f"^{option} must be >= 1, got 0$"):
        check_processes(arguments(option, "0"), make_cfg())


def test_more_objects_than_the_limit_are_logged(caplog):
    """Crowds are no objects; a test set counts as a training set does."""
    records = [{"annotations": [{}] * n + [{"iscrowd": 1}] * 3} for n in (3, 5, 8)]
    for name in ("train", "test"):
        DatasetCatalog.register(name, partial(list, records))
    sets = ("DATASETS.TRAIN", ("train",), "DATASETS.TEST", ("test",))
    cfg = make_cfg(*sets, "TEST.DETECTIONS_PER_IMAGE", 4)
    warn_of_objects(cfg, training=True)
    for name in ("train", "test"):
        sentence = "more objects than TEST.DETECTIONS_PER_IMAGE 4: set it to 8 or more"
        assert f"Data set {name} has 2 images with {sentence}" in caplog.text
    caplog.clear()
    warn_of_objects(cfg, training=False)
    assert "Data set train" not in caplog.text
    assert "Data set test" in caplog.text
    caplog.clear()
    warn_of_objects(make_cfg(*sets, "TEST.DETECTIONS_PER_IMAGE", 8), training=True)
    assert not caplog.text


EXPORTED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def test_restarts_on_several_machines_need_their_own_store(torchrun, monkeypatch):
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_USE_AGENT_STORE="True", WORLD_SIZE=4)
    with pytest.raises(ValueError, match="need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, exported"):
        check_processes(arguments(), make_cfg())
    for more in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {EXPORTED: 1}):  # static rendezvous
        torchrun(TORCHELASTIC_MAX_RESTARTS=3, WORLD_SIZE=4, **more)
        check_processes(arguments(), make_cfg())
    monkeypatch.delenv(EXPORTED)
    torchrun(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS=3)  # one machine
    check_processes(arguments(), make_cfg())


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": 2}, "RANK must be between 0 and 1, got 2 (WORLD_SIZE is 2, LOCAL_WORLD_SIZE 2)"),
        ({"RANK": "abc"}, "RANK must be a whole number, got 'abc'"),
        ({"RANK": -1}, "RANK must be a whole number, got '-1'"),
        (
            {"LOCAL_WORLD_SIZE": 0},
            "LOCAL_WORLD_SIZE must be between 1 and 2, got 0 (WORLD_SIZE is 2, LOCAL",
        ),
        (
            {"LOCAL_WORLD_SIZE": 3},
            "LOCAL_WORLD_SIZE must be between 1 and 2, got 3 (WORLD_SIZE is 2, LOCAL",
        ),
        (
            {"LOCAL_RANK": 2},
            "LOCAL_RANK must be between 0 and 1, got 2 (WORLD_SIZE is 2, LOCAL_WORLD",
        ),
        (
            {"WORLD_SIZE": 0},
            "WORLD_SIZE must be between 1 and inf, got 0 (WORLD_SIZE is 0, LOCAL_WORLD",
        ),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number, got 'abc'"),
        (
            {"MASTER_PORT": 70000},
            "MASTER_PORT must be between 1 and 65535, got 70000 (WORLD_SIZE is 2",
        ),
        (
            {"MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR 'no.such.host.invalid' has no address: ",
        ),
        ({"LOCAL_RANK": 1}, "RANK 0 has LOCAL_RANK 1 of LOCAL_WORLD_SIZE 2: machines must start "),
        ({"WORLD_SIZE": 3}, "RANK 0 has LOCAL_RANK 0 of LOCAL_WORLD_SIZE 2: machines must start "),
    ],
)
def test_impossible_variables_are_named(torchrun, variables, sentence):
    torchrun(**variables)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        check_processes(arguments(), make_cfg())


def test_unknown_host_of_dist_url_is_named():
    address = ("--num-gpus", "2", "--dist-url", "tcp://no.such.host.invalid:1")
    with pytest.raises(ValueError, match=r"^--dist-url 'no.such.host.invalid' has no address"):
        check_processes(arguments(*address), make_cfg())


def test_scheduler_may_show_each_process_one_gpu(torchrun, monkeypatch):
    """For example SLURM with --gpus-per-task=1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun()
    check_processes(arguments(), make_cfg("MODEL.DEVICE", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun(WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs"):
        check_processes(arguments(), make_cfg("MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 3))


def test_restart_resumes(torchrun, tmp_path):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    args = arguments()
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=0)
    check_processes(args, cfg)
    assert not args.resume
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=1)
    check_processes(args, cfg)
    assert args.resume
    evaluation = arguments("--eval-only")  # evaluates MODEL.WEIGHTS, not the last checkpoint
    check_processes(evaluation, cfg)
    assert not evaluation.resume


def test_restarts_need_a_new_folder_or_resume(torchrun, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=0)
    with pytest.raises(ValueError, match=f"{tmp_path} already contains a run, .*: pass --resume"):
        check_processes(arguments(), cfg)
    check_processes(arguments("--resume"), cfg)
    torchrun(TORCHELASTIC_MAX_RESTARTS=0)
    check_processes(arguments(), cfg)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("MODEL.RETINANET.NMS_THRESH_TEST", 0.4, "on ATSSDetector; use MODEL.ATSS.NMS_THRESH_TEST"),
        ("MODEL.RPN.NMS_THRESH", 0.4, "on ATSSDetector; use MODEL.ATSS.NMS_THRESH_TEST"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "on ATSSDetector; use MODEL.ATSS.NUM_CLASSES"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[9]], "on ATSSDetector; use MODEL.ATSS.ANCHOR_SCALES"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "on ATSSDetector"),
        ("MODEL.ATSS.ASSIGNERS.TAL.TOP_K", 5, "with MODEL.ATSS.ASSIGNER 'ATSS'"),
        ("MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", 5, None),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.25, None),
        ("MODEL.RESNETS.DEPTH", 34, None),
    ],
)
def test_keys_without_effect_are_named(key, value, line):
    cfg = make_cfg(key, value)
    before = dict(flatten(cfg))
    prune(cfg)
    found = [*describe_unread(cfg, before, [key])]
    assert found == ([f"{key} has no effect {line}"] if line else [])


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("MODEL.ATSS.NMS_THRESH_TEST", "; use MODEL.RPN.NMS_THRESH"),
        ("MODEL.ATSS.CLIP_BOXES", ""),
        ("MODEL.ATSS.NUM_CLASSES", None),
        ("MODEL.RPN.NMS_THRESH", None),
    ],
)
def test_keys_of_detections_have_no_effect_on_proposals(key, line):
    found = [*describe_unread_by_proposals([key, "SEED"])]
    assert found == ([] if line is None else [f"{key} has no effect on proposals{line}"])
    assert {*OF_DETECTIONS} <= {*make_cfg().MODEL.ATSS}


def test_scaled_gradients_need_a_gpu():
    assert not scales_gradients(make_cfg())
    assert scales_gradients(make_cfg("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True))
    assert scales_gradients(make_cfg("MODEL.DEVICE", "cuda", "MODEL.ATSS.PRECISION", "fp16"))
    with pytest.raises(ValueError, match=r"AMP.ENABLED needs a GPU; on a CPU set MODEL.ATSS.PREC"):
        scales_gradients(make_cfg("SOLVER.AMP.ENABLED", True))
    with pytest.raises(ValueError, match="PRECISION fp16 needs a GPU"):
        scales_gradients(make_cfg("MODEL.ATSS.PRECISION", "fp16"))


@pytest.mark.parametrize(("total", "advice"), [(40, 4), (5, 1), (99, 9), (100, None)])
def test_long_warm_up_is_named(caplog, total, advice):
    warn_of_warmup(make_cfg("SOLVER.WARMUP_ITERS", 50, "SOLVER.MAX_ITER", total))
    assert bool(caplog.records) == (advice is not None)
    if advice:
        assert caplog.messages[0].endswith(
            f"50 is more than half of SOLVER.MAX_ITER {total}: the learning rate stays low; set "
            f"SOLVER.WARMUP_ITERS {advice}"
        )


@pytest.mark.parametrize(
    ("key", "value"), [("SOLVER.ACCUMULATE", 2), ("MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", True)]
)
def test_keys_of_atss_detector_are_refused_for_others(key, value):
    cfg = make_cfg(key, value, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    reason = f"{key} {value} needs MODEL.META_ARCHITECTURE ATSSDetector, got GeneralizedRCNN"
    with pytest.raises(ValueError, match=reason):
        check_config(cfg, training=True)
