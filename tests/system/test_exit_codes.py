"""The exit codes of docs/troubleshooting.md; tests/engine/test_hooks.py tests 75."""

import re
import runpy
import sys

import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog

from atss.engine.watch import EXIT_INTERRUPTED

# Arguments with which each tool fails.
TOOLS = {
    "ablation": ["nowhere.yaml"],
    "assignment_statistics": ["--annotations", "nowhere"],
    "benchmark": ["data", "--config-file", "nowhere"],
    "check_dataset": ["nowhere", "nowhere"],
    "convert_checkpoint": ["--from", "mmdet", "nowhere", "x.pth"],
    "convert_dataset": ["nowhere:nowhere", "--output", "x.json"],
    "report": ["nowhere"],
    "demo": ["--config-file", "nowhere", "--weights", "x", "--input", "nowhere", "--output", "out"],
    "digits": ["--data", "."],
    "explore": ["--register", "x=nowhere:nowhere", "--image", "a.png"],
    "export": ["nowhere", "--output", "x.onnx"],
    "train_net": ["--config-file", "nowhere"],
}
# The function that ctrl-C interrupts, for tools that handle it; Python exits with 130 otherwise.
STOPPED_IN = {
    "demo": "atss_runner.media.find_media",
    "digits": "atss.analysis.demo.train_on_digits",
    "train_net": "atss.engine.run.run",
}


@pytest.fixture
def exit_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = set(DatasetCatalog.list())

    def call(tool, *argv):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        except SystemExit as stop:
            return 1 if isinstance(stop.code, str) else stop.code or 0
        return 0

    yield call
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def read_rows():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Exit codes\n")[2]
    found = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {(int(code), tools): when for code, tools, when in found}


def test_rows_are_those_of_the_page():
    others = "all others"
    assert {*read_rows()} == {
        *((0, "all"), (1, "`check_dataset.py`"), (1, others), (2, "`check_dataset.py`")),
        *((2, "all"), (75, "`train_net.py`"), (130, "all")),
    }
    assert {x.stem for x in (ROOT / "tools").glob("*.py")} == {*TOOLS, "__init__"}


@pytest.mark.parametrize("tool", TOOLS)
def test_unusable_input_exits_with_1_or_2(exit_code, tool):
    assert exit_code(tool, *TOOLS[tool]) == (2 if tool == "check_dataset" else 1)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_exits_with_0_and_unknown_options_with_2(exit_code, tool):
    assert exit_code(tool, "--help") == 0
    assert exit_code(tool, "--no-such-option") == 2


@pytest.mark.parametrize("tool", STOPPED_IN)
def test_ctrl_c_exits_with_130(exit_code, tool, monkeypatch, squares):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(STOPPED_IN[tool], stop)
    register = f"--register=cells={squares}/annotations.json:{squares}/images"
    config = ("--config-file", ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")
    opts = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "('cells',)")
    opts += ("MODEL.WEIGHTS", squares / "annotations.json")  # is not read
    argv = {
        "digits": [],
        "train_net": [*config, register, "--eval-only", *opts],
    }.get(tool, TOOLS[tool])
    assert exit_code(tool, *argv) == EXIT_INTERRUPTED == 130


def test_faulty_data_exits_with_1(exit_code, squares, tmp_path):
    check = ("check_dataset", squares / "annotations.json")
    assert exit_code(*check, squares / "images") == 0
    (tmp_path / "empty").mkdir()
    assert exit_code(*check, tmp_path / "empty") == 1
