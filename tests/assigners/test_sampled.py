import pytest
import torch
from conftest import make_gt
from detectron2.modeling.sampling import subsample_labels

from atss import BACKGROUND, IGNORE, Anchors, Assignment
from atss.assigners import ATSS, TAL, Sampled

ANCHORS = Anchors.grid((64, 64))


def rule_of(gt_index, score=None):
    return lambda *_: Assignment(torch.as_tensor(gt_index), score)


@pytest.mark.parametrize(
    ("num", "share", "positives", "background"),
    [(20, 0.5, 10, 10), (40, 0.5, 12, 28), (20, 0.0, 0, 20), (200, 1.0, 12, 60)],
)
def test_sample_has_detectron2s_numbers(num, share, positives, background):
    """Positives of any object, and background in the other places, drawn anew each time."""
    gt_index = torch.full((2, 84), BACKGROUND)
    gt_index[:, :12] = torch.arange(12) % 3
    gt_index[:, 72:] = IGNORE
    score = torch.rand(2, 84)
    rule = Sampled(rule_of(gt_index, score), num, share)
    drawn = torch.zeros(2, 84)
    for _ in range(40):
        found = rule(ANCHORS, make_gt([]))
        assert found.score is score
        for row, image in zip(found.gt_index, gt_index, strict=True):
            # Detectron2 has -1 for ignored, 0 for background.
            sizes = [len(x) for x in subsample_labels(image + 1, num, share, 0)]
            assert [(row >= 0).sum(), (row == BACKGROUND).sum()] == [positives, background] == sizes
            assert torch.equal(row[row != IGNORE], image[row != IGNORE])
        drawn += found.gt_index != IGNORE
    for part, number in ((drawn[:, :12], positives), (drawn[:, 12:72], background)):
        assert (part.sum(1) == 40 * number).all()
        assert bool(number) == (part > 0).all()


def test_sample_of_a_rule_needs_what_the_rule_needs():
    assert Sampled(TAL()).looks_at_predictions
    assert not Sampled(ATSS()).looks_at_predictions
