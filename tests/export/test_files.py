"""The padding of exported networks, and the comparison of detections."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import with_own_backbone
from torch import nn

from atss.errors import UserError
from atss.export.files import OUTPUTS, _compare_detections, metadata, raw_outputs
from atss.export.padding import static_padding
from atss_runner.postprocess import select

PER_LEVEL = [192, 48, 12]
SETTINGS = {
    "score_thresh": 0.05,
    "topk": 100,
    "max_detections": 100,
    "score": "sqrt",
    "threshold_on_score": False,
    "rank_by_class": False,
    "rank_anchors": False,
    "clip": True,
    "suppression": {"name": "nms", "threshold": 0.6},
}


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "side"),
    [(3, 2, 1, (32, 64)), (5, 2, 1, (64, 32)), ((5, 3), (1, 2), 1, (32, 32)), (3, 1, 2, (32, 32))],
)
def test_constant_padding_is_that_of_timm(kernel, stride, dilation, side):
    layers = pytest.importorskip("timm.layers")
    conv = layers.Conv2dSame(3, 4, kernel, stride=stride, dilation=dilation)
    model, image = nn.Sequential(conv), torch.rand(2, 3, *side)
    expected = model(image)
    with torch.no_grad(), static_padding(model):
        torch.testing.assert_close(model(image), expected)
    assert "forward" not in vars(conv)
    conv.forward = own = partial(type(conv).forward, conv)
    with static_padding(model):
        assert conv.forward is not own
    assert conv.forward is own
    torch.testing.assert_close(model(image), expected)


def test_detections_that_differ_from_the_runner_are_refused():
    sizes, raw = np.array([[90, 100]]), random_outputs()
    pixels = np.zeros((1, 3, 96, 128), np.float32)
    found = select({k: x[0] for k, x in raw.items()}, PER_LEVEL, tuple(sizes[0]), SETTINGS)
    outputs = dict(zip(("boxes", "scores", "classes"), (x[None] for x in found), strict=True))
    outputs["count"] = np.array([len(found.boxes)])

    def compare(**changed):
        loaded = SimpleNamespace(
            settings=SETTINGS,
            per_level=lambda canvas: PER_LEVEL,
            outputs=lambda pixels, sizes: outputs | changed,
        )
        return _compare_detections(loaded, pixels, sizes, raw)

    assert compare() == (100, 0)
    for changed in (
        {"boxes": outputs["boxes"] + 1},
        {"scores": outputs["scores"] * 0.99},
        {"classes": (outputs["classes"] + 1) % 3},
        {"count": outputs["count"] - 2, "classes": np.where(np.arange(100) < 98, 1, -1)[None]},
    ):
        with pytest.raises(UserError, match=r"differs from the runner: \d+ of 100 detections"):
            compare(**changed)
    with pytest.raises(UserError, match="counts other detections than it returns"):
        compare(count=outputs["count"] - 1)


def random_outputs():
    """Boxes, probabilities and quality of random values."""
    generator = np.random.default_rng(0)
    count = sum(PER_LEVEL)
    corners = generator.uniform(0, 90, (1, count, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 40, (1, count, 2))], axis=2)
    values = boxes, generator.uniform(size=(1, count, 3)), generator.uniform(size=(1, count))
    return dict(zip(OUTPUTS, (x.astype(np.float32) for x in values), strict=True))


def test_backbone_that_rounds_down_is_refused(monkeypatch):
    """The runner cuts outputs into levels of side / stride cells, rounded up."""
    model, _ = with_own_backbone(monkeypatch)
    assert raw_outputs(model) == OUTPUTS
    model, cfg = with_own_backbone(monkeypatch, "rounds down")
    sentence = r"have \[4, 1\] anchors at 17 x 17 pixels, a runner expects \[9, 4\]: each"
    with pytest.raises(UserError, match=sentence):
        metadata(model, cfg)
