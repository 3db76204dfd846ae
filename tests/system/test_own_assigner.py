"""The rule of docs/own_assigner.md."""

import numpy as np
import oracle
import pytest
import torch
from conftest import make_gt
from pages import run_page

from atss import BACKGROUND, Anchors

with run_page("docs/own_assigner.md") as (names, _):
    TopK = names["TopK"]


def brute_force(anchors, gt, k, like="iou"):
    """(R,) over all anchors, in float64; scores that agree to 2^-40 tie, for the lower index."""
    boxes, gt = anchors.boxes.double().numpy(), gt.astype(np.float64)
    owner, best = np.full(len(boxes), BACKGROUND), np.full(len(boxes), -np.inf)
    if len(gt) == 0:
        return owner
    overlap = oracle.SIMILARITIES[like](gt, boxes)
    centre, gt_centre = (boxes[:, :2] + boxes[:, 2:]) / 2, (gt[:, :2] + gt[:, 2:]) / 2
    distance = np.linalg.norm(centre[None] - gt_centre[:, None], axis=2)
    score = np.round((overlap - distance / distance.max() / 1000) * 2.0**40)
    for g, box in enumerate(gt):
        chosen = np.argsort(-score[g], kind="stable")[:k]
        inside = np.minimum(centre[chosen] - box[:2], box[2:] - centre[chosen]).min(axis=1) > 0.01
        chosen = chosen[inside]
        better = chosen[overlap[g, chosen] > best[chosen]]
        owner[better], best[better] = g, overlap[g, better]
    return owner


@pytest.mark.parametrize("step", [None, 1], ids=["real", "integer"])
@pytest.mark.parametrize("k", [9, 1, 20])
@pytest.mark.parametrize("ratios", [(1.0,), (0.25, 4.0)])
def test_equals_brute_force(step, k, ratios):
    """Anchors of these ratios are exact; with others rounding would decide ties."""
    hw = (160, 350)
    anchors = Anchors.grid(hw, ratios=ratios)
    rng = np.random.default_rng(k)
    images = [oracle.random_boxes(rng, count, hw, step) for count in (60, 0, 5)]
    image_index = np.repeat(np.arange(3), [len(b) for b in images])
    gt_index = TopK(k)(anchors, make_gt(np.concatenate(images), image_index, 3)).gt_index.numpy()
    first = 0
    for image, boxes in zip(gt_index, images, strict=True):
        expected = brute_force(anchors, boxes, k)
        np.testing.assert_array_equal(image, np.where(expected >= 0, expected + first, -1))
        first += len(boxes)


def test_by_hand():
    """Anchors of 16 px every 8 px, an object of 20 px around location (1, 1), whose anchor has the
    highest IoU; next are the four in its row and column (10 x 16 px shared), whose centres lie 2 px
    inside; then the diagonal ones (10 x 10)."""
    anchors = Anchors.grid((32, 32), strides=(8,), scales=(2.0,))
    five = TopK(5)(anchors, make_gt([[2, 2, 22, 22]])).gt_index.view(4, 4)
    expected = torch.full((4, 4), BACKGROUND)
    expected[1, 0:3] = expected[0:3, 1] = 0
    assert five.tolist() == expected.tolist()


def test_no_object():
    gt_index = TopK()(Anchors.grid((64, 64)), make_gt([], num_images=2)).gt_index
    assert (gt_index == BACKGROUND).all()
    assert gt_index.shape[0] == 2


def test_refuses_k_below_one():
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        TopK(top_k=0)


@pytest.mark.parametrize(
    ("gain", "k", "images", "expected"),
    [
        # 16 px cost 0.00035 if the farthest anchor of the image is 45 px away, 0.00024 if 68 px.
        (3e-4, 1, [0, 1], [5]),
        (3e-4, 1, [0, 0], [6]),
        # Ties, rounding apart, go to the lower index.
        (1e-14, 2, [0, 1], [1, 5]),
    ],
)
def test_distance_is_relative_to_the_farthest_of_the_image(gain, k, images, expected):
    """An object around location 5 of 4 x 4, whose neighbour 6 is a bit more similar."""
    anchors = Anchors.grid((64, 64), strides=(16,))
    similarity = torch.full((16, 1), 0.5, dtype=torch.float64)
    similarity[6] += gain
    gt = make_gt([[0, 0, 48, 48], [48, 48, 64, 64]], images, max(images) + 1)
    gt_index = TopK(k, similarity=lambda boxes, objects: similarity.expand(16, 2))(anchors, gt)
    assert (gt_index.gt_index[0] == 0).nonzero().flatten().tolist() == expected
