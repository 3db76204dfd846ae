import pytest
import torch
from conftest import make_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn
from torch.nn import functional as F

from atss.modeling.backbone import FrozenNormConv2d, fold_frozen_norms


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


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_folded_norms_change_nothing_but_rounding(stride_in_1x1):
    cfg = make_cfg("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "FrozenBN")
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    torch.manual_seed(0)
    plain = build_resnet_backbone(cfg, ShapeSpec(channels=3)).double()
    for module in plain.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(buffer, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    folded = build_resnet_backbone(cfg, ShapeSpec(channels=3)).double()
    fold_frozen_norms(folded)
    folded.load_state_dict(plain.state_dict())
    assert not any(type(module) is Conv2d for module in folded.modules())
    x = torch.randn(2, 3, 61, 64, dtype=torch.float64)
    expected, result = plain(x), folded(x)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])
    sum(y.sin().sum() for y in expected.values()).backward()
    sum(y.sin().sum() for y in result.values()).backward()
    for ours, theirs in zip(folded.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_frozen_norms_are_folded():
    def kinds(norm):
        built = build_backbone(make_cfg("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", ""))
        return {type(m) for m in built.bottom_up.modules() if isinstance(m, Conv2d)}

    assert kinds("FrozenBN") == {FrozenNormConv2d}
    assert kinds("GN") == {Conv2d}
