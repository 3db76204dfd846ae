import copy
import threading
from functools import partial

import pytest
import torch
from conftest import make_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from dispatch import Operators
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from atss.config.build import build_levels
from atss.modeling import backbone, foreach
from atss.modeling.backbone import (
    FoldedFPN,
    FrozenNormConv2d,
    P6P7FromP5,
    fold_frozen_norms,
    freeze_unused,
)


@pytest.mark.parametrize(
    ("in_features", "names", "strides"),
    [
        (["res3", "res4", "res5"], "p3 p4 p5 p6 p7", (8, 16, 32, 64, 128)),
        (["res2", "res3", "res4"], "p2 p3 p4 p5 p6", (4, 8, 16, 32, 64)),
    ],
)
def test_top_levels_are_computed_from_the_last_level(in_features, names, strides):
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


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_one_column_maps_are_exact_in_bfloat16(width):
    """Of torch's kernel for some processors they are made of what is left in memory."""
    top = P6P7FromP5(256, relu_before_p7=False)
    p5 = torch.randn(2, 256, 6, width).to(torch.bfloat16)
    exact = copy.deepcopy(top)
    left = [torch.full((2**i,), 1e4) for i in range(6, 18)]
    del left  # in memory that comes next
    x = p5.clone().requires_grad_()
    p6, p7 = top.to(torch.bfloat16)(x)
    (p6.sum() + p7.sum()).backward()
    for conv in (exact.p6, exact.p7):  # bfloat16's weights
        conv.weight.data = conv.weight.data.to(torch.bfloat16).float()
    y = p5.float().requires_grad_()
    p6_exact = exact.p6(y)
    p7_exact = exact.p7(p6_exact)
    (p6_exact.sum() + p7_exact.sum()).backward()
    pairs = [(p6, p6_exact), (p7, p7_exact), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(top.parameters(), exact.parameters(), strict=True)]
    for rounded, full in pairs:
        assert rounded.shape == full.shape
        assert (rounded.float() - full).norm() < 0.01 * full.norm()


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_folded_norms_equal_norms_up_to_rounding(stride_in_1x1):
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
        norms = ("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "")
        built = build_backbone(make_cfg(*norms, config="ATSS_R_18_FPN_small.yaml"))
        return {type(m) for m in built.bottom_up.modules() if isinstance(m, Conv2d)}

    assert kinds("FrozenBN") == {FrozenNormConv2d}
    assert kinds("GN") == {Conv2d}


@pytest.mark.parametrize("top", [P6P7FromP5(16, in_feature="p5"), LastLevelP6P7(256, 16), None])
@pytest.mark.parametrize(
    "levels", ["p3", "p4", "p5", "p3 p4 p5", "p3 p6", "p6", "p7", "p4 p7", "p3 p4 p5 p6 p7"]
)
def test_unused_fpn_convolutions_are_frozen(top, levels):
    """All that gets one, and no more."""
    levels = levels.split()
    if top is None and max(levels) > "p5":
        pytest.skip("no such level")
    cfg = make_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    fpn = FPN(bottom_up, ["res3", "res4", "res5"], 16, top_block=copy.deepcopy(top))
    maps = fpn(torch.randn(1, 3, 128, 128))
    names, parameters = zip(*fpn.named_parameters(), strict=True)
    total = torch.stack([maps[x].sum() for x in levels]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    freeze_unused(fpn, levels)
    for name, x, gradient in zip(names, parameters, gradients, strict=True):
        # The bottom-up is there for p5 and below; of the rest of it nobody asks.
        if not name.startswith("bottom_up"):
            assert x.requires_grad == (gradient is not None), name


def test_detectron2_fpn_without_its_finest_level():
    cfg = make_cfg("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ATSS.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    fpn = build_levels(cfg)[0]
    frozen = {k.rpartition(".")[0] for k, x in fpn.named_parameters() if not x.requires_grad}
    assert {x.partition(".")[0] for x in frozen} == {"fpn_lateral2", "fpn_output2"}


def folded_conv():
    conv = Conv2d(3, 4, 1, bias=False, norm=FrozenBatchNorm2d(4))
    fold_frozen_norms(conv)
    return conv


def test_a_folded_norm_follows_its_statistics():
    """Loaded, moved to another type, or written."""
    conv, x = folded_conv(), torch.randn(2, 3, 4, 4)
    plain = conv(x)
    state = conv.state_dict()
    conv.load_state_dict(state | {"norm.weight": 2 * state["norm.weight"]})
    torch.testing.assert_close(conv(x), 2 * plain)
    conv.norm.weight.mul_(2)
    torch.testing.assert_close(conv(x), 4 * plain)
    assert conv.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(copy.deepcopy(conv.float())(x), 4 * plain)


def test_training_after_inference_with_folded_norms():
    conv, x = folded_conv(), torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        conv(x)
    conv(x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        made_there = folded_conv()
        assert made_there(x).shape == (2, 4, 4, 4)


def test_a_copy_follows_its_own_statistics():
    """Also if it has been loaded as often as the original: averaged weights are such a copy."""
    conv, x = folded_conv(), torch.randn(2, 3, 4, 4)
    state = conv.state_dict()
    for _ in range(2):
        conv.load_state_dict(state)
    plain, other = conv(x), copy.deepcopy(conv)
    other.load_state_dict(state | {"norm.weight": 2 * state["norm.weight"]})
    torch.testing.assert_close(other(x), 2 * plain)
    conv.norm.weight.data.mul_(4)
    torch.testing.assert_close(conv(x), 4 * plain)


def thin_fpn(seed: int = 0) -> FPN:
    """With norms that do something; the stem and res2 are frozen."""
    torch.manual_seed(seed)
    options = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.NUM_GROUPS", 2)
    options += ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.FPN.NORM", "")
    fpn = build_backbone(make_cfg(*options, "MODEL.FPN.OUT_CHANNELS", 8))
    with torch.no_grad():
        for buffer in fpn.buffers():
            buffer.uniform_(0.5, 1.5)
    return fpn


def gradients(fpn, *passes) -> dict[str, torch.Tensor]:
    """Outputs and gradients, of one backward pass after these calls of functions of the FPN."""
    results = [run(fpn) for run in passes]
    sum(y.sin().sum() for maps in results for y in maps.values()).backward()
    found = {name: x.grad for name, x in fpn.named_parameters() if x.grad is not None}
    return found | {name: y for maps in results for name, y in maps.items()}


@pytest.fixture
def grouped(monkeypatch):
    monkeypatch.setattr(foreach, "ONE_BY_ONE", set())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_norms_folded_by_stage_equal_norms_folded_alone(precision, memory_format, monkeypatch):
    def result(groups):
        monkeypatch.setattr(foreach, "ONE_BY_ONE", set() if groups else {"cpu"})
        fpn = thin_fpn().to(memory_format=memory_format)
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with Operators() as operators, torch.autocast("cpu", precision, precision is not None):
            found = gradients(fpn, lambda fpn: fpn(x))
        return found, operators.count

    (alone, before), (groups, after) = result(False), result(True)
    assert alone.keys() == groups.keys()
    for name, x in alone.items():
        assert torch.equal(groups[name], x), name
    convs = [x for x in thin_fpn().modules() if type(x) is FrozenNormConv2d]
    assert not any(k.startswith(("bottom_up.stem", "bottom_up.res2")) for k in alone)
    # Five groups, and gradients of three.
    trained = sum(conv.weight.requires_grad for conv in convs)
    assert before["mul"] - after["mul"] == 3 * len(convs) + trained
    assert after["_foreach_mul"] == 5 + 3 + 1
    if precision is not None:
        assert after["_foreach_copy_"] == 5 + 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_folded_norms_with_activation_checkpointing(reentrant, grouped):
    """As activation checkpointing does, in the backward pass."""
    x = torch.randn(1, 3, 64, 64).double()
    expected = gradients(thin_fpn().double(), lambda fpn: fpn(x))
    fpn = thin_fpn().double()
    for stage in (fpn.bottom_up.res3, fpn.bottom_up.res4):
        for block in stage:
            forward = block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=reentrant)
    found = gradients(fpn, lambda fpn: fpn(x.requires_grad_()))
    for name, y in expected.items():
        torch.testing.assert_close(found[name], y)


def test_concurrent_passes_do_not_share_folded_weights(grouped):
    """One within another, in a thread beside it, twice, and after one that failed."""
    x = torch.randn(1, 3, 64, 64)
    expected = gradients(thin_fpn(), lambda fpn: fpn(x), lambda fpn: fpn(x))

    def disturb(module, inputs):
        hook.remove()
        thread = threading.Thread(target=fpn, args=(x,))
        thread.start()
        thread.join()
        with torch.inference_mode():
            fpn(x)

    fpn = thin_fpn()
    failing = fpn.bottom_up.res4.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fpn(x)
    failing.remove()
    assert backbone._folded_weights.get() is None
    hook = fpn.bottom_up.res4[1].register_forward_pre_hook(disturb)
    found = gradients(fpn, lambda fpn: fpn(x), lambda fpn: fpn(x))
    for name, y in expected.items():
        assert torch.equal(found[name], y), name


def test_a_folded_backbone_is_saved_and_copied(grouped, tmp_path):
    x = torch.randn(1, 3, 64, 64)
    fpn = thin_fpn()
    expected = fpn(x)
    torch.save(fpn, tmp_path / "fpn.pth")
    loaded = torch.load(tmp_path / "fpn.pth", weights_only=False)
    for other in (loaded, copy.deepcopy(fpn)):
        with torch.no_grad():
            for p in fpn.parameters():
                p.zero_()  # the other's are its own
        for name, y in other(x).items():
            assert torch.equal(y, expected[name])
        fpn.load_state_dict(thin_fpn().state_dict())


def test_inference_holds_the_folded_weights_of_one_stage(grouped):
    fpn, held = thin_fpn(), []

    def note(module, inputs):
        held.append(sum(y.numel() for y in backbone._folded_weights.get()._weights.values()))

    stages = [getattr(fpn.bottom_up, name) for name in ("res3", "res4", "res5")]
    for stage in stages:
        stage.register_forward_pre_hook(note)
    with torch.no_grad():
        fpn(torch.randn(1, 3, 64, 64))
    assert held == [0, 0, 0]


def test_a_shared_folded_convolution_learns_from_both_calls(grouped):
    conv = folded_conv()
    twice = nn.Sequential(conv, nn.Conv2d(4, 3, 1), conv)
    bottom_up = type("BottomUp", (Backbone,), {"forward": lambda self, x: {"res2": self.all(x)}})()
    bottom_up.all = twice
    bottom_up.output_shape = lambda: {"res2": ShapeSpec(channels=4, stride=4)}
    fpn, x = FoldedFPN(bottom_up, ["res2"], 8), torch.randn(1, 3, 4, 4)
    found = gradients(fpn, lambda fpn: fpn(x))
    conv.__class__ = Conv2d
    fpn.zero_grad()
    for name, y in gradients(fpn, lambda fpn: fpn(x)).items():
        torch.testing.assert_close(found[name], y)
