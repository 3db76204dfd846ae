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
def test_sample_is_that_of_detectron2(num, share, positives, background):
    """With the same random numbers: positives of any object, background in the other places."""
    gt_index = torch.full((2, 84), BACKGROUND)
    gt_index[:, :12] = torch.arange(12) % 3
    gt_index[:, 72:] = IGNORE
    score = torch.rand(2, 84)
    torch.manual_seed(5)
    found = Sampled(rule_of(gt_index, score), num, share)(ANCHORS, make_gt([]))
    torch.manual_seed(5)
    for row, image in zip(found.gt_index, gt_index, strict=True):
        expected = subsample_labels(image.add(1).clamp(min=-1), num, share, 0)
        for index, values in zip(expected, (row >= 0, row == BACKGROUND), strict=True):
            assert {*index.tolist()} == {*values.nonzero().flatten().tolist()}
        assert torch.equal(row[row >= 0], image[row >= 0])
        assert ((row >= 0).sum(), (row == BACKGROUND).sum()) == (positives, background)
    assert found.score is score


def test_sample_of_a_rule_needs_what_the_rule_needs():
    assert Sampled(TAL()).looks_at_predictions
    assert not Sampled(ATSS()).looks_at_predictions
