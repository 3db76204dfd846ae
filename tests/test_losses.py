import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from atss.losses import Focal, giou_loss, iou_loss, smooth_l1_loss


def focal(logits, targets, **arguments):
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return Focal(**arguments)(logits.sigmoid(), entropy, targets)


@pytest.mark.parametrize(("target", "expected"), [(1.0, 0.147487), (0.0, 0.024076)])
def test_focal_loss_by_hand(target, expected):
    """p = 0.3: 0.25 * 0.7^2 * -ln 0.3, and 0.75 * 0.3^2 * -ln 0.7."""
    logit = torch.tensor(math.log(0.3 / 0.7))
    loss = focal(logit, torch.tensor(target))
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=0)


def test_focal_loss_is_finite_far_out():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    for target in (0.0, 1.0):
        loss = focal(logits, torch.full((2,), target))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_giou_loss_by_hand():
    """Two unit squares two apart in a hull of 3 x 1: 1 - (0 - 1/3)."""
    a, b = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    torch.testing.assert_close(giou_loss(a, b), torch.tensor(4 / 3))
    torch.testing.assert_close(giou_loss(a, a), torch.tensor(0.0))


def test_giou_loss_equals_torchvision():
    corner, size = torch.rand(2, 2, 50, 2, generator=torch.Generator().manual_seed(0)) * 100
    a, b = torch.cat([corner, corner + size], dim=2)
    torch.testing.assert_close(giou_loss(a, b), generalized_box_iou_loss(a, b))


def test_giou_gradient_of_empty_boxes_is_finite():
    boxes = torch.zeros(1, 4, requires_grad=True)
    giou_loss(boxes, torch.zeros(1, 4)).sum().backward()
    assert torch.isfinite(boxes.grad).all()


def test_iou_loss_by_hand():
    """4 of 12 px shared, a pixel added to both: -ln(5 / 13)."""
    a, b = torch.tensor([0.0, 0, 4, 2]), torch.tensor([2.0, 0, 6, 2])
    torch.testing.assert_close(iou_loss(a, b), torch.tensor(math.log(13 / 5)))
    torch.testing.assert_close(iou_loss(a, a), torch.tensor(0.0))


def test_smooth_l1_by_hand():
    """Below beta x^2 / (2 beta), above |x| - beta / 2."""
    loss = smooth_l1_loss(torch.tensor([0.1, -1.0]), torch.zeros(2), beta=0.5)
    torch.testing.assert_close(loss, torch.tensor([0.01, 0.75]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gradient_of_the_focal_loss_for_small_gamma(gamma):
    """-alpha (1 - p)^gamma ln p differentiated by hand; finite where p is 1 to the last digit."""
    logits = torch.tensor([-1.0, 2.0, 1e4], dtype=torch.float64, requires_grad=True)
    loss = focal(logits, torch.ones_like(logits), gamma=gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    p = logits.detach().sigmoid()
    expected = 0.25 * (1 - p) ** gamma * (gamma * p * p.log() - (1 - p))
    torch.testing.assert_close(gradient, expected)
