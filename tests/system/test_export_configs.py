"""Every config, a LazyConfig and own parts: they export, or one sentence refuses them.

`tests/export_table.py` does the same for configs at their full size.
"""

import os

import pytest
import torch
from conftest import CONFIGS, ROOT, THIN, make_cfg
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from export_table import network_key, stir
from exported import with_own_backbone

from atss import load_config
from atss.config import for_inference
from atss.errors import UserError
from atss.export import export_onnx, metadata

NAMES = ("MODEL.ATSS.CLASS_NAMES", ["ant", "bee", "cat"], "MODEL.ATSS.NUM_CLASSES", 3)
SMALL = (*NAMES, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.TIMM.PRETRAINED", False)
# Networks that a test of this process exported.
EXPORTED = set()


def build(name):
    """Return a config and its model, narrow and shallow."""
    cfg = make_cfg(*SMALL, config=f"{name}.yaml")
    resnet = cfg.MODEL.RESNETS
    if resnet.DEPTH > 18:
        cfg.merge_from_list([x for item in THIN.items() for x in item])
        resnet.NUM_GROUPS = min(resnet.NUM_GROUPS, 4)
    cfg = for_inference(cfg)
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_exports(name, tmp_path):
    cfg, model = build(name)
    key = network_key(model)
    if key in EXPORTED:  # by the test of a config whose network is the same
        assert metadata(model, cfg)["classes"] == ["ant", "bee", "cat"]
        return
    parities = export_onnx(stir(model), cfg, tmp_path / "model.onnx")
    assert len(parities) == 3
    EXPORTED.add(key)


@pytest.mark.slow
def test_lazy_config_exports_with_the_yaml_config(new_setuptools, tmp_path):
    lazy = LazyConfig.load(str(ROOT / "configs" / "ATSS_R_50_FPN_1x.py")).model
    lazy.num_classes = 3
    model = instantiate(lazy)
    cfg = load_config("ATSS_R_50_FPN_1x", opts=NAMES)
    export_onnx(model, cfg, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
def test_own_backbone_without_divisor_exports(monkeypatch, tmp_path):
    model, cfg = with_own_backbone(monkeypatch)
    one_cell = export_onnx(model, cfg, tmp_path / "model.onnx")[-1]
    assert one_cell.shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_backbone_that_branches_on_values_is_named(monkeypatch, tmp_path):
    model, cfg = with_own_backbone(monkeypatch, "branches")
    place = r"branches on values.*exported.py, line \d+, `if self.branches and"
    with pytest.raises(UserError, match=place):
        export_onnx(model, cfg, tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)
