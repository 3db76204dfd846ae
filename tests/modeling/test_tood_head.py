"""VarifocalNet's and TOOD's heads, piece by piece. Whole, and with mmdet's weights:
tests/checkpoints/test_detectors.py."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from atss import GridAnchorGenerator, load_config
from atss.modeling import BoxDeltas, Corners, Distribution, LogDistances, TOODHead, VFNetHead
from atss.modeling.registry import HEAD_REGISTRY
from atss.modeling.tood_head import TaskDecomposition, geometric_mean, sample_sides

CONFIG = "ATSS_R_50_FPN_1x"
LEVELS = [ShapeSpec(channels=32, stride=s) for s in (8, 16)]
VFNET = {"in_channels": 32, "input_shape": LEVELS, "num_classes": 3, "num_convs": 1}
TOOD = {"in_channels": 32, "num_levels": 2, "num_classes": 3, "num_convs": 2}


def features(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 32, *hw, generator=generator) for hw in ((4, 6), (2, 3))]


def tood(**arguments) -> TOODHead:
    torch.manual_seed(0)
    generator = GridAnchorGenerator(strides=(8, 16))
    return TOODHead(**TOOD | {"anchor_generator": generator} | arguments)


@pytest.mark.parametrize("bias", [90.0, -90.0])
def test_extreme_boxes_have_finite_gradients(bias):
    torch.manual_seed(0)
    for head in (VFNetHead(**VFNET), tood()):
        torch.nn.init.constant_(head.bbox_pred.bias, bias)
        found = head(features(1))
        outputs = found.values() if isinstance(found, dict) else [found]
        sum(x.box_regression.sum() for x in outputs).backward()
        for output in outputs:
            assert torch.isfinite(output.box_regression).all()
        gradients = [p.grad for p in head.parameters() if p.grad is not None]
        assert all(torch.isfinite(x).all() for x in gradients)


def test_heads_refuse_other_box_codes():
    for code in (BoxDeltas(), Distribution()):
        with pytest.raises(ValueError, match=r"set MODEL\.ATSS\.REGRESSION log_point"):
            VFNetHead(**VFNET, code=code)
        with pytest.raises(ValueError, match=r"set MODEL\.ATSS\.REGRESSION corners"):
            tood(code=code)
    for inner in (Corners(), Distribution()):
        with pytest.raises(
            ValueError, match=r"inner cannot be (Corners|Distribution): choose 'point' or"
        ):
            tood(inner=inner)
    for inner in (BoxDeltas(), LogDistances()):
        with pytest.raises(ValueError, match="exponential must be False with"):
            tood(inner=inner)
        tood(inner=inner, exponential=False)


def test_task_decomposition_weights_each_layer():
    """What is done to the convolution, done to the features; learnt through the mean, too."""
    torch.manual_seed(0)
    task = TaskDecomposition(8, 3, 1, "", bias=True)
    torch.nn.init.uniform_(task.attention[0].weight, 0, 0.1)  # its one hidden number is above 0
    torch.nn.init.normal_(task.attention[2].weight)
    layers = torch.randn(2, 3, 8, 4, 5).relu()
    stack = layers.flatten(1, 2)
    mean = stack.mean((2, 3), keepdim=True).requires_grad_()
    attention = task.attention(mean).sigmoid()
    assert attention.std() > 0.02  # the layers differ
    weighted = (layers * attention[:, :, None]).flatten(1, 2)
    found, expected = task(stack, mean, 0), task.mixture(weighted).relu()
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), mean)[0] for x in (found, expected))
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


def test_geometric_mean_has_finite_gradients():
    """sqrt(p q), whose slope in either logit is sqrt(p q) (1 - p) / 2."""
    a, b = torch.tensor([0.5, -200.0, 1.0, -60.0]), torch.tensor([-1.0, 3.0, -200.0, -60.0])
    a, b = a.double().requires_grad_(), b.double()
    found = geometric_mean(a, b)
    torch.testing.assert_close(found, (a.sigmoid() * b.sigmoid()).sqrt())
    (slope,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(slope, found * (1 - a.sigmoid()) / 2)
    low = torch.tensor([-1e4, 1e4], requires_grad=True)
    (slope,) = torch.autograd.grad(geometric_mean(low, low.detach().flip(0)).sum(), low)
    assert torch.isfinite(slope).all()


def test_sides_are_sampled_at_their_offsets():
    """The left side from one pixel below, the top from half a pixel to the right, the others from
    where they are."""
    boxes = torch.rand(1, 4, 4, 5) + torch.tensor([0.0, 0, 10, 10]).view(1, 4, 1, 1)
    offsets = torch.zeros(1, 8, 4, 5)
    offsets[:, 0], offsets[:, 3] = 1.0, 0.5  # (y, x) of left, (y, x) of top
    found = sample_sides(boxes, offsets)
    torch.testing.assert_close(found[:, 0, :3], boxes[:, 0, 1:])
    half = (boxes[:, 1, :, :-1] + boxes[:, 1, :, 1:]) / 2
    torch.testing.assert_close(found[:, 1, :, :4], half)
    torch.testing.assert_close(found[:, 2:], boxes[:, 2:])


def test_nan_offsets_give_nan_sides():
    """NaN is not hidden, nor does it end the process."""
    boxes = torch.tensor([0.0, 0, 10, 10]).view(1, 4, 1, 1).expand(1, 4, 4, 5)
    offsets = torch.zeros(1, 8, 4, 5)
    offsets[0, 1, 2, 3] = torch.nan  # x of the left side
    found = sample_sides(boxes, offsets)
    assert found[0, 0, 2, 3].isnan()
    assert found.isnan().sum() == 1


def test_boxes_with_crossing_sides_stay():
    boxes = torch.tensor([[0.0, 10], [0, 0], [5, 15], [5, 5]]).view(1, 4, 1, 2)
    offsets = torch.zeros(1, 8, 1, 2)
    offsets[0, 1, 0, 0] = 1.0  # the left side of the first box from the second: 10 > 5
    offsets[0, 5, 0, 1] = -0.5  # the right side of the second from between: 10
    found = sample_sides(boxes, offsets)
    assert found[0, :, 0, 0].tolist() == [0, 0, 5, 5]
    assert found[0, :, 0, 1].tolist() == [10, 0, 10, 5]


@pytest.mark.parametrize(
    ("arguments", "bias", "sides"),
    [
        ({}, 0.0, (1.0, 1.0)),
        ({"inner": BoxDeltas(), "exponential": False}, 0.0, (4.0, 4.0)),
        ({}, math.log(8000), (8000.0, 8000.0)),
    ],
    ids=["points", "anchors", "far"],
)
def test_tood_boxes_start_around_their_locations(arguments, bias, sides):
    """Corners in strides: exp(0) strides to each side, or the anchor; of 8,000 strides, which are
    the longest side of an image, too."""
    head = tood(**arguments)
    with torch.no_grad():
        head.bbox_pred.weight.zero_()
        head.bbox_pred.bias.fill_(bias)
        head.bbox_alignment[-1].weight.zero_()
        output = head(features(1))
    assert output.probabilities
    assert output.quality is None
    box = output.box_regression[
        0, 6 + 2
    ]  # second row, third column of the first level, around (2.5, 1.5)
    assert box.tolist() == pytest.approx(
        [2.5 - sides[0], 1.5 - sides[1], 2.5 + sides[0], 1.5 + sides[1]], rel=1e-5
    )


def test_tood_starts_with_the_prior_probability():
    output = tood(prior_prob=0.02)(features(1))
    assert output.classes.mean().item() == pytest.approx(0.02, rel=0.1)


def test_tood_probabilities_combine_classes_and_alignment():
    """And teach the stack what these do, also through the attention that its mean gives."""
    head, maps = tood(), features(1)
    torch.nn.init.uniform_(head.cls_decomposition.attention[0].weight, 0, 0.1)
    torch.nn.init.normal_(head.cls_decomposition.attention[2].weight)
    stack = []
    x = maps[0]
    for block in head.stack:
        x = block(x)
        stack.append(x)
    stack = torch.cat(stack, dim=1)
    mean = F.adaptive_avg_pool2d(stack, 1)
    logits = head.cls_score(head.cls_decomposition(stack, mean, 0))
    alignment = head.cls_alignment(stack)
    expected = (logits.sigmoid() * alignment.sigmoid()).sqrt()
    found = head(maps).classes[0, :24]
    torch.testing.assert_close(found, expected[0].flatten(1).T)
    first = head.stack[0][0].weight
    ours, theirs = (
        torch.autograd.grad(x.sum(), first, retain_graph=True)[0] for x in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_tood_scale_multiplies_distances():
    head, maps = tood(), features(1)
    with torch.no_grad():
        head.bbox_pred.weight.zero_()
        head.bbox_alignment[-1].weight.zero_()
        head.scales[1].scale.fill_(3.0)
        box = head(maps).box_regression[0, 24]
    assert box.tolist() == pytest.approx([0.5 - 3, 0.5 - 3, 0.5 + 3, 0.5 + 3])


def test_tood_under_autocast():
    head = tood()
    seen = []
    for layer in (head.bbox_pred, head.bbox_alignment[-1]):
        layer.register_forward_hook(lambda module, x, y: seen.extend([x[0].dtype, y.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(features(1))
    assert {*seen} == {torch.float32}
    assert output.classes.dtype == output.box_regression.dtype == torch.float32


@pytest.mark.parametrize("norm", ["", "BN"])
def test_tood_with_other_norms_trains(norm):
    head = tood(norm=norm).train()
    output = head(features(2))
    (output.classes.sum() + output.box_regression.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_tood_needs_one_anchor_per_location():
    generator = GridAnchorGenerator(strides=(8, 16), ratios=(1.0, 2.0))
    with pytest.raises(ValueError, match="one anchor per location"):
        tood(anchor_generator=generator)


def test_the_first_convolutions_of_the_stack_may_be_deformable():
    head = tood(num_deform=1)
    assert head.stack[0][0].offset.out_channels == 4 * 27
    assert isinstance(head.stack[1][0], torch.nn.Conv2d)
    head(features(1)).classes.sum().backward()
    assert head.stack[0][0].offset.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="num_deform must be between 0 and 2"):
        tood(num_deform=3)


def test_prior_probability_of_both_maps():
    head = tood()
    for layer in (head.cls_score, head.cls_alignment[-1]):
        torch.testing.assert_close(layer.bias, torch.full_like(layer.bias, -math.log(99)))
    for layer in (head.cls_decomposition.attention[0], head.bbox_alignment[-1]):
        assert layer.weight.std().item() == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize(("head", "depth"), [("ATSSHead", 4), ("TOODHead", 6), ("VFNetHead", 3)])
def test_num_convs_is_the_depth_of_every_head(head, depth):
    opts = ["MODEL.ATSS.HEAD", head]
    for value, expected in ((None, depth), (2, 2), (0, 0)):
        node = load_config(CONFIG, opts=[*opts, "MODEL.ATSS.NUM_CONVS", value]).MODEL.ATSS
        assert HEAD_REGISTRY.argument(node, "num_convs") == expected


def test_old_keys_of_depth_and_initial_distance(tmp_path):
    """As in the config.yaml of finished runs, in which NUM_CONVS was a key of ATSSHead."""
    old = (
        "MODEL: {ATSS: {NUM_CONVS: 4, HEADS: {TOODHead: {NUM_CONVS: 5}, VFNetHead: {REACH: 4.0}}}}"
    )
    (tmp_path / "old.yaml").write_text(f"_BASE_: {CONFIG}\n{old}")
    opts = ("MODEL.ATSS.HEADS.TOODHead.NUM_CONVS", 5, "MODEL.ATSS.HEADS.VFNetHead.REACH", 4.0)
    for cfg in (load_config(tmp_path / "old.yaml"), load_config(CONFIG, opts=opts)):
        cfg.MODEL.ATSS.HEAD = "TOODHead"
        assert HEAD_REGISTRY.argument(cfg.MODEL.ATSS, "num_convs") == 5
        assert cfg.MODEL.ATSS.HEADS.VFNetHead.INITIAL_DISTANCE == 4.0
