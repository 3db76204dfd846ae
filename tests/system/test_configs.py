"""Every config of configs/: it builds, trains a step, detects, and MODEL_ZOO.md lists it."""

import re

import pytest
import torch
from conftest import CONFIGS, ROOT, THIN, make_cfg, make_input
from detectron2.modeling import build_model
from torch.nn.parallel import DistributedDataParallel

from atss import load_config
from atss.analysis.plans import paper_ap
from atss.assigners import ASSIGNER_REGISTRY
from atss.config import check_model, get_config_file
from atss.engine.solver import build_optimizer

# {recipe: recipes that precede it}
RECIPES = {
    "small": [],
    "ablation": [],
    "digits": ["fine_tune.yaml"],
    "fine_tune": [],
    "fine_tune_coco": [],
    "fine_tune_coco_small": [],
}
# Keys of MODEL.ATSS that a recipe may set: they depend on levels, size and machine.
OF_RECIPES = ("IN_FEATURES", "NUM_CONVS", "PRECISION", "CHANNELS_LAST", "IMS_PER_BATCH_TEST")
ROWS = sorted(path.stem for path in ROOT.glob("configs/tables/*.yaml"))
ZOO = (ROOT / "MODEL_ZOO.md").read_text()


def small(name):
    """Return the config of a narrow and shallow model, which trains in seconds."""
    cfg = make_cfg("MODEL.FPN.OUT_CHANNELS", 64, config=f"{name}.yaml")
    resnet = cfg.MODEL.RESNETS
    if resnet.DEPTH > 18:
        cfg.merge_from_list([x for item in THIN.items() for x in item])
        resnet.NUM_GROUPS = min(resnet.NUM_GROUPS, 4)
    return cfg


def as_it_is(name):
    return make_cfg(config=f"{name}.yaml")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Initialise a process group of one process."""
    meeting = f"file://{tmp_path_factory.mktemp('group')}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, small) for name in CONFIGS]
    + [pytest.param(name, as_it_is, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_every_config_builds_trains_and_detects(name, size, one_process):
    """Under DDP, as on GPUs: the second step raises an error if a parameter got no gradient in the
    first."""
    torch.manual_seed(0)
    cfg = size(name)
    cfg.MODEL.ATSS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg).train()
    example = make_input([[20, 20, 90, 80], [5, 60, 30, 90]], [1, 2])
    under_ddp = DistributedDataParallel(model)
    for _ in range(2):
        losses = under_ddp([example])
        sum(losses.values()).backward()
    trained = [p for p in model.head.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert model.head.bbox_pred.weight.grad.abs().max() > 0
    model.eval()
    with torch.no_grad():
        found = model([example])[0]["instances"]
    assert len(found) > 0
    assert torch.isfinite(found.pred_boxes.tensor).all()
    assert (found.scores[:-1] >= found.scores[1:]).all()


@pytest.mark.parametrize("row", ROWS)
def test_zoo_lists_every_row_with_the_papers_ap(row):
    listed = re.findall(rf"\[{row}\]\(configs/tables/{row}\.yaml\) \| ([\d.]*) ", ZOO)
    assert set(listed) == {paper_ap(get_config_file(f"tables/{row}"))}


def test_points_require_one_anchor_per_location():
    with pytest.raises(ValueError, match=r"ANCHOR_SCALES and ANCHOR_RATIOS must make one"):
        build_model(make_cfg("MODEL.ATSS.REGRESSION", "point", config="tables/atss_A9.yaml"))


def test_smooth_l1_requires_deltas():
    with pytest.raises(ValueError, match="smooth_l1 cannot be used: the box regression"):
        build_model(make_cfg("MODEL.ATSS.REGRESSION", "point", config="tables/retinanet_A1.yaml"))


@pytest.mark.parametrize("key", ["REGRESSION", "BBOX_REG_LOSS_TYPE"])
def test_unknown_name_is_reported_with_choices(key):
    with pytest.raises(ValueError, match=rf"unknown MODEL\.ATSS\.{key} 'x': choose from \['"):
        build_model(make_cfg(f"MODEL.ATSS.{key}", "x"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("row", ROWS)
def test_recipe_keeps_rule_and_losses_of_every_row(row, recipe):
    files = [f"tables/{row}.yaml", *RECIPES[recipe], f"{recipe}.yaml"]
    plain = load_config(ROOT / "configs" / files[0])
    cfg = load_config(*(ROOT / "configs" / file for file in files))
    ours, before = cfg.clone().MODEL.ATSS, plain.clone().MODEL.ATSS
    for node in (ours, before):
        for key in OF_RECIPES:
            del node[key]
        del node.ASSIGNERS.SpatialScale["RANGES"]
    assert ours == before
    check_model(for_three_classes(cfg), training=True)


@pytest.mark.parametrize("row", ["atss_box", "fcos_original", "ssc_box", "retinanet_A9"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_with_a_row_of_each_rule(row, recipe):
    files = [f"tables/{row}.yaml", *RECIPES[recipe], f"{recipe}.yaml"]
    cfg = for_three_classes(load_config(*(ROOT / "configs" / file for file in files)))
    with torch.device("meta"):
        model = build_model(cfg)
    rule = ASSIGNER_REGISTRY.get(cfg.MODEL.ATSS.ASSIGNER)
    assert isinstance(model.branches["main"].at(0).assigner, rule)
    assert len(model.anchor_generator.strides) == len(cfg.MODEL.ATSS.IN_FEATURES)


def for_three_classes(cfg):
    """Set three classes and the meta device, for any data, without allocating weights."""
    cfg.MODEL.DEVICE = "meta"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.ATSS.NUM_CLASSES = 3
    return cfg


def test_fine_tuning_scales_backbone_rate_and_decays_weights():
    cfg = make_cfg("MODEL.DEVICE", "meta", config="ATSS_R_50_FPN_fine_tune.yaml")
    with torch.device("meta"):
        model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    found = {x: (g["lr"], g["weight_decay"]) for g in groups for x in g["params"]}
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert set(found) == set(trained.values())
    for name, x in trained.items():
        rate = 1e-5 if name.startswith("backbone.bottom_up.") else 1e-4
        assert found[x] == pytest.approx((rate, 0.05 if x.ndim > 1 else 0.0)), name
    stages = {name.split(".")[2] for name in trained if name.startswith("backbone.bottom_up.")}
    assert stages == {"res3", "res4", "res5"}
    assert not any("norm" in name for name in trained if name.startswith("backbone."))
