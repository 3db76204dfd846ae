import torch

from atss import Anchors, HeadOutput
from atss.modeling.box_coding import BoxDeltas, Corners
from atss.modeling.postprocess import PostProcessor, product, root

ANCHORS = Anchors.grid((64, 64), strides=(16, 32), scales=(1.0,))  # 16 of 16 px, 4 of 32 px
CODE = BoxDeltas()


def output_of(scores: dict[tuple[int, int], float], quality: float | None = 0.0) -> HeadOutput:
    """One image; {(anchor, class): logit}, every other logit is -20; boxes are the anchors."""
    logits = torch.full((1, 20, 3), -20.0)
    for (anchor, k), value in scores.items():
        logits[0, anchor, k] = value
    q = None if quality is None else torch.full((1, 20), quality)
    return HeadOutput(logits, torch.zeros(1, 20, 4), q)


def detect(output: HeadOutput, image_size=(64, 64), **options):
    return PostProcessor(**options)(output, ANCHORS, CODE, [image_size])[0]


def test_filters_on_the_class_score_alone():
    """Class probability 0.06 passes 0.05 although the product with centerness does not."""
    logit = torch.logit(torch.tensor(0.06)).item()
    result = detect(output_of({(3, 1): logit}, quality=-3.0))
    assert result.pred_classes.tolist() == [1]
    expected = (0.06 * torch.tensor(-3.0).sigmoid()).sqrt()
    torch.testing.assert_close(result.scores[0], expected)
    assert len(detect(output_of({(3, 1): logit - 0.5}, quality=3.0))) == 0


def test_the_threshold_itself_does_not_pass():
    assert len(detect(output_of({(0, 0): 0.0}), score_thresh=0.5)) == 0
    assert len(detect(output_of({(0, 0): 1e-3}), score_thresh=0.5)) == 1


def test_empty_clipped_boxes_are_dropped():
    """The anchors of the last column lie right of an image 40 pixels wide, with better scores."""
    beyond = {(anchor, k): 3.0 for anchor in (3, 7, 11, 15) for k in range(3)}
    real = {(0, 0): 1.0, (5, 1): 2.0}
    result = detect(output_of(beyond | real), image_size=(64, 40), max_detections=5)
    assert result.pred_classes.tolist() == [1, 0]
    assert result.pred_boxes.nonempty().all()


def test_scores():
    p, q = torch.tensor(2.0).sigmoid(), torch.tensor(0.3).sigmoid()
    output = output_of({(0, 0): 2.0}, quality=0.3)
    torch.testing.assert_close(detect(output).scores[0], (p * q).sqrt())
    torch.testing.assert_close(detect(output, score=product).scores[0], p * q)
    torch.testing.assert_close(detect(output._replace(quality=None)).scores[0], p)


def test_keeps_the_best_per_level_and_per_image():
    scores = {(anchor, 0): anchor / 10 for anchor in range(20)}
    assert len(detect(output_of(scores))) == 20
    result = detect(output_of(scores), topk_candidates=3)
    kept = (result.pred_boxes.tensor[:, 2] - result.pred_boxes.tensor[:, 0]).tolist()
    assert sorted(kept) == [16, 16, 16, 32, 32, 32]
    result = detect(output_of(scores), max_detections=5)
    expected = torch.tensor([1.9, 1.8, 1.7, 1.6, 1.5])
    torch.testing.assert_close(result.scores, (expected.sigmoid() / 2).sqrt())


def test_ranks_on_the_product():
    output = output_of({(0, 0): 2.0, (1, 0): 1.0})
    output.quality[0, 0] = -4.0
    best = detect(output, topk_candidates=1).pred_boxes.tensor[0]
    assert torch.equal(best, ANCHORS.boxes[1])


def test_ranks_by_class_probability_alone():
    output = output_of({(0, 0): 2.0, (1, 0): 1.0})
    output.quality[0, 0] = -4.0
    best = detect(output, topk_candidates=1, rank_by_class=True)
    assert torch.equal(best.pred_boxes.tensor[0], ANCHORS.boxes[0])
    expected = root(torch.tensor(2.0).sigmoid(), torch.tensor(-4.0).sigmoid())
    torch.testing.assert_close(best.scores[0], expected)


def test_threshold_on_score():
    """Class probability 0.04 does not pass 0.05, its root with a quality of 1 does."""
    logit = torch.logit(torch.tensor(0.04)).item()
    output = output_of({(3, 1): logit}, quality=20.0)
    assert len(detect(output)) == 0
    found = detect(output, threshold_on_score=True)
    torch.testing.assert_close(found.scores, torch.tensor([0.2]))
    found = detect(output._replace(quality=None), threshold_on_score=True)
    assert len(found) == 0
    # And the other way round: 0.06 passes, its product with a half does not.
    output = output_of({(3, 1): torch.logit(torch.tensor(0.06)).item()})
    assert len(detect(output, score=product)) == 1
    assert len(detect(output, score=product, threshold_on_score=True)) == 0


def test_anchors_ranked_by_their_best_class():
    """Two pairs of the best anchor, and none of the second best, of one place on each level."""
    output = output_of({(0, 0): 3.0, (0, 1): 1.0, (1, 2): 2.0, (17, 0): 0.5})
    pairs = detect(output, topk_candidates=1)
    assert sorted(pairs.pred_classes.tolist()) == [0, 0]
    anchors = detect(output, topk_candidates=1, rank_anchors=True)
    assert anchors.pred_classes.tolist() == [0, 1, 0]
    torch.testing.assert_close(anchors.scores[1], (torch.tensor(1.0).sigmoid() / 2).sqrt())
    many = output_of({(0, 0): 1.0, (0, 1): 1.0, (0, 2): 1.0, (1, 2): 2.0})
    assert detect(many, topk_candidates=1, rank_anchors=True).pred_classes.tolist() == [2]
    output.quality[0, 0] = -8.0
    best = detect(output, topk_candidates=1, rank_anchors=True)
    assert best.pred_classes.tolist() == [2, 0]
    best = detect(output, topk_candidates=1, rank_anchors=True, rank_by_class=True)
    assert sorted(best.pred_classes.tolist()) == [0, 0, 1]


def test_probabilities_equal_their_logits():
    output = output_of({(0, 0): 2.0})
    said = output._replace(classes=output.classes.sigmoid(), probabilities=True)
    a, b = detect(output), detect(said)
    assert torch.equal(a.scores, b.scores)
    assert len(a) == len(b) == 1


def test_clips_to_the_image_before_suppression():
    """[32, 48] and [37, 53] share 11 of 21 pixels, but 11 of 16 in an image of 48 pixels."""
    output = output_of({(2, 0): 2.0, (3, 0): 1.0})
    output.box_regression[0, 3, 0] = -10 * 11 / 16
    assert len(detect(output, image_size=(64, 64))) == 2
    assert len(detect(output, image_size=(64, 48))) == 1
    assert detect(output, image_size=(10, 40)).pred_boxes.tensor.amax(dim=0).tolist()[2:] == [
        40,
        10,
    ]


def test_no_candidates_give_an_empty_result():
    result = detect(output_of({}))
    assert len(result) == 0
    assert result.pred_boxes.tensor.shape == (0, 4)


def test_boxes_without_clipping():
    """Before suppression and after resizing; what has no end is dropped."""
    anchors = Anchors.grid((16, 16), strides=(8,), scales=(2.0,))
    numbers = torch.tensor([[-2.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, torch.inf, 1], [1, 1, 2, 3]])
    output = HeadOutput(torch.full((1, 4, 1), 3.0), numbers[None], None)
    detect = PostProcessor(clip=False)
    (found,) = detect(output, anchors, Corners(), [(16, 16)])
    assert sorted(found.pred_boxes.tensor.tolist()) == [
        *([-16.0, 0, 8, 8], [0, 0, 8, 8], [8, 8, 16, 24]),
    ]
    half = detect.in_original(found, 8, 16)
    assert half.image_size == (8, 16)
    zoom = torch.tensor([1.0, 0.5, 1.0, 0.5])
    assert torch.equal(half.pred_boxes.tensor, found.pred_boxes.tensor * zoom)
    assert torch.equal(half.scores, found.scores)
    output = output.map(lambda x: x.clamp(max=9))
    (clipped,) = PostProcessor()(output, anchors, Corners(), [(16, 16)])
    assert clipped.pred_boxes.tensor.min() == 0
    assert clipped.pred_boxes.tensor.max() == 16
