"""Figures of results: those of pycocotools and of the definitions in docs/report.md."""

import json

import numpy as np
import pytest
from golden_results import BOX, CASES, FAR, scene

from atss.analysis.figures import (
    METRICS,
    compare,
    confusion,
    figures,
    images,
    limits,
    missed,
    per_class,
    suspected_labels,
    thresholds,
)
from atss.analysis.results import Results
from atss.errors import UserError

# pycocotools takes a match with annotation 0 for no match: there all detections are right, and 6 of
# 10 IoUs count; its figures are not the data's.
OF_PYCOCOTOOLS = [name for name in CASES if name != "edge_annotation_id_zero"]
# Case -> confusion matrix at a score of 0.3, if supervision's differs: it has no crowds, no cut at
# 100 detections, and matches from an IoU above 0.5. By hand from the notes of the cases.
MATRICES = {
    "crowd": [[2, 0, 0], [0, 3, 0], [1, 1, 0]],
    "edge_iou_exactly_half": [[5, 0, 0], [0, 2, 0], [2, 0, 0]],
    "edge_more_than_100": [[50, 0, 5], [0, 3, 0], [50, 0, 0]],
    "edge_ignored_is_error": [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
    "edge_crowd_exactly_half": [[3, 0, 0], [0, 1, 0], [0, 0, 0]],
}


def results_of(name: str) -> Results:
    return Results(CASES[name]["gt"], CASES[name]["detections"])


def points(values: list) -> list:
    return [None if x == -1 else pytest.approx(100 * x, abs=1e-6) for x in values]


@pytest.mark.parametrize("name", OF_PYCOCOTOOLS)
def test_ap_equals_pycocotools(name):
    expected = CASES[name]["expected"]["pycocotools"]
    found = figures(results_of(name))
    json.dumps(found, allow_nan=False)
    assert [found[x] for x in METRICS] == points(expected["stats"][:6])
    for of_class, x in zip(
        found["per_class"].values(), expected["per_class"].values(), strict=True
    ):
        assert [of_class[key] for key in METRICS] == points([x[key] for key in METRICS])
    curves = [x for x in found["curves"].values() if x]
    for curve, x in zip(curves, expected["curve_iou50"].values(), strict=True):
        assert curve["precision50"] == pytest.approx(x["precision"], abs=1e-6)
        assert curve["score50"] == pytest.approx(x["score"], abs=1e-6)


def test_annotation_id_zero_is_a_match():
    found = figures(results_of("edge_annotation_id_zero"))
    assert found["AP50"] == pytest.approx(100)
    assert found["confusion"]["matrix"] == [[4, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", OF_PYCOCOTOOLS)
def test_best_f1_is_at_a_score_that_occurs(name):
    expected = CASES[name]["expected"]["pycocotools"]["derived_best_f1_iou50"]
    found = figures(results_of(name))["thresholds"].values()
    for best, x in zip(found, expected.values(), strict=True):
        if x is None or not x["tp"]:
            assert best is None
        else:
            assert (best["score"], best["f1"]) == (x["score"], pytest.approx(x["f1"], abs=1e-9))
            assert best["recall"] == x["tp"] / (x["tp"] + x["fn"])
            assert best["precision"] == x["tp"] / (x["tp"] + x["fp"])


@pytest.mark.parametrize("name", OF_PYCOCOTOOLS)
def test_confusion_matches_within_classes_first(name):
    """The diagonal and the sums are pycocotools' right, lost and wrong detections."""
    expected = CASES[name]["expected"]
    matrix = confusion(results_of(name), 0.3)
    counts = expected["pycocotools"]["derived_counts_score0.3_iou50"]
    for k, x in enumerate(counts.values()):
        assert matrix[k, k] == x["tp"]
        assert matrix[k].sum() == x["tp"] + x["fn"]
        assert matrix[:, k].sum() == x["tp"] + x["fp"]
    if not name.startswith("medium"):
        of_supervision = expected["confusion"]["supervision_score0.3_iou0.5"]
        assert matrix.tolist() == MATRICES.get(name, of_supervision)


def test_wrong_class_of_higher_score_takes_no_object():
    """The detection of the right class finds the object, whatever the others' scores."""
    results = scene({1: [(1, BOX)]}, [(1, 2, BOX, 0.9), (1, 1, BOX, 0.5)])
    assert confusion(results, 0.3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert confusion(results, 0.6).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_second_pass_is_one_to_one_by_score():
    """The first takes the object of the larger IoU, the only one near the second."""
    objects = {1: [(1, BOX), (1, [20, 10, 40, 40])]}
    results = scene(objects, [(1, 2, [14, 10, 40, 40], 0.9), (1, 2, [4, 10, 40, 40], 0.8)])
    assert confusion(results, 0.3).tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0]]


def test_limits_are_the_thresholds_of_the_classes():
    found = [(1, 1, BOX, 0.9), (1, 2, FAR, 0.6), (1, 1, FAR, 0.2)]
    results = scene({1: [(1, BOX), (2, FAR)]}, found)
    assert limits(results, thresholds(results), 0.3).tolist() == [0.9, 0.6, 0.9]
    results = scene({1: [(1, BOX)]}, found)
    assert limits(results, thresholds(results), 0.3).tolist() == [0.9, 0.3, 0.9]


def test_threshold_may_be_zero():
    best = thresholds(scene({1: [(1, BOX)]}, [(1, 1, BOX, 0.0)]))["a"]
    assert (best["score"], best["f1"]) == (0, 1)


def test_suspected_labels_are_named_once():
    shifted = [12, 10, 40, 40]
    found = [(1, 2, BOX, 0.9), (1, 2, shifted, 0.8), (7, 1, FAR, 0.95), (7, 1, BOX, 0.4)]
    results = scene({7: [], 1: [(1, BOX)], 8: [(2, BOX)]}, [*found, (8, 2, BOX, 0.97)])
    wrong, missing = sorted(suspected_labels(results), key=lambda x: x["score"])
    assert (wrong["kind"], wrong["image_id"], wrong["annotation_id"]) == ("wrong_label", 1, 10)
    assert (wrong["predicted"], wrong["labelled"], wrong["score"]) == ("b", "a", 0.9)
    assert (missing["kind"], missing["image_id"]) == ("missing_annotation", 7)
    assert (missing["bbox"], missing["labelled"]) == (FAR, None)


def test_worst_images_by_each_cost():
    found = [(5, 1, BOX, 0.9), (5, 1, FAR, 0.8), (3, 1, FAR, 0.2), (4, 1, [10, 10, 40, 30], 0.7)]
    objects = {3: [(1, BOX), (1, FAR), (2, BOX)], 5: [(1, BOX)], 4: [(1, BOX)], 9: []}
    worst = images(scene(objects, found), 0.3)
    assert [(x["image_id"], x["cost"]) for x in worst["cost"]] == [(3, 3), (5, 1)]
    assert [(x["image_id"], x["lost"]) for x in worst["lost"]] == [(3, 3)]
    assert [(x["image_id"], x["wrong_score"]) for x in worst["wrong_score"]] == [(5, 0.8)]
    ious = [(x["image_id"], x["mean_iou"]) for x in worst["mean_iou"]]
    assert ious == [(4, pytest.approx(0.75)), (5, 1)]
    assert worst["cost"][0]["file_name"] == "3.jpg"
    assert worst["cost"][0]["mean_iou"] is None


def test_missed_objects_by_size_and_crowding():
    small, overlapping = [10, 10, 32, 32], [20, 10, 32, 32]
    results = scene({1: [(1, small), (2, overlapping), (1, FAR)]}, [(1, 1, small, 0.2)])
    found = missed(results, 0.3)
    # 32 x 32 is small and medium, as in pycocotools.
    sizes = {k: tuple(x.values()) for k, x in found["by_size"].items()}
    assert sizes == {"small": (2, 2, 1), "medium": (3, 3, 2), "large": (0, 0, 0)}
    of_class = per_class(results)["a"]
    assert [of_class[f"objects_{x}"] for x in sizes] == [1, 2, 0]
    crowding = {k: tuple(x.values()) for k, x in found["by_crowding"].items()}
    assert crowding["0"] == (1, 1, 1)
    assert crowding["0.5 to 1"] == (2, 2, 1)  # an IoU of 22 / 42


def test_difficult_objects_are_no_objects():
    results = scene({1: [(1, BOX)]}, [(1, 1, BOX, 0.9), (1, 1, FAR, 0.8)], difficult=1)
    found = figures(results)
    assert found["data"]["objects"] == 0
    assert found["AP"] is None
    assert found["confusion"]["matrix"][2] == [1, 0, 0]


def test_scores_that_are_no_probabilities_have_no_calibration():
    assert figures(scene({1: [(1, BOX)]}, [(1, 1, BOX, 7.5)]))["calibration"] is None


def test_calibration_counts_right_detections():
    found = figures(scene({1: [(1, BOX)]}, [(1, 1, BOX, 0.95), (1, 1, FAR, 0.95)]))
    assert found["calibration"]["ece"] == pytest.approx(0.45)
    assert [x["count"] for x in found["calibration"]["bins"]] == [0] * 9 + [2]


def test_comparison_has_intervals_of_the_difference():
    case = CASES["medium_ties"]
    first = results_of("medium_ties")
    second = Results(case["gt"], case["detections"][::2])
    found = compare(first, second, samples=30)
    ap = found["metrics"]["AP"]
    before, after = figures(first), figures(second)
    assert ap["difference"] == pytest.approx(after["AP"] - before["AP"], abs=1e-9)
    for name, x in found["per_class"].items():
        expected = after["per_class"][name]["AP"] - before["per_class"][name]["AP"]
        assert x == pytest.approx(expected, abs=1e-9)
    assert ap["low"] < ap["difference"] < ap["high"] < 0
    assert compare(first, second, samples=2)["metrics"]["AP"]["low"] != ap["low"]
    same = compare(first, first, samples=5)
    assert {x["high"] for x in same["metrics"].values()} == {0}


def test_runs_on_different_annotations_are_not_compared():
    with pytest.raises(UserError, match="evaluated on different annotations"):
        compare(results_of("perfect"), results_of("only_cls"))


def test_thousand_classes_give_a_matrix():
    categories = [{"id": i, "name": "same"} for i in range(1000)]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 99, "height": 99}],
        "categories": categories,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 998, "bbox": BOX}],
    }
    detection = {"image_id": 1, "category_id": 999, "bbox": BOX, "score": 0.9}
    found = figures(Results(content, [detection]))
    matrix = np.array(found["confusion"]["matrix"])
    assert matrix.shape == (1001, 1001)
    assert np.argwhere(matrix).tolist() == [[998, 999]]
    assert len(found["per_class"]) == 1000
