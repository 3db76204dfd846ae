import math

import pytest
import torch
from torchvision.ops import box_iou, nms

from atss.modeling.suppression import NMS, ScoreVote, SoftVote, Vote, keep_all


def test_suppression_is_per_class_and_exact():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 1000
    size = 50 + torch.rand(300, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + size], dim=1)
    scores, classes = torch.rand(300, generator=generator), torch.arange(300) % 7
    found = NMS(0.3)(boxes, scores, classes, 300)
    kept = [scores.tolist().index(x) for x in found.scores.tolist()]
    expected, overlap = [], box_iou(boxes.double(), boxes.double())
    for i in scores.argsort(descending=True).tolist():
        rivals = [j for j in expected if classes[j] == classes[i]]
        if all(overlap[i, j] <= 0.3 for j in rivals):
            expected.append(i)
    assert kept == expected


@pytest.mark.parametrize("most", [20_000, 100])
def test_class_agnostic_suppression_equals_torchvision(monkeypatch, most):
    monkeypatch.setattr(NMS, "MAX_BOXES", most)
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(300, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 40 + torch.rand(300, 2, generator=generator) * 60], dim=1)
    scores, classes = torch.rand(300, generator=generator), torch.arange(300) % 7
    kept = nms(boxes, scores, 0.5)
    found = NMS(0.5, class_agnostic=True)(boxes, scores, classes, 300)
    assert all(map(torch.equal, found, (boxes[kept], scores[kept], classes[kept])))
    assert len(kept) < len(NMS(0.5)(boxes, scores, classes, 300).boxes)
    voted = ScoreVote(0.5, class_agnostic=True)(boxes, scores, classes, 300)
    assert all(map(torch.equal, voted[1:], found[1:]))


def test_class_agnostic_votes_keep_the_best_class():
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 6], [20, 0, 28, 8]])
    scores, classes = torch.tensor([0.5, 1.0, 0.7]), torch.tensor([4, 1, 1])
    found = Vote(0.5, class_agnostic=True)(boxes, scores, classes, 9)
    assert found.classes.tolist() == [1, 1]
    assert found.boxes[0].tolist() == pytest.approx([0, 0, 8, (6 + 0.5 * 8) / 1.5])
    found = SoftVote(0.5, 0.1, class_agnostic=True)(boxes, scores, classes, 9)
    assert found.classes.tolist() == [1, 1, 4]
    assert found.scores.tolist() == pytest.approx([1, 0.7, 0.5 * (1 - 6 / 8)])


def test_suppression_is_exact_for_high_classes():
    """IoU 0.60005, at coordinates around 1,000: shifted apart in float32, the sixtieth class loses
    hundredths of a pixel."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6.0005], [990, 990, 1000, 1000]])
    boxes = torch.cat([boxes, torch.tensor([[20.0, 0, 30, 10], [20, 0, 30, 5.9995]])])
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.full((5,), 60)
    found = NMS(0.6)(boxes, scores, classes, 5)
    assert torch.equal(found.boxes, boxes[[0, 2, 3, 4]])


def test_suppression_with_negative_coordinates():
    """Boxes that are not clipped may end before 0: a shift by the greatest coordinate alone would
    lay the second class on the first."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [-11, -11, -1, -1], [-11, -11, -1, -1.5]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 1])
    assert torch.equal(NMS(0.6)(boxes, scores, classes, 9).boxes, boxes[:2])


def test_suppressions_return_the_best_up_to_the_limit():
    corner = torch.arange(40.0)[:, None] * torch.tensor([20.0, 0])
    boxes = torch.cat([corner, corner + 10], dim=1)
    scores, classes = (
        torch.rand(40, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 3,
    )
    best = scores.sort(descending=True).values
    for suppress in (NMS(), ScoreVote(), Vote(), SoftVote(), keep_all):
        found = suppress(boxes, scores, classes, 7)
        assert torch.equal(found.scores, best[:7])
        assert torch.equal(boxes[[scores.tolist().index(x) for x in best[:7]]], found.boxes)


def test_score_voting_by_hand():
    """A box of IoU 0.9 with the best, which is suppressed, still moves it, by its score and by
    exp(-0.1^2 / 0.025) = 0.670; one of another class does not."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8]])
    scores, classes = torch.tensor([0.8, 0.4, 0.9]), torch.tensor([1, 1, 2])
    found = ScoreVote(0.6)(boxes, scores, classes, 10)
    weight = 0.4 * math.exp(-(0.1**2) / 0.025)
    mean = (0.8 * 10 + weight * 9) / (0.8 + weight)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])
    assert found.classes.tolist() == [2, 1]
    assert found.boxes[1].tolist() == pytest.approx([0, 0, 10, mean])
    assert torch.equal(found.boxes[0], boxes[2])


def test_score_voting_equals_its_formula_box_by_box():
    """All boxes of the class that overlap by more than 0.01 vote; which boxes stay, their order and
    scores are those of NMS."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(200, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 40 + torch.rand(200, 2, generator=generator) * 60], dim=1)
    scores, classes = torch.rand(200, generator=generator), torch.arange(200) % 3
    plain = NMS(0.5)(boxes, scores, classes, 40)
    found = ScoreVote(0.5, spread=0.3)(boxes, scores, classes, 40)
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.classes, plain.classes)
    overlap = box_iou(plain.boxes.double(), boxes.double())
    for i in range(40):
        total, mean = 0.0, torch.zeros(4, dtype=torch.float64)
        for j in range(200):
            if classes[j] == plain.classes[i] and overlap[i, j] > 0.01:
                weight = math.exp(-((1 - overlap[i, j].item()) ** 2) / 0.3) * scores[j].item()
                mean += weight * boxes[j].double()
                total += weight
        torch.testing.assert_close(found.boxes[i].double(), mean / total, atol=1e-4, rtol=1e-5)


def test_votes_need_more_than_the_minimum_overlap():
    """IoU 1 / 2 does not vote where the least is 1 / 2."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]])
    scores, classes = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.long)
    found = ScoreVote(0.4, min_overlap=0.5)(boxes, scores, classes, 9)
    assert torch.equal(found.boxes, boxes[:1])
    found = ScoreVote(0.4, min_overlap=0.49)(boxes, scores, classes, 9)
    assert found.boxes[0, 3] < 8


def test_a_box_without_votes_stays():
    """It has no area, or only voters of score 0: their mean is none."""
    boxes = torch.tensor([[5.0, 5, 5, 9], [20, 0, 28, 8]])
    scores, classes = torch.tensor([0.9, 0.0]), torch.zeros(2, dtype=torch.long)
    found = ScoreVote()(boxes, scores, classes, 9)
    assert torch.equal(found.boxes, boxes)


def test_bounded_memory_gives_equal_results(monkeypatch):
    """With many boxes, classes are processed one by one and votes are counted in pieces."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(300, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 40 + torch.rand(300, 2, generator=generator) * 60], dim=1)
    scores = (torch.rand(300, generator=generator) * 20).round() / 20  # many alike
    classes = torch.arange(300) % 7
    expected = ScoreVote(0.5)(boxes, scores, classes, 50)
    monkeypatch.setattr(NMS, "MAX_BOXES", 100)
    monkeypatch.setattr(ScoreVote, "PAIRS", 1000)
    found = ScoreVote(0.5)(boxes, scores, classes, 50)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_score_voting_without_boxes():
    found = ScoreVote()(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 10)
    assert [len(x) for x in found] == [0, 0, 0]
