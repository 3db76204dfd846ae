"""Files of detections, read back by the readers of labels."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atss.labels.coco import find_in_json
from atss.labels.formats import read_labels
from atss_runner import formats, media
from atss_runner.annotate import annotate, targets
from atss_runner.detections import Detections
from atss_runner.detector import read_bgr

# Words that yaml would read as other types, or not at all.
NAMES = ["yes", """1.10: "ß" 'x'"""]
SIZES = {"a.jpg": (60, 80), "day1/a.jpg": (64, 48), "day2/b.PNG": (200, 100), "none.tif": (50, 50)}
BOXES = np.array([[10.25, 20, 30, 40.5], [3, 4, 45, 46], [-5, 1, 20, 300]], np.float32)
SCORES = np.array([0.9, 0.75, 0.5], np.float32)


class Predictor:
    """A predictor of three boxes, the last beyond the image; of none on images of 50 x 50."""

    names, ids, size = NAMES, (0, 7), (96, 160)
    read, picture = staticmethod(read_bgr), staticmethod(lambda image: image)
    planes = None

    def __call__(self, images):
        count = [0 if image.shape[:2] == (50, 50) else 3 for image in images]
        return [Detections(BOXES[:n], SCORES[:n], np.array([1, 0, 1])[:n]) for n in count]


@pytest.fixture
def photos(tmp_path):
    for name, size in SIZES.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def write(photos, tmp_path):
    def write(*names, inputs=photos, predictor=Predictor):
        output = tmp_path / "out"
        found, _ = media.find_media([inputs], {".jpg", ".png", ".tif"}, output)
        places = targets(found, output)
        for place in places.values():
            place.parent.mkdir(parents=True, exist_ok=True)
        results = [*annotate(predictor(), places, 0.1)]
        run = formats.Run(results, output, predictor.names, predictor.ids)
        return output, formats.write(names, run)

    return write


def expected():
    """{(file name, class name): [x, y, width, height]} of boxes clipped to their images."""
    boxes = {}
    for name, (_, height) in SIZES.items():
        if name != "none.tif":
            for (x1, y1, x2, y2), k in zip(BOXES[:2].tolist(), (1, 0), strict=True):
                boxes[name, NAMES[k], x1] = [x1, y1, x2 - x1, y2 - y1]
            boxes[name, NAMES[1], 0.0] = [0, 1, 20, height - 1]
    return boxes


def boxes_of(content, top=""):
    names = {x["id"]: x["name"] for x in content["categories"]}
    files = {x["id"]: x["file_name"].removeprefix(top) for x in content["images"]}
    sizes = {x["file_name"].removeprefix(top): (x["width"], x["height"]) for x in content["images"]}
    assert sizes == SIZES
    return {
        (files[x["image_id"]], names[x["category_id"]], round(x["bbox"][0], 2)): x["bbox"]
        for x in content["annotations"]
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, box in found.items():
        assert box == pytest.approx(expected[key], abs=0.01)


def test_dataset_is_read_without_a_finding(write, photos):
    output, written = write("dataset")
    assert written == ["dataset.json"]
    labels = read_labels(str(output / "dataset.json"), str(photos))
    assert not [*labels.findings, *find_in_json(labels.content)[0]]
    assert_same(boxes_of(labels.content), expected())


def test_dataset_has_the_fields_that_importers_read(write):
    output, _ = write("dataset")
    content = json.loads((output / "dataset.json").read_text())
    for entries in content.values():
        assert [x["id"] for x in entries] == [*range(1, len(entries) + 1)]
    first = content["annotations"][0]
    assert first["area"] == pytest.approx(19.75 * 20.5, abs=0.01)
    assert (first["iscrowd"], first["segmentation"], first["score"]) == (0, [], 0.9)


def test_images_of_one_stem_keep_their_names(tmp_path):
    """Pictures are numbered: a.png, a_1.png, a_1_1.png. Images are not."""
    files = [tmp_path / "photos" / name for name in ("a.jpg", "a.png", "a_1.png")]
    other = tmp_path / "day2" / "a.jpg"
    for file in (*files, other):
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 40)).save(file)
    output = tmp_path / "out"
    output.mkdir()
    found, _ = media.find_media([tmp_path / "photos"], {".jpg", ".png"}, output)
    places = targets(found, output)
    results = [*annotate(Predictor(), places, 0.1)]
    run = formats.Run(results, output, NAMES, (0, 7))
    formats.write(["dataset"], run)
    content = json.loads((output / "dataset.json").read_text())
    names = {x["id"]: x["file_name"] for x in content["images"]}
    assert [names[x["id"]] for x in content["images"]] == [Path(x.source).name for x in results]
    assert {*names.values()} == {file.name for file in files}
    with pytest.raises(media.FileError, match=r"a\.jpg and .*a\.png would have one file"):
        formats.check_names(["yolo"], places, output)
    formats.check_names(["dataset"], places, output)
    found, _ = media.find_media([tmp_path / "photos", tmp_path / "day2"], {".jpg"}, output)
    both = [*annotate(Predictor(), targets(found, output), 0.1)]
    formats.write(["dataset"], run._replace(results=both))
    content = json.loads((output / "dataset.json").read_text())
    assert [x["file_name"] for x in content["images"]] == [files[0].as_posix(), other.as_posix()]


@pytest.mark.parametrize("source", [("yolo/data.yaml", "train"), ("yolo", "images")])
def test_labels_of_yolo_are_read(write, photos, source):
    """By the yaml, and by the class names."""
    output, written = write("yolo")
    assert written == ["yolo"]
    shutil.copytree(photos, output / "yolo" / "images")
    labels = read_labels(str(output / source[0]), source[1])
    assert {x.kind for x in labels.findings} == {"label_scored"}
    assert not find_in_json(labels.content)[0]
    assert_same(boxes_of(labels.content, "images/"), expected())


def test_lines_of_yolo_end_with_the_score(write):
    output, _ = write("yolo")
    lines = (output / "yolo/labels/a.txt").read_text().splitlines()
    assert lines[0] == "1 0.335417 0.378125 0.329167 0.256250 0.9000"
    assert (output / "yolo/labels/none.txt").read_text() == ""
    assert (output / "yolo/classes.txt").read_text(encoding="utf-8").splitlines() == NAMES


def test_table_has_a_row_for_each_detection(write, photos):
    output, written = write("csv", "coco")
    assert written == ["detections.csv", "detections.json"]
    with open(output / "detections.csv", newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    records = json.loads((output / "detections.json").read_text())
    assert len(rows) == len(records) == 9
    for row, record in zip(rows, records, strict=True):
        assert (row["file_name"], row["frame"]) == (record["file_name"], "")
        assert (row["class"], float(row["score"])) == (record["category_name"], record["score"])
        x, y, w, h = record["bbox"]
        corners = [float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
        assert corners == pytest.approx([x, y, x + w, y + h])
    assert rows[0]["file_name"] == str(photos / "a.jpg")
    assert (rows[0]["width"], rows[0]["height"]) == ("60", "80")


def test_classes_without_names_are_numbers(write):
    class Nameless(Predictor):
        names, ids = (), ()

    output, _ = write("yolo", "csv", "dataset", predictor=Nameless)
    assert (output / "yolo/classes.txt").read_text() == "0\n1\n"
    content = json.loads((output / "dataset.json").read_text())
    assert [x["name"] for x in content["categories"]] == ["0", "1"]


def test_empty_boxes_are_no_labels(write, photos):
    """Boxes outside the image, or thinner than the digits that are written."""

    class Thin(Predictor):
        def __call__(self, images):
            boxes = np.array([[70, 0, 80, 9], [5, 5, 5.004, 9]], np.float32)
            return [Detections(boxes, SCORES[:2], np.array([0, 1])) for _ in images]

    output, _ = write("yolo", "dataset", inputs=photos / "a.jpg", predictor=Thin)
    assert (output / "yolo/labels/a.txt").read_text() == ""
    assert json.loads((output / "dataset.json").read_text())["annotations"] == []


def test_interrupted_writing_keeps_the_earlier_file(write, monkeypatch):
    output, _ = write("coco")
    before = (output / "detections.json").read_text()

    def fail(self, text, **_):
        self.write_bytes(b"[")
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write("coco")
    assert (output / "detections.json").read_text() == before
