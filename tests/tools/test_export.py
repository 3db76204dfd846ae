"""The options of tools/export.py."""

import json

import export as tool
import pytest
import torch
from conftest import TINY, make_cfg
from detectron2.modeling import build_model

from atss.errors import UserError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--output m.xml", "--output must end in .onnx with --format onnx, got m.xml"),
        ("--output m.onnx --format openvino", "must end in .xml with --format openvino"),
        ("--output m.onnx --precision int8", "int8 needs --calibrate FOLDER"),
        ("--output m.onnx --max-drop 1", "--max-drop needs --evaluate SOURCE"),
        (
            "--output m.xml --format openvino --precision int8 --calibrate f",
            "int8 is for --format onnx",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, sentence):
    args = tool.make_parser().parse_intermixed_args(["out", *options.split()])
    with pytest.raises(UserError, match=sentence):
        tool.check(args)


def test_file_that_loses_more_than_max_drop_is_removed(tmp_path):
    files = [tmp_path / "m.xml", tmp_path / "m.bin"]
    for file in files:
        file.touch()
    words = ["out", "--output", str(files[0]), "--max-drop", "1", "--evaluate", "x.json:x"]
    args = tool.make_parser().parse_intermixed_args(words)
    tool.report_drop(args, 40.0, 39.1)
    assert all(file.exists() for file in files)
    with pytest.raises(UserError, match=r"AP fell by 1\.10, more than --max-drop 1"):
        tool.report_drop(args, 40.0, 38.9)
    assert not list(tmp_path.iterdir())


def test_thresholds_of_a_report_reach_the_exporter(tmp_path, monkeypatch):
    names = ("MODEL.ATSS.CLASS_NAMES", ["ant", "bee", "cat"], "MODEL.ATSS.NUM_CLASSES", 3)
    cfg = make_cfg(*[x for item in TINY.items() for x in item], *names)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_best.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    report = {"thresholds": {"cat": {"score": 0.25}, "ant": None}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    passed = []

    def export(model, cfg, target, nms, thresholds):
        passed.append(thresholds)
        target.touch()
        return []

    monkeypatch.setitem(tool.FORMATS, "onnx", (export, ".onnx"))
    words = [str(tmp_path), "--output", str(tmp_path / "m.onnx")]
    tool.main(words)
    tool.main([*words, "--thresholds", str(tmp_path / "report.json")])
    assert passed == [None, [None, None, 0.25]]
