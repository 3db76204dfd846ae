from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from atss import Anchors
from atss.anchors import GridAnchorGenerator


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize(
    ("scales", "ratios"), [((8.0,), (1.0,)), ((4.0, 5.04, 6.35), (0.5, 1.0, 2.0))]
)
def test_grid_equals_detectron2(scales, ratios, offset):
    strides, hw = (8, 16, 32, 64, 128), (100, 333)
    theirs = DefaultAnchorGenerator(
        sizes=[[scale * stride for scale in scales] for stride in strides],
        aspect_ratios=[list(ratios)],
        strides=list(strides),
        offset=offset,
    )
    features = [torch.zeros(1, 1, -(-hw[0] // s), -(-hw[1] // s)) for s in strides]
    expected = torch.cat([x.tensor for x in theirs(features)])
    torch.testing.assert_close(
        Anchors.grid(hw, strides, scales, ratios, offset).boxes, expected, atol=1e-4, rtol=0
    )
    ours = GridAnchorGenerator(strides=strides, scales=scales, ratios=ratios, offset=offset)
    assert ours.num_anchors == theirs.num_anchors
    assert ours.box_dim == theirs.box_dim
    per_level = ours(features)
    assert [len(x) for x in per_level] == Anchors.grid(hw, strides, scales, ratios).per_level
    torch.testing.assert_close(
        torch.cat([x.tensor for x in per_level]), expected, atol=1e-4, rtol=0
    )


def test_one_square_anchor_of_eight_strides():
    anchors = Anchors.grid((16, 24), strides=(8,))
    assert anchors.sizes == ((2, 3),)
    assert anchors.boxes[0].tolist() == [-28, -28, 36, 36]
    assert anchors.boxes[4].tolist() == [12 - 32, 12 - 32, 12 + 32, 12 + 32]


def test_generator_caches_few_grids_in_several_threads():
    """Eight threads with more canvas sizes than the cache has."""
    generator = GridAnchorGenerator(strides=(8,))
    features = [[torch.zeros(1, 1, 2, width)] for width in range(1, 60)]

    def ask(seed):
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(59), 5))
        return all(generator.grid(features[i]).sizes == ((2, i + 1),) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    cached = generator.grid(features[0])
    assert generator.grid(features[0]) is cached
    for x in features[1:]:
        generator.grid(x)
    assert generator.grid(features[0]) is not cached  # after 58 others


def test_generator_returns_copies_of_boxes():
    generator, features = GridAnchorGenerator(strides=(8, 16)), [torch.zeros(1, 1, 2, 3)] * 2
    before = [x.tensor.clone() for x in generator(features)]
    for boxes in generator(features):
        boxes.scale(2, 2)
    for boxes, expected in zip(generator(features), before, strict=True):
        assert torch.equal(boxes.tensor, expected)


def test_grid_of_inference_mode_can_be_trained_with():
    generator, features = GridAnchorGenerator(strides=(8,)), [torch.zeros(1, 1, 3, 5)]
    with torch.inference_mode():
        assert len(generator.grid(features).stride) == 15
    scale, anchors = torch.ones(1, requires_grad=True), generator.grid(features)
    ((anchors.boxes * scale).sum() + (anchors.stride * scale).sum()).backward()
    assert torch.isfinite(scale.grad).all()
