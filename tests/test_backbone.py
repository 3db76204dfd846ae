import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_backbone
from torch.nn import functional as F


@pytest.mark.parametrize(
    ("in_features", "names", "strides"),
    [
        (["res3", "res4", "res5"], "p3 p4 p5 p6 p7", (8, 16, 32, 64, 128)),
        (["res2", "res3", "res4"], "p2 p3 p4 p5 p6", (4, 8, 16, 32, 64)),
    ],
)
def test_levels_grow_out_of_the_last(in_features, names, strides):
    cfg = make_cfg("MODEL.FPN.IN_FEATURES", in_features, "MODEL.FPN.OUT_CHANNELS", 16)
    cfg.MODEL.RESNETS.OUT_FEATURES = in_features
    backbone = build_backbone(cfg).eval()
    assert {k: v.stride for k, v in backbone.output_shape().items()} == dict(
        zip(names.split(), strides, strict=True)
    )
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 128, 160))
    assert list(maps) == names.split()
    for stride, x in zip(strides, maps.values(), strict=True):
        assert x.shape == (1, 16, 128 // stride, -(-160 // stride))
    # The two highest are made of the one below, the last of them after a ReLU.
    last, sixth, seventh = list(maps.values())[-3:]
    torch.testing.assert_close(sixth, backbone.top_block.p6(last))
    torch.testing.assert_close(seventh, backbone.top_block.p7(F.relu(sixth)))
