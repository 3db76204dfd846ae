"""The selection of exported files against the detector's postprocessing."""

import itertools

import pytest
import torch

from atss import Anchors, HeadOutput
from atss.errors import UserError
from atss.export.selection import Selected, select
from atss.modeling.box_coding import Corners
from atss.modeling.postprocess import PostProcessor, product, root
from atss.modeling.suppression import NMS, ScoreVote, keep_all

ANCHORS = Anchors.grid((96, 160))
SIZES = [(96, 150), (80, 160), (61, 77)]
FLAGS = ("threshold_on_score", "rank_by_class", "rank_anchors", "clip")


def outputs(seed=0, quality=True, num_classes=3):
    """Boxes that overlap, some of them empty or beyond the canvas, and logits. The last image has
    no candidate."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(SIZES), len(ANCHORS.boxes)
    boxes = ANCHORS.boxes + 6 * torch.randn(*shape, 4, generator=generator)
    boxes[0, ::17] = boxes[0, ::17][:, [2, 1, 0, 3]]
    logits = 2 * torch.randn(*shape, num_classes, generator=generator) - 2
    logits[2] -= 100
    return boxes, logits, torch.randn(shape, generator=generator) if quality else None


def both(boxes, logits, quality, **options):
    """Detections of the model and of the exported form, as sets of rows for each image."""
    options = {"score_thresh": 0.2, "topk_candidates": 40, "max_detections": 30} | options
    post = PostProcessor(**options)
    regression = boxes / ANCHORS.stride[:, None]
    expected = post(HeadOutput(logits, regression, quality), ANCHORS, Corners(), SIZES)
    decoded = Corners().decode(regression, ANCHORS.boxes, ANCHORS.stride)
    found = select(
        decoded,
        logits.sigmoid(),
        None if quality is None else quality.sigmoid(),
        ANCHORS.per_level,
        torch.tensor(SIZES),
        post,
    )
    rows = [
        torch.cat([x.pred_boxes.tensor, x.scores[:, None], x.pred_classes[:, None]], dim=1)
        for x in expected
    ]
    return rows, found


def assert_equal(rows, found):
    boxes, scores, classes, count = found
    assert count.tolist() == [len(x) for x in rows]
    for expected, box, score, k in zip(rows, boxes, scores, classes, strict=True):
        n = len(expected)
        ours = torch.cat([box, score[:, None], k[:, None]], dim=1)
        torch.testing.assert_close(ours[:n], expected, rtol=0, atol=1e-6)
        assert (box[n:] == 0).all()
        assert (score[n:] == 0).all()
        assert (k[n:] == -1).all()


@pytest.mark.parametrize("suppression", [keep_all, NMS(0.5), NMS(0.5, class_agnostic=True)])
@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=4)))
def test_detections_are_those_of_the_detector(suppression, values):
    options = dict(zip(FLAGS, values, strict=True))
    for seed, score in ((0, root), (1, product)):
        rows, found = both(*outputs(seed), score=score, suppression=suppression, **options)
        assert all(map(len, rows[:2]))
        assert not len(rows[2])
        assert_equal(rows, found)


def test_scores_without_quality_are_probabilities():
    assert_equal(*both(*outputs(quality=False)))


@pytest.mark.parametrize("suppression", [keep_all, NMS(0.5)])
@pytest.mark.parametrize("rank_anchors", [False, True])
def test_limits_may_exceed_the_anchors(suppression, rank_anchors):
    limits = {"topk_candidates": 500, "max_detections": 9000}
    rows, found = both(
        *outputs(num_classes=1),
        **limits,
        suppression=suppression,
        rank_anchors=rank_anchors,
        score_thresh=0.0,
    )
    assert_equal(rows, found)


def test_infinite_boxes_are_no_detections():
    boxes, *others = outputs()
    boxes[1, ::3, 2] = torch.inf
    assert_equal(*both(boxes, *others, clip=False))


def test_a_score_of_zero_may_be_a_detection():
    boxes, logits, quality = outputs()
    logits[0, 1], quality[0, 1] = torch.tensor([3, -9, -9]), -1000
    limits = {"topk_candidates": 500, "max_detections": 9000, "score_thresh": 0.7}
    rows, found = both(boxes, logits, quality, suppression=keep_all, **limits)
    assert (rows[0][:, 4] == 0).sum() == 1
    assert_equal(rows, found)


def test_votes_are_refused():
    class Detector(torch.nn.Module):
        postprocess = PostProcessor(suppression=ScoreVote())

    with pytest.raises(UserError, match=r"not ScoreVote \(MODEL.ATSS.SUPPRESSION\)"):
        Selected(Detector())
