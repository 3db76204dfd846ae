"""Every config of configs/: builds, trains a step, detects; and the page that lists them."""

import re

import pytest
import torch
from conftest import ROOT, make_cfg, make_input
from detectron2.modeling import build_model

CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in ROOT.glob("configs/**/*.yaml")
    if path.stem not in ("Base-ATSS", "ablation")  # what others are made of
)
ROWS = sorted(path.stem for path in ROOT.glob("configs/tables/*.yaml"))
ZOO = (ROOT / "MODEL_ZOO.md").read_text()
# A narrow ResNet-18 in place of whatever it is, so that all of them take seconds.
SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_trains_and_detects(name):
    torch.manual_seed(0)
    model = build_model(make_cfg(*SMALL, config=name)).train()
    example = make_input([[20, 20, 90, 80], [5, 60, 30, 90]], [1, 2])
    losses = model([example])
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
def test_the_zoo_lists_every_row_with_the_papers_ap(row):
    comment = (ROOT / f"configs/tables/{row}.yaml").read_text().replace("\n# ", " ")
    ap = re.search(r"the paper's AP (\d\d\.\d)\.", comment).group(1)
    listed = re.findall(rf"\[{row}\]\(configs/tables/{row}\.yaml\) \| ([\d.]+) ", ZOO)
    assert listed
    assert set(listed) == {ap}


def test_points_want_one_anchor_per_location():
    with pytest.raises(ValueError, match=r"ANCHOR_SCALES and ANCHOR_RATIOS must make one"):
        build_model(make_cfg("MODEL.ATSS.REGRESSION", "point", config="tables/atss_A9.yaml"))


def test_smooth_l1_wants_deltas():
    with pytest.raises(ValueError, match="smooth_l1 compares deltas"):
        build_model(make_cfg("MODEL.ATSS.REGRESSION", "point", config="tables/retinanet_A1.yaml"))


@pytest.mark.parametrize("key", ["REGRESSION", "BBOX_REG_LOSS_TYPE"])
def test_unknown_names_are_refused_with_those_that_are_known(key):
    with pytest.raises(ValueError, match=rf"unknown MODEL\.ATSS\.{key} 'x'; known: \['"):
        build_model(make_cfg(f"MODEL.ATSS.{key}", "x"))
