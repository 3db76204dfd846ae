import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from atss.geometry import normalised_wasserstein
from atss.losses import (
    Focal,
    Matchability,
    QualityFocal,
    Varifocal,
    cross_entropy,
    distribution_focal_loss,
    giou_loss,
    iou_loss,
    nwd_loss,
    smooth_l1_loss,
)


def of_logits(loss, logits, targets):
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss(logits.sigmoid(), entropy, targets)


def focal(logits, targets, **arguments):
    return of_logits(Focal(**arguments), logits, targets)


@pytest.mark.parametrize(("target", "expected"), [(1.0, 0.147487), (0.0, 0.024076)])
def test_focal_loss_by_hand(target, expected):
    """p = 0.3: 0.25 * 0.7^2 * -ln 0.3, and 0.75 * 0.3^2 * -ln 0.7."""
    logit = torch.tensor(math.log(0.3 / 0.7))
    loss = focal(logit, torch.tensor(target))
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=0)


def test_focal_loss_is_finite_for_large_logits():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    for target in (0.0, 1.0):
        loss = focal(logits, torch.full((2,), target))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        (QualityFocal(), 0.8, 0.258628),  # 0.5^2 * BCE(0.3, 0.8)
        (QualityFocal(), 0.0, 0.032101),  # 0.3^2 * -ln 0.7
        (Varifocal(), 0.8, 0.827611),  # 0.8 * BCE(0.3, 0.8)
        (Varifocal(), 0.0, 0.024076),  # 0.75 * 0.3^2 * -ln 0.7
        (Matchability(), 0.8, 0.962952),  # BCE(0.3, 0.8^1.5)
        (Matchability(), 0.05, 0.366148),  # BCE(0.3, 0.05^1.5): varifocal's is 0.019952
        (Matchability(), 0.0, 0.058608),  # 0.3^1.5 * -ln 0.7
        (cross_entropy, 0.8, 1.034513),  # -0.8 ln 0.3 - 0.2 ln 0.7
    ],
)
def test_quality_losses_by_hand(loss, target, expected):
    """p = 0.3, as a logit and as a probability."""
    p, target = torch.tensor(0.3), torch.tensor(target)
    if isinstance(loss, Matchability) and target > 0:
        target = loss.target_of(target)
    found = of_logits(loss, torch.logit(p), target)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    found = loss(p, F.binary_cross_entropy(p, target), target)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_gradients_of_quality_losses():
    """Gradient of a logit at p = 0.3. Only matchability's weights are detached and do not depend on
    the target of positives."""
    p = 0.3

    def gradient(loss, target):
        logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        target = torch.tensor(target, dtype=torch.float64)
        return torch.autograd.grad(of_logits(loss, logit, target), logit)[0].item()

    slope, entropy = p * (1 - p), -math.log(1 - p)
    assert gradient(Matchability(1.5), 0.0) == pytest.approx(p**1.5 * p)
    assert gradient(Matchability(1.5), 0.05) == pytest.approx(p - 0.05)
    assert gradient(Varifocal(0.75, 2.0), 0.05) == pytest.approx(0.05 * (p - 0.05))
    assert gradient(Varifocal(0.75, 2.0), 0.0) == pytest.approx(
        0.75 * (2 * p * slope * entropy + p**2 * p)
    )
    q = 0.8
    entropy = -q * math.log(p) - (1 - q) * math.log(1 - p)
    assert gradient(QualityFocal(2.0), q) == pytest.approx(
        -2 * (q - p) * slope * entropy + (q - p) ** 2 * (p - q)
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("make", [QualityFocal, Matchability, lambda g: Varifocal(gamma=g)])
def test_quality_losses_are_finite_for_large_logits(make, power):
    logits = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    for target in (0.0, 0.5, 1.0):
        loss = of_logits(make(power), logits, torch.full((3,), target))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_distribution_focal_loss_by_hand():
    """17 bins with logits 2 for bin 3 and 1 for bin 4, of which a target of 3.3 has 70 % and 30 %;
    ln 17 for equal logits and any target."""
    logits = torch.zeros(17)
    for target in (0.0, 3.3, 15.9, 16.0):
        loss = distribution_focal_loss(logits, torch.tensor(target))
        torch.testing.assert_close(loss, torch.tensor(math.log(17)))
    logits[3], logits[4] = 2.0, 1.0
    loss = distribution_focal_loss(logits, torch.tensor(3.3))
    torch.testing.assert_close(loss, torch.tensor(1.523160))
    whole = distribution_focal_loss(logits, torch.tensor(3.0))
    torch.testing.assert_close(whole, -logits.log_softmax(0)[3])
    last = distribution_focal_loss(logits, torch.tensor(16.0))
    torch.testing.assert_close(last, -logits.log_softmax(0)[16])


def test_minimum_of_distribution_focal_loss():
    logits = torch.zeros(3, 17, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.25, 7.5, 15.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, targets), logits)
    for target in targets:
        low = int(target)
        shares = torch.full((17,), 1e-12, dtype=torch.float64)
        shares[low], shares[low + 1] = low + 1 - target, target - low
        best = shares.log().requires_grad_()
        (slope,) = torch.autograd.grad(distribution_focal_loss(best, target), best)
        assert slope.abs().max() < 1e-9


def test_nwd_loss_by_hand():
    """Boxes of one size, 10 px apart: 1 - exp(-10 / 12.8). For equal boxes the loss and its
    gradient are 0, although the square root has none there."""
    a, b = torch.tensor([0.0, 0, 6, 6]), torch.tensor([10.0, 0, 16, 6])
    torch.testing.assert_close(nwd_loss(a, b, 12.8), torch.tensor(1 - 0.457834), atol=1e-6, rtol=0)
    same = a.clone().requires_grad_()
    loss = nwd_loss(same, a, 12.8)
    assert loss == 0
    assert torch.autograd.grad(loss, same)[0].tolist() == [0.0] * 4
    near = (a.double() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalised_wasserstein(x, b.double(), 12.8), near)


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
