"""The command of the runner: its options, and its messages without a network."""

import json

import numpy as np
import pytest
from PIL import Image

from atss_runner import __main__ as command
from atss_runner.detections import Detections
from atss_runner.detector import read_bgr


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on images, with a detector of one box; return its records and loads."""
    loads = []

    class Detector:
        names, ids, size, thresholds = ("ant", "bee"), (7, 9), (96, 160), None
        read, picture = staticmethod(read_bgr), staticmethod(lambda image: image)
        planes = None

        def __init__(self, *arguments):
            loads.append(arguments)
            self.counts = []

        def __call__(self, images):
            loads.append(len(images))
            if any((image == 77).all() for image in images):
                raise KeyboardInterrupt
            found = Detections(np.ones((1, 4)), np.array([0.5]), np.array([1]))
            return [found for _ in images]

    monkeypatch.setattr(command, "load", Detector)

    def run(*arguments, shades=(1, 2, 3)):
        for i, shade in enumerate(shades):
            Image.new("RGB", (60, 80), (shade,) * 3).save(tmp_path / f"{i}.png")
        command.main(["m.onnx", str(tmp_path), "--output", str(tmp_path / "out"), *arguments])
        return json.loads((tmp_path / "out" / "detections.json").read_text()), loads

    return run


def test_options_reach_the_detector(run, capsys):
    records, (load, *batches) = run("--threads", "2", "--batch", "2")
    assert load == ("m.onnx", 2, 2, None)
    assert batches == [2, 1]
    assert [(x["image_id"], x["category_id"]) for x in records] == [(0, 9), (1, 9), (2, 9)]
    assert capsys.readouterr().out.startswith("3 detections: ")
    assert run("--score-threshold", "0.6")[0] == []
    for words, tiles in ((["--tiles"], 0), (["--tiles", "640"], 640)):
        _, loads = run(*words)
        assert loads[-2] == ("m.onnx", 0, 4, tiles)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--batch", "0", ">= 1"),
        ("--threads", "-1", ">= 0"),
        ("--score-threshold", "40.0", "between 0 and 1"),
        ("--score-threshold", "nan", "between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(run, option, value, allowed):
    with pytest.raises(SystemExit, match=f"^error: {option} must be {allowed}, got {value}$"):
        run(option, value)


def test_detections_so_far_are_written_if_interrupted(run, tmp_path):
    with pytest.raises(SystemExit, match="130"):
        run("--batch", "1", shades=(1, 2, 77, 4))
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [x["image_id"] for x in records] == [0, 1]


def test_unusable_inputs_end_in_a_sentence(run, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: the inputs contain no image and no video$"):
        run(shades=())
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"^error: cannot write --output .*out: File exists$"):
        run()


def test_missing_model_ends_in_a_sentence(tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "0.png")
    with pytest.raises(SystemExit, match=r"^error: nowhere.onnx does not exist$"):
        command.main(["nowhere.onnx", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
