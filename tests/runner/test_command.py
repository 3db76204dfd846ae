"""The choice of thresholds, and results of interrupted commands."""

import json
import shutil
from argparse import ArgumentParser

import numpy as np
import pytest
from PIL import Image

from atss_runner import command
from atss_runner.detections import Detections
from atss_runner.detector import read_bgr
from atss_runner.media import FileError


class Predictor:
    """A predictor of an ant of 0.5 and a bee of 0.5."""

    names, ids, size, thresholds = ("ant", "bee"), (7, 9), (96, 160), None
    read, picture = staticmethod(read_bgr), staticmethod(lambda image: image)
    planes = None

    def __call__(self, images):
        boxes, scores = np.float32([[0, 0, 9, 9], [9, 9, 20, 20]]), np.float32([0.5, 0.5])
        return [Detections(boxes, scores, np.array([0, 1])) for _ in images]


class WithThresholds(Predictor):
    thresholds = (None, 0.6)


@pytest.fixture
def detect(tmp_path):
    """Detect on images; return the class names of the results, image by image."""
    (tmp_path / "report.json").write_text('{"thresholds": {"ant": {"score": 0.6}, "bee": null}}')
    parser = ArgumentParser()
    command.add_options(parser)

    def detect(*words, predictor=Predictor, names=("1.png",)):
        for name in names:
            (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 80)).save(tmp_path / "photos" / name)
        words = [x.format(tmp_path) for x in words]
        args = parser.parse_args(["--output", str(tmp_path / "out"), *words])
        places = command.find_inputs([str(tmp_path / "photos")], args)
        command.detect(args, places, predictor())
        records = json.loads((tmp_path / "out/detections.json").read_text())
        return [x["category_name"] for x in records]

    return detect


REPORT = ("--thresholds", "{}/report.json")


@pytest.mark.parametrize(
    ("predictor", "words", "expected"),
    [
        (Predictor, (), ["ant", "bee"]),
        (Predictor, ("--score-threshold", "0.55"), []),
        (Predictor, REPORT, ["bee"]),
        (Predictor, (*REPORT, "--score-threshold", "0.55"), []),
        (Predictor, (*REPORT, "--score-threshold", "0.45"), ["bee"]),
        # Of the exported file.
        (WithThresholds, (), ["ant"]),
        (WithThresholds, ("--score-threshold", "0.45"), ["ant", "bee"]),
        (WithThresholds, REPORT, ["bee"]),
    ],
)
def test_thresholds_are_those_nearest_to_the_user(detect, predictor, words, expected):
    assert detect(*words, predictor=predictor) == expected


def test_highest_score_is_named_with_thresholds_of_classes(detect, capsys):
    class Shy(Predictor):
        def __call__(self, images):
            return [x.take(slice(1)) for x in super().__call__(images)]

    detect(*REPORT, predictor=Shy)
    assert "highest score is 0.500, below the threshold of its class" in capsys.readouterr().out


def test_equal_names_of_subfolders_stay_apart(detect, tmp_path):
    names = ("1.png", "a/1.png", "b/1.png", "b/1.jpg")
    with pytest.raises(FileError, match=r"would have one file of labels, labels/b/1\.txt"):
        detect("--format", "yolo", names=names)
    assert len(detect("--format", "coco", "dataset", names=names)) == 8
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    assert {x["file_name"] for x in content["images"]} == {*names}
    shutil.rmtree(tmp_path / "photos/b")
    detect("--format", "coco", "yolo", names=names[:2])
    labels = tmp_path / "out/yolo/labels"
    found = {x.relative_to(labels).as_posix() for x in labels.rglob("*.txt")}
    assert found == {"1.txt", "a/1.txt"}


def test_only_requested_formats_are_written(detect, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/detections.json").write_text("[]")
    assert detect("--format", "csv") == []
    assert {x.name for x in (tmp_path / "out").iterdir()} == {
        *("detections.json", "detections.csv", "1.png")
    }
    assert capsys.readouterr().out.startswith("2 detections: pictures and detections.csv are in ")


def test_formats_are_written_if_interrupted(detect, tmp_path, capsys):
    class Interrupted(Predictor):
        def __call__(self, images):
            if (tmp_path / "out/2.png").exists():
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        detect(
            "--batch",
            "1",
            "--format",
            "yolo",
            predictor=Interrupted,
            names=("1.png", "2.png", "3.png"),
        )
    assert {x.name for x in (tmp_path / "out/yolo/labels").iterdir()} == {"1.txt", "2.txt"}
    assert capsys.readouterr().err == "stopped after 2 images or frames\n"
