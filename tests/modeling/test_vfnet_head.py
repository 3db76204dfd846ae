import math

import torch
from detectron2.layers import ShapeSpec

from atss.modeling import VFNetHead
from atss.modeling.vfnet_head import star_offsets

LEVELS = [ShapeSpec(channels=32, stride=s) for s in (8, 16)]
VFNET = {"in_channels": 32, "input_shape": LEVELS, "num_classes": 3, "num_convs": 1}


def features(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 32, *hw, generator=generator) for hw in ((4, 6), (2, 3))]


def test_star_offsets_by_hand():
    """A box 1 left, 2 above, 3 right and 4 below: where each tap lies, row by row."""
    offsets = star_offsets(torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)).view(9, 2)
    grid = torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)])
    lies = (offsets + grid).tolist()
    assert lies == [
        *([-2.0, -1], [-2, 0], [-2, 3]),
        *([0.0, -1], [0, 0], [0, 3]),
        *([4.0, -1], [4, 0], [4, 3]),
    ]


def test_star_offsets_of_a_small_box_are_zero():
    assert star_offsets(torch.ones(1, 4, 2, 3)).abs().max() == 0


def test_coarse_boxes_start_at_the_initial_distance():
    torch.manual_seed(0)
    head = VFNetHead(**VFNET)
    with torch.no_grad():
        head.bbox_pred.weight.zero_()
        head.refine_pred.weight.zero_()
        found = head(features(1))
    assert {*found} == {"coarse", "fine"}
    assert found["coarse"].classes is None
    for output in found.values():
        distances = output.box_regression.exp()[0]
        torch.testing.assert_close(distances[:24], torch.full((24, 4), 64.0))
        torch.testing.assert_close(distances[24:], torch.full((6, 4), 128.0))


def test_gradients_that_reach_the_coarse_box():
    """The finer box is a multiple of the first, which learns nothing from it but a tenth of what
    the points say."""

    def learnt(share, of):
        torch.manual_seed(0)
        head = VFNetHead(**VFNET, through_points=share)
        torch.nn.init.normal_(head.bbox_pred.weight, std=0.1)
        found = head(features(1))
        of(found).sum().backward()
        gradient = head.bbox_pred.weight.grad
        return torch.zeros(1) if gradient is None else gradient

    for of in (lambda found: found["fine"].box_regression, lambda found: found["fine"].classes):
        assert learnt(0.0, of).abs().max() == 0
        torch.testing.assert_close(learnt(1.0, of), 10 * learnt(0.1, of), rtol=1e-3, atol=1e-6)
        assert learnt(1.0, of).abs().max() > 0
    assert learnt(0.0, lambda found: found["coarse"].box_regression).abs().max() > 0


def test_star_points_of_a_large_coarse_box(monkeypatch):
    """3,000 px to each side, at a stride of 8."""
    seen = []
    monkeypatch.setattr(
        "atss.modeling.vfnet_head.star_offsets", lambda x: seen.append(x) or star_offsets(x)
    )
    head = VFNetHead(**VFNET)
    with torch.no_grad():
        head.bbox_pred.weight.zero_()
        head.bbox_pred.bias.fill_(math.log(3000 / 64))
        head(features(1))
    torch.testing.assert_close(seen[0], torch.full((1, 4, 4, 6), 3000 / 8), rtol=1e-4, atol=0)


def test_the_fine_box_multiplies_the_coarse_box():
    """Its numbers are logarithms: of a change of 1, each side is e times as far."""
    torch.manual_seed(0)
    head = VFNetHead(**VFNET)
    with torch.no_grad():
        head.refine_pred.weight.zero_()
        head.refine_pred.bias.fill_(1.0)
        found = head(features(2))
    torch.testing.assert_close(found["fine"].box_regression, found["coarse"].box_regression + 1)


def test_vfnet_boxes_are_float32_under_autocast():
    head, seen = VFNetHead(**VFNET), []
    for layer in (head.bbox_pred, head.refine_pred):
        layer.register_forward_hook(lambda module, x, y: seen.extend([x[0].dtype, y.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(features(1))
    assert {*seen} == {torch.float32}
    assert found["fine"].classes.dtype == torch.bfloat16
