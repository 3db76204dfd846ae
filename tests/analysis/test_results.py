"""Files of results: broken ones are named in a sentence."""

import json

import pytest

from atss.analysis import results
from atss.analysis.figures import figures
from atss.analysis.results import Results, find_results, read_annotations, read_detections
from atss.errors import UserError

GOOD = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}
CONTENT = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 99, "height": 99}],
    "categories": [{"id": 1, "name": "a"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40]}],
}


def write(content: object, folder) -> str:
    (folder / "results.json").write_text(content if type(content) is str else json.dumps(content))
    return str(folder / "results.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[{", "is not valid json"),
        ({"annotations": []}, "expected a list of detections, got a dict"),
        ([GOOD, 5], "detection 1 is 5: expected a dict with image_id, category_id"),
        ([{**GOOD, "score": "0.9"}], "detection 0 has score '0.9': expected a finite number"),
        ([{**GOOD, "score": float("nan")}], "detection 0 has score nan: expected a finite"),
        ([{**GOOD, "bbox": ["1", 2, 3, 4]}], "detection 0 has bbox .*: expected 4 finite numbers"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "detection 0 has bbox .*: expected 4 finite numbers"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "detection 0 has bbox .* of negative size"),
        ([{**GOOD, "bbox": [0, 0, 1e200, 9]}], "detection 0 has bbox .*: expected 4 finite"),
        ([{**GOOD, "category_id": 0}], "detection 0 has category_id 0, .*: they have 1"),
        ([{**GOOD, "category_id": [1]}], r"has category_id \[1\]: expected a number or a text"),
        ([{**GOOD, "image_id": 7}], "none of the 1 detections is of an image of the annotations"),
        ([{"image_id": 1}], "detection 0 has no 'category_id'"),
    ],
)
def test_broken_detections_are_named(content, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        read_detections(write(content, tmp_path), CONTENT)


def test_missing_file_is_named():
    with pytest.raises(UserError, match=r"cannot read the detections gone\.json: No such file"):
        read_detections("gone.json", CONTENT)


def test_annotations_with_errors_are_refused(tmp_path):
    annotation = {**CONTENT["annotations"][0], "image_id": 5}
    with pytest.raises(UserError, match=r"results\.json has"):
        read_annotations(write({**CONTENT, "annotations": [annotation]}, tmp_path))


def test_detections_of_other_images_are_counted(tmp_path):
    file = write([GOOD, {**GOOD, "image_id": 2}], tmp_path)
    assert read_detections(file, CONTENT) == ([GOOD], 1)


def test_detections_are_of_the_images_that_they_name(tmp_path):
    """`atss predict` takes numbers of file names for ids, which may be of other images."""
    images = [{**CONTENT["images"][0], "id": i, "file_name": f"a/{i + 1}.jpg"} for i in range(3)]
    content = {**CONTENT, "images": images}
    found = [{**GOOD, "image_id": i, "file_name": f"photos\\{i}.jpg"} for i in (1, 2, 3)]
    read, others = read_detections(write(found, tmp_path), content)
    assert ([x["image_id"] for x in read], others) == ([0, 1, 2], 0)
    found[1]["file_name"] = "b.jpg"
    with pytest.raises(UserError, match=r"detection 1 is of b\.jpg, but .* image_id 2 3\.jpg: rem"):
        read_detections(write(found, tmp_path), content)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("found", [[], [GOOD]])
def test_nothing_to_measure_is_null(objects, found):
    content = CONTENT if objects else {**CONTENT, "annotations": []}
    report = figures(Results(content, found))
    assert report["AP"] == (pytest.approx(100 * len(found)) if objects else None)
    assert (report["thresholds"]["a"] is None) == (not (objects and found))
    assert (report["curves"]["a"] is None) == (not objects)
    assert report["errors"]["counts"]["Bkg"] == (0 if objects else len(found))


def test_report_without_hotcoco_names_it(monkeypatch):
    monkeypatch.setattr(results, "hotcoco", None)
    with pytest.raises(UserError, match="needs hotcoco, which is not installed: pip"):
        Results(CONTENT, [])


def test_folder_without_results_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a training: it has no config\.yaml"):
        find_results(str(tmp_path))
