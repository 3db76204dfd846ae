"""The table of exit codes in docs/troubleshooting.md: each row is run."""

import re
import runpy
import sys

import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog

from atss.engine import launch
from atss.engine.hooks import EXIT_PREEMPTED

# What cannot be used, for each tool; and where it is when somebody presses ctrl-C.
TOOLS = {
    "ablation": (["--rows", "nowhere"], "atss.analysis.experiments.compare_rows"),
    "assignment_statistics": (["--annotations", "nowhere"], "atss.analysis.statistics.compare"),
    "benchmark": (["data", "--config-file", "nowhere"], "atss.model_zoo.get_config_file"),
    "check_dataset": (["nowhere", "nowhere"], "atss.data.datasets.read"),
    "convert_checkpoint": (
        ["--from", "mmdet", "nowhere", "x.pth"],
        "atss.checkpoints.convert_file",
    ),
    "demo": (
        ["--config-file", "nowhere", "--weights", "x", "--input", "nowhere", "--output", "out"],
        "atss_runner.media.find_media",
    ),
    "digits": (["--data", "."], "atss.analysis.demo.train_on_digits"),
    "train_net": (["--config-file", "nowhere"], "atss.engine.run.run"),
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
        except KeyboardInterrupt:
            return 128 + 2  # as shells name what Python makes of it
        return 0

    yield call
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def rows():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Exit codes\n")[2]
    found = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {(int(code), tools): when for code, tools, when in found}


def test_the_table_has_these_rows():
    others = "all others"
    assert {*rows()} == {
        *((0, "all"), (1, "`check_dataset.py`"), (1, others), (2, "`check_dataset.py`")),
        *((2, "all"), (75, "`train_net.py`"), (130, "all")),
    }
    assert {x.stem for x in (ROOT / "tools").glob("*.py")} == {*TOOLS, "__init__"}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_cannot_be_used(exit_code, tool, capsys):
    assert exit_code(tool, *TOOLS[tool][0]) == (2 if tool == "check_dataset" else 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_arguments(exit_code, tool):
    assert exit_code(tool, "--help") == 0
    assert exit_code(tool, "--no-such-option") == 2


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c(exit_code, tool, monkeypatch, squares):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    wrong, where = TOOLS[tool]
    monkeypatch.setattr(where, stop)
    register = f"--register=cells={squares}/annotations.json:{squares}/images"
    config = ("--config-file", ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")
    opts = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "('cells',)")
    opts += ("MODEL.WEIGHTS", squares / "annotations.json")  # which nobody opens
    argv = {
        "digits": [],
        "train_net": [*config, register, "--eval-only", *opts],
    }.get(tool, wrong)
    assert exit_code(tool, *argv) == launch.STOPPED == 130


def test_data(exit_code, squares, tmp_path):
    check = ("check_dataset", squares / "annotations.json")
    assert exit_code(*check, squares / "images") == 0
    (tmp_path / "empty").mkdir()
    assert exit_code(*check, tmp_path / "empty") == 1


def test_a_preempted_training():
    """tests/engine/test_hooks.py has it end with that."""
    assert EXIT_PREEMPTED == 75
