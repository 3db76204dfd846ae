"""Labels by the authors' code for six sets of boxes and each of its rules."""

import numpy as np
import pytest
from conftest import GOLDEN, make_gt
from pages import run_page

from atss import IGNORE, Anchors
from atss.assigners import ATSS, MaxIoU, SpatialScale

REFERENCE = np.load(GOLDEN / "official_labels.npz")
RULES = {"ATSS": ATSS(), "SSC": SpatialScale(), "IoU": MaxIoU(in_box=True)}
with run_page("docs/own_assigner.md") as (names, _):
    RULES["TOPK"] = names["TopK"]()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("number", range(6))
def test_labels_and_matched_objects(name, number):
    anchors = Anchors.grid(tuple(REFERENCE["canvas_hw"].tolist()))
    # The authors' boxes end at the last pixel; continuous ones half a pixel beyond on either side.
    grown = REFERENCE[f"gt_boxes_{number}"] + np.array([-0.5, -0.5, 0.5, 0.5], np.float32)
    gt_index = RULES[name](anchors, make_gt(grown)).gt_index[0].numpy()
    classes = REFERENCE[f"gt_labels_{number}"]
    labels = np.where(gt_index >= 0, classes[gt_index.clip(0)], np.where(gt_index == IGNORE, -1, 0))
    np.testing.assert_array_equal(labels, REFERENCE[f"labels_{name}_{number}"])
    np.testing.assert_array_equal(gt_index[gt_index >= 0], REFERENCE[f"pos_gt_{name}_{number}"])
