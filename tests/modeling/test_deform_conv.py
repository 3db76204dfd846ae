import itertools

import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_backbone
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from atss.modeling.deform_conv import DeformConv, DeformConvLayer, sampled_conv2d


def bilinear(image, y, x):
    """Value of an (H, W) image at a point in pixels, zero outside."""
    height, width = image.shape
    y0, x0 = torch.floor(y), torch.floor(x)
    value = torch.zeros((), dtype=image.dtype)
    for i, j in itertools.product((0, 1), (0, 1)):
        row, column = int(y0) + i, int(x0) + j
        if 0 <= row < height and 0 <= column < width:
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            value = value + weight * image[row, column]
    return value


def slow(x, offset, mask, weight, stride, groups):
    """The papers' sums, tap by tap; padding 1."""
    n, _, height, width = offset.shape
    y = torch.zeros(n, len(weight), height, width, dtype=x.dtype)
    per_group = weight.shape[1]
    for i, o, r, c in itertools.product(range(n), range(len(weight)), range(height), range(width)):
        group = o // (len(weight) // groups)
        total = torch.zeros((), dtype=x.dtype)
        for tap, (ky, kx) in enumerate(itertools.product(range(3), range(3))):
            py = r * stride - 1 + ky + offset[i, 2 * tap, r, c]
            px = c * stride - 1 + kx + offset[i, 2 * tap + 1, r, c]
            m = 1 if mask is None else mask[i, tap, r, c]
            for k in range(per_group):
                sample = bilinear(x[i, group * per_group + k], py, px)
                total = total + m * weight[o, k, ky, kx] * sample
        y[i, o, r, c] = total
    return y


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_equals_the_formula_of_the_paper(modulated, stride, groups):
    """Forward and gradients of everything, in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    height, width = -(-4 // stride), -(-5 // stride)
    x, offset = random(1, 2, 4, 5), random(1, 18, height, width)
    weight = random(2, 2 // groups, 3, 3)
    mask = random(1, 9, height, width) if modulated else None
    layer = DeformConv(nn.Parameter(weight.detach().clone()), stride=stride, padding=1)
    ours, expected = layer(x, offset, mask), slow(x, offset, mask, weight, stride, groups)
    torch.testing.assert_close(ours, expected)
    inputs = [t for t in (x, offset, mask) if t is not None]
    mine = torch.autograd.grad(ours.square().sum(), [*inputs, layer.weight])
    theirs = torch.autograd.grad(expected.square().sum(), [*inputs, weight])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("hw", "kernel", "geometry", "groups", "offset_groups"),
    [
        ((7, 9), (3, 3), ((1, 1), (1, 1), (1, 1)), 1, 1),
        ((8, 8), (3, 3), ((2, 2), (1, 1), (1, 1)), 4, 2),
        ((6, 11), (3, 2), ((1, 2), (2, 0), (2, 1)), 2, 4),
        ((1, 5), (3, 3), ((1, 1), (1, 1), (1, 1)), 1, 1),
        ((1, 1), (3, 3), ((1, 1), (1, 1), (1, 1)), 1, 1),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 1.5, 1e4])
@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_cpu_code_equals_torchvision(
    hw, kernel, geometry, groups, offset_groups, spread, modulated
):
    """Whatever the geometry; where taps lie on whole pixels, on the border and far away, too."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    stride, padding, dilation = geometry
    size = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, s, p, d, k in zip(hw, stride, padding, dilation, kernel, strict=True)
    ]
    taps = kernel[0] * kernel[1]
    x, weight, bias = random(2, 8, *hw), random(12, 8 // groups, *kernel), random(12)
    offset = random(2, 2 * taps * offset_groups, *size, scale=spread)
    mask = random(2, taps * offset_groups, *size) if modulated else None
    inputs = [t for t in (x, offset, weight, bias, mask) if t is not None]
    found = [
        operator(x, offset, weight, bias, *geometry, mask)
        for operator in (sampled_conv2d, deform_conv2d)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    last = [t.to(memory_format=torch.channels_last) for t in (x, offset, weight)]
    torch.testing.assert_close(sampled_conv2d(*last, bias, *geometry, mask), found[0])
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in found]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("offset", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_offsets(offset, axis):
    """NaN is not hidden, so that the trainer can say where it came from, nor does it end the
    process, as in torchvision's operator on CPUs; what is infinitely far is beyond the map."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4, 5, 6, generator=generator), torch.randn(4, 4, 3, 3)
    geometry = ((1, 1), (1, 1), (1, 1))
    moved, far = torch.zeros(1, 18, 5, 6), torch.zeros(1, 18, 5, 6)
    moved[0, 8 + axis, 2, 3], far[0, 8 + axis, 2, 3] = offset, 1e4
    found = sampled_conv2d(x, moved, weight, None, *geometry, None)
    expected = deform_conv2d(x, far, weight, None, *geometry, None)
    if offset is torch.nan:
        expected[0, :, 2, 3] = torch.nan
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_empty_batch_stays_empty():
    layer = DeformConvLayer(8, groups=2)
    x = torch.zeros(0, 8, 6, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert layer.conv.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_starts_as_a_plain_convolution(modulated):
    layer = DeformConvLayer(8, modulated)
    x = torch.randn(2, 8, 6, 7)
    plain = nn.functional.conv2d(x, layer.conv.weight, padding=1) * (0.5 if modulated else 1)
    expected = plain + layer.conv.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_autocast_keeps_positions_exact():
    layer = DeformConvLayer(8)
    nn.init.normal_(layer.offset.bias, std=3)
    x = torch.randn(1, 8, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_backbone_has_names_and_shapes_of_detectron2(modulated):
    """The blocks are Detectron2's, so that its checkpoints load; only their operator is swapped."""
    opts = (
        *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
        *("MODEL.RESNETS.NUM_GROUPS", 2, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
        *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]),
        *("MODEL.RESNETS.DEFORM_MODULATED", modulated, "MODEL.FPN.OUT_CHANNELS", 16),
    )
    backbone = build_backbone(make_cfg(*opts))
    ours = {k: tuple(v.shape) for k, v in backbone.bottom_up.state_dict().items()}
    # As DeformBottleneckBlock of Detectron2 names them: the 3 x 3 convolution without bias.
    assert ours["res4.1.conv2_offset.weight"] == (27 if modulated else 18, 64, 3, 3)
    assert ours["res4.1.conv2_offset.bias"] == (27 if modulated else 18,)
    assert ours["res4.1.conv2.weight"] == (64, 32, 3, 3)
    assert "res4.1.conv2.norm.running_var" in ours
    assert "res4.1.conv2.bias" not in ours
    plain = make_cfg(*opts, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4)
    assert set(ours) - set(build_backbone(plain).bottom_up.state_dict()) == {
        f"{stage}.{i}.conv2_offset.{kind}"
        for stage, blocks in (("res4", 6), ("res5", 3))
        for i in range(blocks)
        for kind in ("weight", "bias")
    }
    kinds = [type(m) for m in backbone.modules()]
    assert kinds.count(DeformConv) == 6 + 3
    maps = backbone(torch.randn(1, 3, 64, 64))
    sum(m.sum() for m in maps.values()).backward()
    block = backbone.bottom_up.res4[1]
    assert block.conv2.weight.grad.abs().max() > 0
    assert block.conv2_offset.weight.grad.abs().max() > 0


def test_zero_offsets_equal_the_plain_backbone():
    """Version 1; version 2 begins with taps of half weight."""
    opts = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    opts += ("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 16)
    plain = build_backbone(make_cfg(*opts)).eval()
    deform = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
    deformable = build_backbone(make_cfg(*opts, *deform)).eval()
    missing = deformable.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("conv2_offset" in key for key in missing)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(plain(x).values(), deformable(x).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_offset_groups_move_their_own_channels(modulated):
    """The second half of the channels, one pixel to the right: as if they were shifted left."""
    opts = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    opts += ("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 16)
    opts += ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, False])
    opts += ("MODEL.RESNETS.DEFORM_MODULATED", modulated, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2)
    block = build_backbone(make_cfg(*opts)).bottom_up.res3[1].eval()
    x = torch.randn(1, 512, 6, 9)
    with torch.no_grad():
        offsets = block.conv2_offset.bias[: 2 * 18].view(2, 9, 2)  # group, tap, (y, x)
        offsets[1, :, 1] = 1
        if modulated:
            block.conv2_offset.bias[2 * 18 :] = 100  # weights of taps all but 1
        y = F.relu(block.conv1(x))
        still, moved = y.chunk(2, dim=1)
        shifted = torch.cat([still, moved.roll(-1, dims=3)], dim=1)
        inner = F.relu(block.conv2.norm(F.conv2d(shifted, block.conv2.weight, padding=1)))
        expected = F.relu(block.conv3(inner) + x)
        torch.testing.assert_close(block(x)[..., 1:-2], expected[..., 1:-2], atol=1e-5, rtol=1e-4)


def test_offsets_are_frozen_with_their_block():
    opts = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    opts += ("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 16)
    opts += ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, False])
    bottom_up = build_backbone(make_cfg(*opts, "MODEL.BACKBONE.FREEZE_AT", 3)).bottom_up
    assert not any(p.requires_grad for p in bottom_up.res3.parameters())
    assert all(p.requires_grad for p in bottom_up.res4.parameters())


def test_resnets_without_bottlenecks_are_refused():
    opts = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True])
    with pytest.raises(ValueError, match=r"needs bottlenecks.*res5 is made of BasicBlock"):
        build_backbone(make_cfg(*opts, config="ATSS_R_18_FPN_small.yaml"))
