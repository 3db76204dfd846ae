from predicted_scenes import make_batch

from atss.assigners import (
    TAL,
)


def test_top_1_of_tal_is_among_its_top_13():
    """For anchors inside their objects; another object may have the anchor in the top 13."""
    anchors, gt, predictions, _, _ = make_batch("plain", 0)
    many, one = (TAL(k, inside="before")(anchors, gt, predictions).gt_index for k in (13, 1))
    counts = (one[one >= 0]).bincount()
    assert counts.max() == 1
    assert counts.sum() > 20
    assert (many[one >= 0] >= 0).all()
