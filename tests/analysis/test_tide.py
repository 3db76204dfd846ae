"""Kinds of errors and their costs: tidecv's, on all cases but those of equal scores."""

import re

import numpy as np
import pytest
from golden_results import CASES

from atss.analysis.tide import KINDS, RIGHT, find_errors, tide

# tidecv puts errors before right detections of equal score; here equal scores keep their order: by
# image, and in an image by position in the list. Worked out by hand from that order, the kinds and
# the lost objects of the case, one text per class: "14*9/9 18*21/22" are the first 14 of the 101
# recalls with a best precision of 9 right of 9 detections, then 18 with 21 of 22; recalls that are
# not reached have precision 0. A kind is mended as docs/report.md defines it: with Cls and Loc, the
# first detection at each lost object becomes right and the others leave the ranks; with Both, Dupe
# and Bkg, all leave; with Miss and FalseNeg, objects become fewer, and each right one is a longer
# step of recall: in medium_ties, 66, 44 and 34 become 59, 41 and 30, and 53, 37 and 26.
# edge_score_ties, + right, - wrong, L Loc of a lost object, 8 objects: class 1 is +++-++-L--L; with
# Loc +++-++-+--+, with Bkg +++++LL, with Miss 7 objects, with FalseNeg 5. Class 2 is +-.
# fmt: off
EQUAL_SCORES = {
    "edge_score_ties": {
        "before": ("38*3/3 25*5/6", "101*1/1"),
        "Loc": ("38*3/3 25*5/6 13*6/8 12*7/11", "101*1/1"),
        "Bkg": ("63*5/5", "101*1/1"),
        "Miss": ("43*3/3 29*5/6", "101*1/1"),
        "FalseNeg": ("61*3/3 40*5/6", "101*1/1"),
    },
    "medium_ties": {
        "before": (
            "14*9/9 18*21/22 5*24/26 9*30/33 1*31/35 4*33/38 4*36/42 8*41/49 3*43/52 "
            "1*44/54 8*49/70 1*50/76 2*51/80 1*52/106 2*53/113",
            "14*6/6 18*14/15 7*17/20 7*20/24 5*22/27 6*25/34 7*28/42 2*29/44 3*30/46 "
            "2*31/49 5*33/55 2*34/59 2*35/69 2*36/73 3*37/80",
            "33*11/11 9*14/15 6*16/18 5*18/22 3*19/24 3*20/28 6*22/31 3*23/37 3*24/39 "
            "3*25/42 3*26/50",
        ),
        "Cls": (
            "14*9/9 23*24/25 9*30/32 1*31/34 4*33/37 4*36/41 8*41/48 4*44/52 2*45/54 "
            "7*50/67 2*51/72 1*52/75 2*53/80 1*54/94 2*55/102 1*56/109",
            "14*6/6 18*14/15 14*20/22 5*22/25 6*25/30 3*26/32 6*29/36 3*30/38 2*31/41 "
            "5*33/46 2*34/50 2*35/53 2*36/60 3*37/64 2*38/70",
            "51*17/17 5*19/21 3*20/23 3*21/27 6*23/30 3*24/35 3*25/37 3*26/40 3*27/44 "
            "3*28/46",
        ),
        "Loc": (
            "14*9/9 18*21/22 25*37/40 7*42/47 3*44/50 2*45/52 7*50/63 2*51/69 1*52/73 "
            "2*53/97 1*54/99 2*55/101 1*56/104",
            "32*14/14 7*17/18 7*20/22 5*22/25 6*25/32 7*28/38 2*29/40 3*30/42 2*31/44 "
            "11*36/52 3*37/62 2*38/65 2*39/70 2*40/116",
            "33*11/11 9*14/15 14*19/21 6*21/24 6*23/27 3*24/31 3*25/33 3*26/36 3*27/42 "
            "3*28/45",
        ),
        "Both": (
            "14*9/9 18*21/22 5*24/26 9*30/33 1*31/35 4*33/38 4*36/42 8*41/48 3*43/51 "
            "1*44/53 8*49/68 1*50/73 2*51/76 1*52/99 2*53/106",
            "14*6/6 18*14/15 7*17/20 7*20/24 5*22/27 6*25/34 12*30/45 2*31/48 5*33/54 "
            "2*34/58 2*35/65 2*36/67 3*37/74",
            "33*11/11 9*14/15 6*16/18 5*18/22 3*19/24 3*20/28 6*22/31 6*24/37 3*25/40 "
            "3*26/48",
        ),
        "Dupe": (
            "32*21/21 14*30/31 1*31/33 4*33/36 4*36/40 11*43/48 1*44/50 8*49/63 1*50/68 "
            "2*51/71 1*52/94 2*53/101",
            "14*6/6 18*14/15 7*17/20 7*20/24 5*22/27 6*25/32 3*26/37 4*28/40 2*29/42 "
            "3*30/44 2*31/47 5*33/51 2*34/55 2*35/64 2*36/68 3*37/73",
            "33*11/11 9*14/15 6*16/18 5*18/22 3*19/24 9*22/29 3*23/34 6*25/37 3*26/44",
        ),
        "Bkg": (
            "14*9/9 18*21/22 5*24/26 9*30/33 1*31/35 4*33/38 4*36/42 8*41/49 3*43/52 "
            "1*44/54 8*49/70 1*50/74 2*51/78 1*52/88 2*53/91",
            "14*6/6 18*14/15 7*17/20 12*22/26 6*25/33 3*26/38 4*28/41 2*29/43 3*30/45 "
            "2*31/47 5*33/53 2*34/57 2*35/63 2*36/67 3*37/73",
            "33*11/11 9*14/15 6*16/18 5*18/22 3*19/24 3*20/28 6*22/31 3*23/37 3*24/39 "
            "3*25/42 3*26/50",
        ),
        "Miss": (
            "16*9/9 20*21/22 5*24/26 10*30/33 2*31/35 3*33/38 6*36/42 8*41/49 3*43/52 "
            "2*44/54 9*49/70 1*50/76 2*51/80 2*52/106 1*53/113",
            "15*6/6 20*14/15 7*17/20 7*20/24 5*22/27 7*25/34 8*28/42 2*29/44 3*30/46 "
            "2*31/49 5*33/55 2*34/59 3*35/69 2*36/73 3*37/80",
            "37*11/11 10*14/15 7*16/18 7*18/22 3*19/24 3*20/28 7*22/31 3*23/37 4*24/39 "
            "3*25/42 3*26/50",
        ),
        "FalseNeg": (
            "17*9/9 23*21/22 6*24/26 11*30/33 2*31/35 4*33/38 5*36/42 10*41/49 4*43/52 "
            "2*44/54 9*49/70 2*50/76 2*51/80 2*52/106 2*53/113",
            "17*6/6 21*14/15 8*17/20 9*20/24 5*22/27 8*25/34 8*28/42 3*29/44 3*30/46 "
            "2*31/49 6*33/55 2*34/59 3*35/69 3*36/73 3*37/80",
            "43*11/11 11*14/15 8*16/18 8*18/22 4*19/24 3*20/28 8*22/31 4*23/37 4*24/39 "
            "4*25/42 4*26/50",
        ),
    },
}
# fmt: on


def mean_ap(classes: tuple[str, ...]) -> float:
    """Return the mean AP of classes in points of 100, of their texts in EQUAL_SCORES."""
    steps = re.findall(r"(\d+)\*(\d+)/(\d+)", " ".join(classes))
    return sum(int(n) * int(right) / int(rank) for n, right, rank in steps) / 1.01 / len(classes)


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
    worked = EQUAL_SCORES.get(name, {})
    if worked:
        assert found["base_ap50"] == pytest.approx(mean_ap(worked["before"]), abs=1e-9)
    for key in ("dap", "dap_special"):
        # The whole of dap_special is missing if one of its fixes leaves no class.
        of_case = expected[key] or {"FalsePos": 0, "FalseNeg": None}
        gains = {k: mean_ap(x) - mean_ap(worked["before"]) for k, x in worked.items()}
        of_case = {k: gains.get(k, x) for k, x in of_case.items()}
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
