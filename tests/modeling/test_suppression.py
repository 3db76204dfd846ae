import torch
from torchvision.ops import box_iou

from atss.modeling.suppression import NMS, SoftVote, Vote, keep_all


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


def test_suppression_is_exact_for_high_classes():
    """IoU 0.60005, at coordinates around 1,000: shifted apart in float32, the sixtieth class loses
    hundredths of a pixel."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6.0005], [990, 990, 1000, 1000]])
    boxes = torch.cat([boxes, torch.tensor([[20.0, 0, 30, 10], [20, 0, 30, 5.9995]])])
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.full((5,), 60)
    found = NMS(0.6)(boxes, scores, classes, 5)
    assert torch.equal(found.boxes, boxes[[0, 2, 3, 4]])


def test_all_keep_to_the_limit_best_first():
    corner = torch.arange(40.0)[:, None] * torch.tensor([20.0, 0])
    boxes = torch.cat([corner, corner + 10], dim=1)
    scores, classes = (
        torch.rand(40, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 3,
    )
    best = scores.sort(descending=True).values
    for suppress in (NMS(), Vote(), SoftVote(), keep_all):
        found = suppress(boxes, scores, classes, 7)
        assert torch.equal(found.scores, best[:7])
        assert torch.equal(boxes[[scores.tolist().index(x) for x in best[:7]]], found.boxes)
