import math

import pytest
import torch
from conftest import make_cfg, make_input
from detectron2.modeling import build_model

from atss.modeling.head import ATSSHead, DistributionQuality, flatten_levels

HEAD = {"in_channels": 32, "num_levels": 2, "num_classes": 3, "num_anchors": 2, "num_convs": 1}


def features(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 32, *hw, generator=generator) for hw in ((3, 4), (2, 2))]


def test_flattening_is_by_level_row_column_anchor():
    level = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)  # N 2, A 2 x dim 3, H 2, W 3
    flat = flatten_levels([level[:, :, :1, :1], level], dim=3)
    assert flat.shape == (2, 2 + 12, 3)
    assert torch.equal(flat[1, 1], level[1, 3:, 0, 0])  # level 0, its second anchor
    row, column, anchor = 1, 2, 1
    place = 2 + (row * 3 + column) * 2 + anchor
    assert torch.equal(flat[1, place], level[1, anchor * 3 : anchor * 3 + 3, row, column])


def test_a_batch_equals_its_images():
    head = ATSSHead(**HEAD)
    assert head(features(0)).classes.shape == (0, 2 * (12 + 4), 3)
    batch = [torch.cat(pair) for pair in zip(features(1, 1), features(1, 2), strict=True)]
    together = head(batch)
    for i in range(2):
        alone = head(features(1, i + 1))
        for joint, single in zip(together[:3], alone[:3], strict=True):
            torch.testing.assert_close(joint[i], single[0])


def test_initial_values():
    head = ATSSHead(**HEAD, prior_prob=0.02)
    torch.testing.assert_close(head.cls_score.bias.sigmoid(), torch.full((6,), 0.02))
    assert abs(head.cls_subnet[0].weight.std().item() - 0.01) < 1e-3
    assert head.bbox_pred.bias.abs().max() == 0
    assert [s.scale.item() for s in head.scales] == [1, 1]


def test_each_level_has_its_scale():
    head = ATSSHead(**HEAD)
    with torch.no_grad():
        head.scales[1].scale.fill_(3)
    maps = features(1)
    scaled = head(maps).box_regression
    with torch.no_grad():
        head.scales[1].scale.fill_(1)
    plain = head(maps).box_regression
    torch.testing.assert_close(scaled[:, :24], plain[:, :24])
    torch.testing.assert_close(scaled[:, 24:], 3 * plain[:, 24:])


def test_boxes_are_predicted_in_float32_under_autocast():
    """Not only the result: the predictor's weights and products, too."""
    head, maps = ATSSHead(**HEAD), features(1)
    torch.nn.init.normal_(head.bbox_pred.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(maps)
        feature = head.bbox_subnet(maps[0])
    assert output.classes.dtype == torch.bfloat16
    assert output.box_regression.dtype == torch.float32
    expected = flatten_levels([head.bbox_pred(feature.float())], 4)
    torch.testing.assert_close(output.box_regression[:, : expected.shape[1]], expected)
    assert not torch.allclose(expected.bfloat16().float(), expected)  # the test could see it


def test_no_norm_means_no_norm():
    head = ATSSHead(**HEAD | {"norm": ""})
    assert [type(layer).__name__ for layer in head.cls_subnet] == ["Conv2d", "ReLU"]


def test_centerness_is_predicted_from_the_chosen_tower():
    maps = features(1)
    for tower in ("box", "cls"):
        head = ATSSHead(**HEAD, centerness=tower)
        before = head(maps).quality
        other = head.cls_subnet if tower == "box" else head.bbox_subnet
        own = head.bbox_subnet if tower == "box" else head.cls_subnet
        with torch.no_grad():
            other[0].weight.mul_(-1)
            assert torch.equal(head(maps).quality, before)
            own[0].weight.mul_(-1)
            assert not torch.equal(head(maps).quality, before)


def test_without_centerness_and_scales():
    head = ATSSHead(**HEAD, centerness="", level_scale=False, box_bias=4.0)
    assert head(features(1)).quality is None
    assert not any(name.startswith(("ctrness", "scales")) for name in head.state_dict())
    assert (head.bbox_pred.bias == 4).all()


OF_DISTRIBUTIONS = {"centerness": "distribution", "box_channels": 68, "bins": 17}


def test_quality_from_distributions_by_hand():
    """GFLv2: of each side the four highest probabilities and the mean of these, side after side,
    through 64 rectified numbers to one."""
    torch.manual_seed(0)
    quality = DistributionQuality(17).double()
    numbers = 2 * torch.randn(3, 68, dtype=torch.float64)
    assert sum(p.numel() for p in quality.parameters()) == 1409
    (first, first_bias), (last, last_bias) = (
        (layer.weight.tolist(), layer.bias.tolist()) for layer in (quality.hidden, quality.quality)
    )
    for row, found in zip(numbers.tolist(), quality(numbers).tolist(), strict=True):
        statistics = []
        for side in range(4):
            powers = [math.exp(x) for x in row[17 * side : 17 * side + 17]]
            top = sorted((x / sum(powers) for x in powers), reverse=True)[:4]
            statistics += [*top, sum(top) / 4]
        hidden = [
            max(0.0, bias + sum(w * x for w, x in zip(weights, statistics, strict=True)))
            for weights, bias in zip(first, first_bias, strict=True)
        ]
        expected = last_bias[0] + sum(w * x for w, x in zip(last[0], hidden, strict=True))
        assert found == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(quality, numbers.requires_grad_())


def test_distribution_quality_multiplies_class_probabilities():
    """In float32 whatever the towers compute in, with a gradient to the distributions."""
    torch.manual_seed(0)
    head, maps = ATSSHead(**HEAD, **OF_DISTRIBUTIONS), features(2)
    plain = ATSSHead(**HEAD | OF_DISTRIBUTIONS | {"centerness": ""})
    plain.load_state_dict(head.state_dict(), strict=False)
    output, logits = head(maps), plain(maps)
    assert output.probabilities
    assert output.quality is None
    quality = head.box_quality(logits.box_regression).sigmoid()
    torch.testing.assert_close(output.classes, logits.classes.sigmoid() * quality[..., None])
    assert torch.equal(output.box_regression, logits.box_regression)
    output.classes.sum().backward()
    assert head.bbox_pred.weight.grad.abs().max() > 0
    assert abs(head.box_quality.hidden.weight.std().item() - 0.01) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, logits = head(maps), plain(maps)
    assert output.classes.dtype == torch.float32
    assert logits.classes.dtype == torch.bfloat16
    quality = head.box_quality(logits.box_regression).sigmoid()
    expected = logits.classes.float().sigmoid() * quality[..., None]
    torch.testing.assert_close(output.classes, expected)


@pytest.mark.parametrize("bins", [0, 3])
def test_refuses_distribution_quality_without_distributions(bins):
    with pytest.raises(
        ValueError, match=r"is 'distribution': set MODEL\.ATSS\.REGRESSION distribution"
    ):
        ATSSHead(**HEAD | OF_DISTRIBUTIONS | {"bins": bins})


def test_refuses_boxes_that_do_not_count_from_the_anchor():
    with pytest.raises(ValueError, match=r"ATSSHead cannot be used: .*Corners"):
        build_model(make_cfg("MODEL.ATSS.REGRESSION", "corners"))


@pytest.mark.parametrize("channels", [16, 32])
def test_a_level_too_small_for_its_norm_names_the_key(channels):
    """One image of 96 x 128 pixels has a P7 of one location, on which a group of one channel has
    one number."""
    opts = ("MODEL.FPN.OUT_CHANNELS", channels)
    if channels == 16:  # the dynamic head's groups
        opts += ("MODEL.ATSS.HEADS.ATSSHead.TOWER", "dynamic")
    model = build_model(make_cfg(*opts))
    with pytest.raises(ValueError, match=r"MODEL\.ATSS\.NORM .* raise MODEL\.FPN\.OUT_CHANNELS"):
        model([make_input([[10, 10, 60, 70]], [1])])
    sum(model([make_input([[10, 10, 60, 70]], [1])] * 2).values()).backward()


def test_refuses_an_unknown_tower():
    with pytest.raises(ValueError, match="centerness is 'corner': choose from"):
        ATSSHead(**HEAD, centerness="corner")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_last_convolution_of_each_tower_may_be_deformable(version):
    head = ATSSHead(**HEAD | {"num_convs": 2}, deform=version)
    names = [type(layer).__name__ for layer in head.bbox_subnet]
    assert names == ["Conv2d", "GroupNorm", "ReLU", "DeformConvLayer", "GroupNorm", "ReLU"]
    assert head.cls_subnet[3].offset.weight.abs().max() == 0
    assert abs(head.cls_subnet[3].conv.weight.std().item() - 0.01) < 1e-3
    head(features(1)).classes.sum().backward()
    assert head.cls_subnet[3].offset.weight.grad.abs().max() > 0


def test_refuses_an_unknown_version():
    with pytest.raises(ValueError, match="deform is 'v3': choose from"):
        ATSSHead(**HEAD, deform="v3")
    with pytest.raises(ValueError, match="needs a tower of at least one convolution"):
        ATSSHead(**{**HEAD, "num_convs": 0}, deform="v1")


@pytest.mark.parametrize("tower", ["box", "cls"])
def test_fused_predictors_equal_separate_ones(tower):
    torch.manual_seed(0)
    head = ATSSHead(
        in_channels=32, num_levels=1, num_classes=3, num_convs=1, centerness=tower
    ).eval()
    x = torch.randn(1, 32, 5, 7)
    output = head([x])
    cls_feature, box_feature = head.cls_subnet(x), head.bbox_subnet(x)
    source = box_feature if tower == "box" else cls_feature
    for ours, alone in (
        (output.classes, head.cls_score(cls_feature)),
        (output.box_regression, head.bbox_pred(box_feature)),
        (output.quality[..., None], head.ctrness(source)),
    ):
        torch.testing.assert_close(ours, alone.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("deform", ["", "v2"])
def test_towers_without_biases(deform):
    """mmdet's have none; without a norm they keep theirs."""
    head = ATSSHead(**HEAD | {"num_convs": 2}, deform=deform, tower_bias=False)
    names = [name for name, _ in head.named_parameters() if name.startswith("cls_subnet")]
    last = ["3.offset.weight", "3.offset.bias", "3.conv.weight"] if deform else ["3.weight"]
    expected = ["0.weight", "1.weight", "1.bias", *last, "4.weight", "4.bias"]
    assert sorted(names) == sorted(f"cls_subnet.{name}" for name in expected)
    head(features(1)).classes.sum().backward()
    plain = ATSSHead(**HEAD | {"norm": ""}, tower_bias=False)
    assert plain.cls_subnet[0].bias is not None


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"])
def test_batch_norms_are_separate_for_each_level(norm):
    """Statistics of a level in training are used for the same level in evaluation."""
    torch.manual_seed(0)
    head = ATSSHead(**HEAD | {"norm": norm})
    maps = [scale * x for scale, x in zip((1, 20), features(2), strict=True)]
    torch.nn.init.normal_(head.bbox_pred.weight)
    with torch.no_grad():
        for _ in range(150):
            trained = head.train()(maps)
        evaluated = head.eval()(maps)
    # The running variance is n / (n - 1) of the batch's; the coarse level has 8 pixels.
    torch.testing.assert_close(
        evaluated.box_regression[:, :24], trained.box_regression[:, :24], rtol=0.1, atol=1
    )
    torch.testing.assert_close(
        evaluated.box_regression[:, 24:], trained.box_regression[:, 24:], rtol=0.1, atol=2
    )
    assert trained.box_regression.abs().mean() > 5


def test_group_norm_is_shared_by_levels():
    head = ATSSHead(**HEAD)
    assert [*head.cls_subnet[1].state_dict()] == ["weight", "bias"]


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN", "naiveSyncBN_N"])
def test_sync_norms_of_levels_use_all_processes(norm, tmp_path):
    """And a forward pass that failed leaves nothing behind."""
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
            head, maps = ATSSHead(**HEAD | {"norm": norm}), features(2)
            losses = head.train()(maps)
            losses.box_regression.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    before = head.eval()(maps).classes
    with pytest.raises(RuntimeError):
        head([maps[0], maps[1][:, :5]])
    assert torch.equal(head(maps).classes, before)
