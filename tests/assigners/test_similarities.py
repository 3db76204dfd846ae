"""Similarities by hand, their bounds of distances, and the rules that use them."""

import numpy as np
import oracle
import pytest
import torch
from conftest import make_cfg, make_gt

from atss import Anchors
from atss.assigners import ATSS, NWD, IoU, SimD
from atss.config import build_assigner

ALL = {"iou": IoU(), "nwd": NWD(), "simd": SimD()}


def boxes(*centre_and_size) -> torch.Tensor:
    x, y, w, h = torch.tensor(centre_and_size, dtype=torch.float64).T
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def test_by_hand():
    """8 x 8 pixels at (10, 10) and 10 x 6 at (12, 11): W^2 = 4 + 1 + (4 + 4) / 4 = 7."""
    a, b = boxes((10, 10, 8, 8), (12, 11, 10, 6))
    assert IoU()(a, b).item() == pytest.approx(0.512195, abs=1e-6)
    assert NWD()(a, b).item() == pytest.approx(np.exp(-np.sqrt(7) / 12.8))
    assert NWD()(a, b).item() == pytest.approx(0.813264, abs=1e-6)
    assert SimD(1, 1)(a, b).item() == pytest.approx(0.731199, abs=1e-6)
    assert SimD()(a, b).item() == pytest.approx(0.182435, abs=1e-6)
    apart = boxes((10, 10, 6, 6), (20, 10, 6, 6))
    assert NWD()(*apart).item() == pytest.approx(0.457834, abs=1e-6)
    assert NWD(6.4)(*apart).item() == pytest.approx(0.457834**2, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_similar_boxes_are_within_max_distance(name):
    """Boxes of all sizes, some without area or inverted."""
    generator = torch.Generator().manual_seed(0)
    middle = 25 * torch.randn(2, 20000, 2, generator=generator, dtype=torch.float64)
    size = 3 ** (4 * torch.rand(2, 20000, 2, generator=generator, dtype=torch.float64)) - 2
    a, b = torch.cat([middle - size / 2, middle + size / 2], dim=-1)
    similarity = ALL[name](a, b)
    assert ((similarity >= 0) & (similarity <= 1)).all()
    scale, distance = ALL[name].max_distance(similarity)
    sides = (a[:, 2:] - a[:, :2]).clamp(min=0) + (b[:, 2:] - b[:, :2]).clamp(min=0)
    apart = ((a[:, :2] + a[:, 2:]) - (b[:, :2] + b[:, 2:])).abs() / 2
    positive = similarity > 0
    assert positive.sum() > 500
    assert (apart <= scale * sides / 2 + distance + 1e-9)[positive].all()
    if name == "iou":
        twins = a[positive] + torch.tensor([5.0, 0, 5, 0])  # boxes of one size, along one axis
        overlap = IoU()(a[positive], twins)
        sides = (a[positive][:, 2] - a[positive][:, 0]).clamp(min=0)
        distance = IoU().max_distance(overlap)[0][:, 0] * sides
        assert (distance >= 5 - 1e-9)[overlap > 0].all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_atss_by_each_similarity(name, seed):
    hw = (160, 350)
    anchors = Anchors.grid(hw)
    rng = np.random.default_rng(seed)
    objects = oracle.random_boxes(rng, 40, hw)
    objects[:20, 2:] = objects[:20, :2] + rng.uniform(1, 9, (20, 2))
    gt = make_gt(objects)
    found = ATSS(similarity=ALL[name])(anchors, gt).gt_index[0]
    np.testing.assert_array_equal(found, oracle.atss(anchors, objects, 9, "anchors", name))


@pytest.mark.parametrize("similarity", [IoU(), NWD(), NWD(2.0), SimD(), SimD(60.0, 50.0)])
@pytest.mark.parametrize("side", [(798, 770), (500, 790), (1200, 700), (24, 20)])
def test_atss_selects_few_of_an_objects_candidates(similarity, side):
    """The threshold holds for values of any magnitude: NWD of a large object is 1e-6 to 1e-40."""
    anchors = Anchors.grid((800, 1344))
    box = np.array([[60.5, 5.25, 60.5 + side[0], 5.25 + side[1]]], dtype=np.float32)
    found = ATSS(similarity=similarity)(anchors, make_gt(box)).gt_index[0]
    like = type(similarity).__name__.lower()
    expected = oracle.atss(anchors, box, 9, "anchors", like, **vars(similarity))
    np.testing.assert_array_equal(found, expected)
    assert 1 <= (found == 0).sum() <= 18


def test_configs_name_and_configure_similarities():
    rule = build_assigner(
        make_cfg(
            "MODEL.ATSS.ASSIGNERS.ATSS.SIMILARITY",
            "nwd",
            "MODEL.ATSS.SIMILARITIES.nwd.CONSTANT",
            20.0,
        )
    )
    assert rule.similarity == NWD(20.0)
    with pytest.raises(
        ValueError, match=r"SIMILARITIES.nwd.CONSTANT must be between 0.001 and 1e\+06"
    ):
        build_assigner(
            make_cfg(
                "MODEL.ATSS.ASSIGNERS.ATSS.SIMILARITY",
                "nwd",
                "MODEL.ATSS.SIMILARITIES.nwd.CONSTANT",
                -1.0,
            )
        )
