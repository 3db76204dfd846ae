"""The options of tools/export.py."""

import export as tool
import pytest

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
