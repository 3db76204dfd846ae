import torch

from atss import Anchors, HeadOutput
from atss.modeling.box_coding import BoxDeltas
from atss.modeling.postprocess import PostProcessor, product

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


def test_boxes_beyond_the_border_take_nobodys_place():
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


def test_clips_to_the_image_before_suppression():
    """[32, 48] and [37, 53] share 11 of 21 pixels, but 11 of 16 in an image of 48 pixels."""
    output = output_of({(2, 0): 2.0, (3, 0): 1.0})
    output.numbers[0, 3, 0] = -10 * 11 / 16
    assert len(detect(output, image_size=(64, 64))) == 2
    assert len(detect(output, image_size=(64, 48))) == 1
    assert detect(output, image_size=(10, 40)).pred_boxes.tensor.amax(dim=0).tolist()[2:] == [
        40,
        10,
    ]


def test_nothing_found_is_an_empty_result():
    result = detect(output_of({}))
    assert len(result) == 0
    assert result.pred_boxes.tensor.shape == (0, 4)
