import pytest
import torch
from conftest import ROOT, make_cfg
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer

from atss import add_atss_config
from atss.assigners import ASSIGNER_REGISTRY
from atss.config import (
    autocast_dtype,
    build_assigner,
    resolve_num_classes,
    use_available_device,
)
from atss.errors import UserError


@pytest.fixture
def data_sets():
    """Return a function that registers data sets, {name: number of classes}."""
    names = []

    def register(**counts):
        for name, count in counts.items():
            names.append(name)
            DatasetCatalog.register(name, lambda: [])
            if count is not None:
                MetadataCatalog.get(name).thing_classes = [f"c{i}" for i in range(count)]

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_config_without_our_keys_names_their_function():
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "ATSS_R_50_FPN_1x.yaml"))
    with pytest.raises(UserError, match=r"call atss.add_atss_config\(cfg\) before merge_from_file"):
        build_model(cfg)


def test_number_of_classes_is_that_of_the_data(data_sets):
    data_sets(three_train=3, three_val=3, four=4)
    sets = ("DATASETS.TRAIN", ("three_train",), "DATASETS.TEST", ("three_val",))
    assert resolve_num_classes(make_cfg(*sets, "MODEL.ATSS.NUM_CLASSES", -1)) == 3
    assert resolve_num_classes(make_cfg(*sets)) == 3
    with pytest.raises(ValueError, match="NUM_CLASSES is 5, but data set three_train has 3"):
        resolve_num_classes(make_cfg(*sets, "MODEL.ATSS.NUM_CLASSES", 5))
    cfg = make_cfg("DATASETS.TRAIN", ("three_train",), "DATASETS.TEST", ("four",))
    cfg.MODEL.ATSS.NUM_CLASSES = -1
    sets = r"\(DATASETS.TRAIN is \('three_train',\), TEST is \('four',\)\)"
    with pytest.raises(ValueError, match=f"three_train has 3, but data set four has 4.*{sets}"):
        resolve_num_classes(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("nowhere",)
    with pytest.raises(ValueError, match="none of the data sets \\['nowhere'\\] is registered"):
        resolve_num_classes(cfg)
    data_sets(nameless=None)
    cfg.DATASETS.TRAIN = ("nameless",)
    with pytest.raises(ValueError, match="data set nameless has no thing_classes in its metadata"):
        resolve_num_classes(cfg)


def test_coco_configs_have_80_classes():
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "ATSS_R_50_FPN_1x.yaml"))
    assert resolve_num_classes(cfg) == 80


def test_arguments_of_the_rule_are_checked():
    assert build_assigner(make_cfg("MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", 5)).top_k == 5
    with pytest.raises(ValueError, match=r"unknown MODEL.ATSS.ASSIGNER 'NoSuchRule': choose from"):
        build_assigner(make_cfg("MODEL.ATSS.ASSIGNER", "NoSuchRule"))
    cfg = make_cfg()
    cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOPK = 3
    with pytest.raises(
        ValueError, match=r"ASSIGNERS.ATSS.TOPK is no argument of ATSS: choose from"
    ):
        build_assigner(cfg)


def test_arguments_of_every_rule_are_keys():
    nodes = make_cfg().MODEL.ATSS.ASSIGNERS
    assert nodes.ATSS == {"TOP_K": 9, "COUNT": "anchors", "SIMILARITY": "iou"}
    assert nodes.SpatialScale.RANGES == (64, 128, 256, 512)
    opts = ("MODEL.ATSS.ASSIGNER", "MaxIoU", "MODEL.ATSS.ASSIGNERS.MaxIoU.IN_BOX", True)
    assert build_assigner(make_cfg(*opts)).in_box
    for name in ("ATSS", "DDOD", "MaxIoU", "SpatialScale"):
        build_assigner(make_cfg("MODEL.ATSS.ASSIGNER", name))


def test_own_rule_needs_registration_and_its_keys(tmp_path):

    @ASSIGNER_REGISTRY.register()
    class Nothing:
        def __init__(self, share: float = 0.5):
            self.share = share

    try:
        config = tmp_path / "own.yaml"
        node = "{ASSIGNER: Nothing, ASSIGNERS: {Nothing: {SHARE: 0.25}}}"
        base = ROOT / "configs" / "Base-ATSS.yaml"
        config.write_text(f"_BASE_: {base}\nMODEL: {{ATSS: {node}}}\n")
        cfg = get_cfg()
        add_atss_config(cfg)
        cfg.merge_from_file(str(config))
        assert build_assigner(cfg).share == 0.25
    finally:
        ASSIGNER_REGISTRY.entries.pop("Nothing")


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (
            ("MODEL.ATSS.HEAD", "NoHead"),
            r"unknown MODEL.ATSS.HEAD 'NoHead': choose from \['ATSSHead', 'RPNHead', 'TOODHead', ",
        ),
        (
            ("MODEL.ATSS.IN_FEATURES", ["p2", "p3"]),
            "IN_FEATURES names \\['p2'\\], but the backbone",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"),
            "must be GridAnchorGenerator, got",
        ),
        (("MODEL.FPN.IN_FEATURES", ["res3", "res4"]), "names \\['p7'\\], but the backbone makes"),
        (("MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", 0), "ASSIGNERS.ATSS.TOP_K must be >= 1, got 0"),
        (("MODEL.ATSS.NUM_CLASSES", 0), "must be >= 1, or -1, got 0"),
        (("MODEL.ATSS.SCORE", "cubed"), "unknown MODEL.ATSS.SCORE 'cubed': choose from"),
        (("MODEL.ATSS.PRECISION", "fp64"), "MODEL.ATSS.PRECISION is 'fp64': choose from"),
        (("MODEL.ATSS.PRECISION", "fp16"), "fp16 needs a GPU"),
    ],
)
def test_wrong_value_is_reported_with_its_key(opts, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(make_cfg(*opts))


def test_precision_names_a_dtype():
    assert autocast_dtype(make_cfg()) is None
    assert autocast_dtype(make_cfg("MODEL.ATSS.PRECISION", "bf16")) == torch.bfloat16
    assert autocast_dtype(make_cfg("MODEL.ATSS.PRECISION", "auto")) in (None, torch.bfloat16)


def test_solver_equals_the_authors():
    """Biases, also of norms, have twice the rate and no decay; norm weights decay; a third
    of the rate for 500 iterations, then drops at 60,000 and 80,000."""
    cfg = make_cfg(config="ATSS_R_50_FPN_1x.yaml")
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    settings = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            settings[id(parameter)] = (group["lr"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.endswith("bias")
            assert settings[id(parameter)] == ((0.02, 0.0) if bias else (0.01, 1e-4)), name
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(n.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2")) for n in frozen)

    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = scheduler._multiplier
    for iteration, factor in ((0, 1 / 3), (499, 1 / 3), (500, 1), (60000, 0.1), (80000, 0.01)):
        assert rates(iteration / 90000) == pytest.approx(factor), iteration


def test_fp16_runs_without_a_gpu_in_fp32(monkeypatch):
    """A training in fp16 detects on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = make_cfg("MODEL.DEVICE", "cuda", "MODEL.ATSS.PRECISION", "fp16")
    assert use_available_device(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.ATSS.PRECISION) == ("cpu", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_missing_gpu_is_named(monkeypatch, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = make_cfg("MODEL.DEVICE", "cuda:1", "MODEL.ATSS.PRECISION", precision)
    with pytest.raises(UserError, match=r"MODEL.DEVICE is 'cuda:1', but torch finds no GPU: set"):
        build_model(cfg)
