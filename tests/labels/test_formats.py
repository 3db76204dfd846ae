"""Detection of the format, and the imports of the readers."""

import io
import subprocess
import sys

import pytest
from conftest import ROOT

from atss.errors import UserError
from atss.labels import coco
from atss.labels.folders import with_progress
from atss.labels.formats import read_labels, sources

# Imports every module of labels/ in a package "atss" without its __init__.py, which imports torch.
IMPORT_ALL = """
import importlib, pkgutil, sys, types
sys.modules |= {"torch": None, "torchvision": None, "detectron2": None, "fvcore": None}
atss = sys.modules["atss"] = types.ModuleType("atss")
atss.__path__ = [sys.argv[1]]
for module in pkgutil.iter_modules([sys.argv[1] + "/labels"]):
    importlib.import_module(f"atss.labels.{module.name}")
    print(module.name)
"""


def test_labels_import_neither_torch_nor_detectron2():
    package = ROOT / "projects" / "ATSS" / "atss"
    command = [sys.executable, "-c", IMPORT_ALL, str(package)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    modules = {path.stem for path in (package / "labels").glob("*.py")} - {"__init__"}
    assert set(result.stdout.split()) == modules


def test_a_folder_with_two_formats_is_refused(tmp_path):
    for name in ("classes.txt", "a.xml", "b.txt", "b.png"):
        (tmp_path / name).touch()
    for read in (read_labels, sources):
        with pytest.raises(ValueError, match=r"labels of two formats, .* such as b\.txt: put each"):
            read(str(tmp_path), ".")


@pytest.mark.parametrize("images", [".", "train"])
def test_unknown_suffix_is_reported_with_the_formats(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("file,x1,y1,x2,y2,class")
    formats = r"choose \.json, \.yaml, \.yml, \.data or a folder"
    with pytest.raises(UserError, match=rf"^x\.csv: unknown label format \.csv: {formats}$"):
        read_labels("x.csv", images)


def test_json_with_another_suffix_is_read(tmp_path):
    file = tmp_path / "labels.coco"
    file.write_text('{"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}')
    assert read_labels(str(file), str(tmp_path)).names == ["a"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_terminals_only(squares, is_terminal, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(coco, "NOTED_SIZE", 0)
    coco.read_coco(str(squares / "annotations.json"))
    assert (f"reading {squares}/annotations.json (0 MB)" in shown.getvalue()) == is_terminal
    assert list(with_progress(iter("abc"), 3, "image")) == ["a", "b", "c"]
    assert "image" not in shown.getvalue().replace(str(squares), "")  # it took no two seconds
