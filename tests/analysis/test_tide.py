"""Kinds of errors and their costs: tidecv's, on all cases but those of equal scores."""

import numpy as np
import pytest
from golden_results import CASES

from atss.analysis.tide import KINDS, RIGHT, find_errors, tide

# tidecv puts errors before right detections of equal score; here equal scores keep their order.
# edge_score_ties by hand, + right, - wrong, L Loc of a lost object. AP before, of 8 objects:
# +++-++-L--L: (38 + 25 * 5/6) / 101 = 58.25, and class 2, +-: 100.
#   Loc   +++-++-+--+: 38 + 25 * 5/6 + 13 * 6/8 + 12 * 7/11 points of 101
#   Bkg   +++++LL: 63 points; Miss, of 7 objects: 43 + 29 * 5/6; FalseNeg, of 5: 61 + 40 * 5/6.
BEFORE = 38 + 25 * 5 / 6
# medium_ties: tidecv 1.0.1 on scores lowered by 1e-9 for each detection before them in the list.
EQUAL_SCORES = {
    "edge_score_ties": {
        "Loc": (25 * 5 / 6 + 38 + 13 * 6 / 8 + 12 * 7 / 11 - BEFORE) / 2.02,
        "Bkg": (63 - BEFORE) / 2.02,
        "Miss": (43 + 29 * 5 / 6 - BEFORE) / 2.02,
        "FalseNeg": (61 + 40 * 5 / 6 - BEFORE) / 2.02,
    },
    "medium_ties": {
        "Cls": 6.323816202874696,
        "Loc": 7.3726968377527555,
        "Both": 0.434912705166127,
        "Dupe": 2.0858979499923436,
        "Bkg": 0.4868036558402906,
        "Miss": 7.143774518331867,
        "FalseNeg": 16.764414682173594,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_counts_and_costs_equal_tidecv(name):
    case = CASES[name]
    expected = case["expected"]["tidecv"]
    found = tide(case["gt"], case["detections"])
    if name == "empty_both":  # tidecv divides by zero
        assert {found["base_ap50"], *found["dap"].values()} == {None}
        assert {*found["counts"].values()} == {0}
        return
    assert found["counts"] == expected["counts"]
    assert found["base_ap50"] == pytest.approx(expected["ap50"], abs=1e-6)
    for key in ("dap", "dap_special"):
        # The whole of dap_special is missing if one of its fixes leaves no class.
        of_case = expected[key] or {"FalsePos": 0, "FalseNeg": None}
        of_case = {k: EQUAL_SCORES.get(name, {}).get(k, x) for k, x in of_case.items()}
        assert found[key] == pytest.approx(of_case, abs=1e-6), key


@pytest.mark.parametrize("name", [x for x in CASES if x != "empty_both"])
def test_kind_of_every_detection_equals_tidecvs(name):
    case = CASES[name]
    expected = case["expected"]["tidecv"]
    errors = find_errors(case["gt"], case["detections"])
    kinds = [None] * len(case["detections"])
    for i, kind in zip(errors.index, errors.kind, strict=True):
        kinds[i] = "TP" if kind == RIGHT else KINDS[kind]
    assert kinds == expected["kind_of_detection"]
    assert sorted(errors.index[errors.ignored]) == expected["ignored_detections"]
    ids = np.array([x["id"] for x in case["gt"]["annotations"] if not x["iscrowd"]], dtype=int)
    assert sorted(ids[errors.lost]) == expected["objects_not_found"]
    assert sorted(ids[errors.missed]) == expected["missed_objects"]


def test_equal_ious_give_the_first_object():
    """The second detection then finds the second object; it is near no other."""
    boxes = [[10, 10, 40, 40], [30, 10, 40, 40]]
    category = [{"id": 1, "name": "a"}]
    common = {"image_id": 1, "category_id": 1}
    objects = [{**common, "id": i, "bbox": x, "iscrowd": 0} for i, x in enumerate(boxes, start=1)]
    dataset = {"images": [{"id": 1}], "categories": category, "annotations": objects}
    found = [([20, 10, 40, 40], 0.9), ([34, 10, 40, 40], 0.8)]
    detections = [{**common, "bbox": box, "score": score} for box, score in found]
    assert find_errors(dataset, detections).kind.tolist() == [RIGHT, RIGHT]
