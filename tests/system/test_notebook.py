"""docs/quickstart.ipynb."""

import base64
import json
import subprocess
import sys

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"


def read_outputs(file):
    """Return {MIME type or "stream": content} of each output, for each code cell."""
    cells = json.loads(file.read_text())["cells"]
    return [
        [x.get("data", {"stream": x.get("text")}) for x in cell["outputs"]]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_stored_outputs_are_small_and_name_no_machine():
    outputs = [x for cell in read_outputs(DOCS / "quickstart.ipynb") for x in cell]
    pictures = [base64.b64decode(x["image/jpeg"]) for x in outputs if "image/jpeg" in x]
    assert len(pictures) == 2
    assert all(len(x) < 200_000 for x in pictures)
    assert str(ROOT) not in (DOCS / "quickstart.ipynb").read_text()


@pytest.mark.slow
def test_notebook_runs_and_detects_digits(tmp_path):
    new = tmp_path / "new.ipynb"
    command = [sys.executable, "-W", "ignore", str(DOCS / "notebook.py"), "--output", str(new)]
    subprocess.run(command, cwd=tmp_path, check=True)
    stored, outputs = read_outputs(DOCS / "quickstart.ipynb"), read_outputs(new)
    assert [[[*x] for x in cell] for cell in outputs] == [[[*x] for x in cell] for cell in stored]
    results = [x["text/plain"] for cell in outputs for x in cell if "text/plain" in x]
    (precisions,) = (x for x in results if "bbox_EMA" in "".join(x))
    assert json.loads("".join(precisions).replace("'", '"'))["bbox_EMA"]["AP50"] > 30
