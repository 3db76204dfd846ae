"""NumPy's filter, ranking and suppression against the detector's."""

import itertools

import numpy as np
import pytest
import torch

from atss import Anchors, HeadOutput
from atss.modeling.box_coding import Corners, LegacyPixels
from atss.modeling.postprocess import PostProcessor, product, root
from atss.modeling.suppression import NMS, ScoreVote, SoftVote, Vote, keep_all
from atss_runner.postprocess import in_original, select

ANCHORS = Anchors.grid((128, 160))
SIZE, ORIGINAL = (120, 150), (240, 310)
SUPPRESSIONS = {
    "none": (keep_all, {}),
    "nms": (NMS(0.5), {"threshold": 0.5}),
    "score_vote": (
        ScoreVote(0.5),
        {"threshold": 0.5, "spread": 0.025, "min_overlap": 0.01},
    ),
    "vote": (Vote(0.6), {"threshold": 0.6}),
    "soft_vote": (SoftVote(0.6), {"threshold": 0.6, "min_score": 0.05}),
}
FLAGS = ("threshold_on_score", "rank_by_class", "rank_anchors", "clip")


def outputs(seed=0, quality=True):
    """Boxes that overlap, some of them empty or beyond the canvas, and logits of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    shape = 1, len(ANCHORS.boxes)
    boxes = ANCHORS.boxes + 6 * torch.randn(*shape, 4, generator=generator)
    boxes[0, ::17] = boxes[0, ::17, [2, 1, 0, 3]]
    logits = 2 * torch.randn(*shape, 3, generator=generator) - 2
    return boxes, logits, torch.randn(shape, generator=generator) if quality else None


def both(boxes, logits, quality, score, suppression, legacy=False, **options):
    function, arguments = SUPPRESSIONS[suppression]
    post = PostProcessor(
        score_thresh=0.2,
        topk_candidates=40,
        max_detections=30,
        score=score,
        suppression=function,
        **options,
    )
    regression = boxes / ANCHORS.stride[:, None]
    output = HeadOutput(logits, regression, quality)
    (expected,) = post(output, ANCHORS, Corners(), [SIZE])
    expected = post.in_original(expected, *ORIGINAL)
    if legacy:
        LegacyPixels(Corners()).after_resizing(expected, SIZE)
    settings = {
        "score_thresh": 0.2,
        "topk": 40,
        "max_detections": 30,
        "score": "sqrt" if score is root else "product",
        "legacy_pixels": legacy,
        "suppression": {"name": suppression, **arguments},
        **options,
    }
    decoded = Corners().decode(regression, ANCHORS.boxes, ANCHORS.stride)
    values = {"boxes": decoded, "probabilities": logits.sigmoid()}
    if quality is not None:
        values["quality"] = quality.sigmoid()
    own = {name: x[0].numpy() for name, x in values.items()}
    found = select(own, ANCHORS.per_level, SIZE, settings)
    found = in_original(found, SIZE, ORIGINAL, settings)
    return expected, found


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("values", [*itertools.product([False, True], repeat=4)])
def test_detections_are_those_of_the_detector(suppression, values):
    options = dict(zip(FLAGS, values, strict=True))
    for seed, score in ((0, root), (1, product)):
        expected, found = both(*outputs(seed), score, suppression, **options)
        assert len(found.boxes) == len(expected) > 0
        order = np.argsort(-expected.scores.numpy(), kind="stable")
        np.testing.assert_allclose(found.scores, expected.scores.numpy()[order], rtol=1e-5)
        assert (found.classes == expected.pred_classes.numpy()[order]).all()
        boxes = expected.pred_boxes.tensor.numpy()[order]
        np.testing.assert_allclose(found.boxes, boxes, rtol=1e-5, atol=1e-3)


def test_scores_without_quality_are_probabilities():
    options = dict.fromkeys(FLAGS, False) | {"clip": True}
    expected, found = both(*outputs(quality=False), root, "nms", **options)
    assert len(found.boxes) == len(expected) > 0
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


def test_last_pixel_of_legacy_boxes_is_not_resized():
    options = dict.fromkeys(FLAGS, False) | {"clip": True}
    expected, found = both(*outputs(), root, "none", legacy=True, **options)
    order = np.argsort(-expected.scores.numpy(), kind="stable")
    boxes = expected.pred_boxes.tensor.numpy()[order]
    assert len(boxes) > 0
    np.testing.assert_allclose(found.boxes, boxes, rtol=1e-5, atol=1e-3)


def test_an_image_without_candidates_has_no_detections():
    boxes, logits, quality = outputs()
    for suppression in SUPPRESSIONS:
        options = dict.fromkeys(FLAGS, False)
        _, found = both(boxes, logits - 100, quality, root, suppression, **options)
        assert [x.shape for x in found] == [(0, 4), (0,), (0,)]
