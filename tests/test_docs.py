"""The code of the pages runs, and the files that they name exist."""

import os
import re
import shutil

import pytest
import torch
from conftest import ROOT
from pages import run_page, train

from atss.labels.formats import read_labels

# Conditions on the names that the code of each page defines.
MADE = {
    "own_assigner": lambda x: (
        x["assignment"].positives_per_object(2).tolist() == [9, 9]
        and x["found"]["lists"].positives_per_object(2).tolist() == [9, 9]
    ),
    "own_box_code": lambda x: torch.equal(x["box"], x["anchor"]),
    "own_class_loss": lambda x: x["entropy"].shape == (2,),
    "own_head": lambda x: x["output"].classes.shape == (2, 80, 3),
}


@pytest.mark.parametrize("name", MADE)
def test_own_part_of_a_page_trains_by_its_yaml(name, tmp_path):
    with run_page(f"docs/{name}.md") as (names, codes):
        assert MADE[name](names)
        assert len(codes) == (2 if name == "own_assigner" else 1)
        models = [train(tmp_path / f"my_config_{i}.yaml", code) for i, code in enumerate(codes)]
    model = models[0]
    trained = {
        "own_assigner": lambda: (
            model.branches["main"].at(0).assigner.top_k == 5
            and models[1].branches["main"].at(0).assigner.margin == 1.0
        ),
        "own_box_code": lambda: model.box_coder.channels == 8,
        "own_class_loss": lambda: model.branches["main"].at(0).criterion.cls_loss.epsilon == 0.5,
        "own_head": lambda: model.head.cls_score.in_channels == 96,
    }
    assert trained[name]()


def test_own_format_of_a_page_is_read():
    with run_page("docs/own_format.md") as (names, _):
        folder = names["folder"]
        labels = read_labels(str(folder / "labels.json"), str(folder))
    assert labels.names == ["cat", "dog"]
    assert [x["bbox"] for x in labels.content["annotations"]] == [[4.0, 6.0, 16.0, 24.0]]
    assert [x.kind for x in names["findings"]] == ["label_malformed"]
    shutil.rmtree(folder)


def test_every_file_named_on_a_page_exists():
    pages = (
        "README.md",
        "MODEL_ZOO.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "projects/ATSS/README.md",
    )
    named = re.compile(r"(?<![\w/])(?:tools|configs|docs|tests|projects)/[\w/.-]+\.\w+")
    for file in (*(ROOT / page for page in pages), *ROOT.glob("docs/*.md")):
        for name in named.findall(file.read_text()):
            assert (ROOT / name).is_file(), f"{file.name} names {name}"
            if name.startswith("tools/"):
                assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
