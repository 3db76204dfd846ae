"""The pruned config.yaml of a run, and where it loads."""

import pytest
import yaml
from conftest import ROOT, make_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import atss.engine.run as way_in
from atss import load_config
from atss.assigners import ASSIGNER_REGISTRY
from atss.config import build_assigner, prune
from atss.config.branches import scale_phases


@pytest.fixture
def register_mine():
    """Yield a function that registers a rule of a third party; remove the rule afterwards."""

    def mine():
        @ASSIGNER_REGISTRY.register()
        class Mine:
            def __init__(self, share: float = 0.5):
                self.share = share

    yield mine
    ASSIGNER_REGISTRY.entries.pop("Mine", None)
    if "squares" in DatasetCatalog:
        DatasetCatalog.remove("squares")
        MetadataCatalog.remove("squares")


def test_dump_contains_arguments_of_named_parts_only(tmp_path):
    cfg = make_cfg()
    full = load_config(ROOT / "configs/ATSS_R_18_FPN_small.yaml")
    prune(cfg)
    assert cfg.MODEL.ATSS.ASSIGNERS == {
        "ATSS": {"TOP_K": 9, "COUNT": "anchors", "SIMILARITY": "iou"}
    }
    assert "CLS_LOSSES" not in cfg.MODEL.ATSS
    build_model(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(tmp_path / "config.yaml")
    assert again.MODEL.ATSS.ASSIGNERS == full.MODEL.ATSS.ASSIGNERS
    prune(again)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_arguments_named_by_branches_stay():
    cfg = make_cfg("MODEL.ATSS.BRANCHES", ["points"])
    own = {"ASSIGNER": "SpatialScale", "PHASES": [["first", 9]]}
    cfg.MODEL.ATSS.BRANCH.points = type(cfg)(own)
    cfg.MODEL.ATSS.BRANCH.first = type(cfg)({"ASSIGNER": "MaxIoU"})
    prune(cfg)
    assert set(cfg.MODEL.ATSS.ASSIGNERS) == {"ATSS", "SpatialScale", "MaxIoU"}
    build_model(cfg)


def test_group_that_an_overlay_sets_stays():
    cfg = make_cfg("MODEL.ATSS.BRANCHES", ["b"])
    own = {"CLS_LOSS": "focal", "CLS_LOSSES": {"focal": {"GAMMA": 1.0}}}
    cfg.MODEL.ATSS.BRANCH.b = type(cfg)(own)
    prune(cfg)
    assert build_model(cfg).branches["b"].at(0).criterion.cls_loss.gamma == 1.0


@pytest.mark.parametrize("chosen", [False, True])
def test_config_loads_without_an_unused_third_party_rule(register_mine, squares, tmp_path, chosen):
    """The rule is registered for the dump, absent, registered again."""
    register_mine()
    opts = ["MODEL.ATSS.ASSIGNER", "Mine" if chosen else "ATSS", "DATASETS.TRAIN", "('squares',)"]
    opts += ["DATASETS.TEST", "('squares',)", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    register = f"squares={squares}/annotations.json:{squares}/images"
    config = str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")
    argv = ["--config-file", config, "--register", register, *opts]
    cfg = way_in.prepare(way_in.make_parser().parse_args(argv))
    (tmp_path / "config.yaml").write_text(cfg.dump())

    del ASSIGNER_REGISTRY.entries["Mine"]
    argv = ["--config-file", str(tmp_path / "config.yaml"), "--register", register, "--eval-only"]
    arguments = way_in.make_parser().parse_args(argv)
    way_in.prepare(arguments)  # to evaluate, it is not needed in any case
    arguments.eval_only = False
    if not chosen:
        way_in.prepare(arguments)
        return
    with pytest.raises(
        ValueError, match=r"unknown ASSIGNER MODEL\.ATSS\.ASSIGNERS\.Mine: choose from \['ATSS'"
    ):
        way_in.prepare(arguments)
    register_mine()
    assert build_assigner(way_in.prepare(arguments)).share == 0.5


def test_ends_of_phases_are_scaled_with_the_length():
    """Iterations, also of branches; shares of the length are unaffected."""
    cfg = make_cfg(config="successors/TAL_dual_R_50_FPN_1x.yaml")
    node = cfg.MODEL.ATSS
    node.PHASES = [["warm_up", 30], ["second", 0.5]]
    node.BRANCH = CfgNode({"warm_up": {}, "other": {"PHASES": [["warm_up", 1]]}})
    before = node.clone()
    scale_phases(cfg, 1.0)
    assert node == before
    scale_phases(cfg, 0.125)
    assert node.PHASES == [["warm_up", 4], ["second", 0.5]]
    assert node.BRANCH.other.PHASES == [["warm_up", 1]]
