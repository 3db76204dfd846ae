"""The code of the pages runs, and the files that they name exist."""

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from pages import read_shell, run_page, train

from atss import cli, load_config
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

PAGES = (
    *("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md", "CHANGELOG.md", "projects/ATSS/README.md"),
    *(f"docs/{file.name}" for file in sorted(ROOT.glob("docs/*.md"))),
)


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


@pytest.mark.slow
def test_own_trainers_of_a_page_train(squares, tmp_path, monkeypatch):
    """For one iteration each, with a small network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(squares / "images", "images")
    for split in ("train", "val"):
        shutil.copy(squares / "annotations.json", f"{split}.json")
    page = (ROOT / "docs/own_trainer.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    short = {"SOLVER.MAX_ITER": 1, "TEST.EVAL_PERIOD": 0, "DATALOADER.NUM_WORKERS": 0}
    short |= {"INPUT.MIN_SIZE_TRAIN": "(64,)", "INPUT.MIN_SIZE_TEST": 64, "SOLVER.IMS_PER_BATCH": 2}
    before = {*DatasetCatalog.list()}
    for code, small in zip(codes, (TINY, {"MODEL.TIMM.PRETRAINED": False}), strict=True):
        pairs = [str(x) for item in (short | small | {"MODEL.DEVICE": "cpu"}).items() for x in item]
        changed = code.replace('"OUTPUT_DIR"', '*PAIRS, "OUTPUT_DIR"')
        assert changed != code
        exec(compile(changed, "own_trainer", "exec"), {"__name__": "__main__", "PAIRS": pairs})
    for name in {*DatasetCatalog.list()} - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for folder in ("out", "out_counting"):
        assert (tmp_path / folder / "model_final.pth").is_file()
    assert '"images_seen": 2' in (tmp_path / "out_counting/metrics.json").read_text()


def test_own_format_of_a_page_is_read():
    with run_page("docs/own_format.md") as (names, _):
        folder = names["folder"]
        labels = read_labels(str(folder / "labels.json"), str(folder))
    assert labels.names == ["cat", "dog"]
    assert [x["bbox"] for x in labels.content["annotations"]] == [[4.0, 6.0, 16.0, 24.0]]
    assert [x.kind for x in names["findings"]] == ["label_malformed"]
    shutil.rmtree(folder)


def test_every_file_named_on_a_page_exists():
    named = re.compile(r"(?<![\w/])(?:tools|configs|docs|tests|projects)/[\w/.-]+\.\w+")
    for page in PAGES:
        for name in named.findall((ROOT / page).read_text()):
            assert (ROOT / name).is_file(), f"{page} names {name}"
            if name.startswith("tools/"):
                assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"


def test_every_option_and_key_of_a_command_exists():
    before = r"(?:torchrun .* (?=tools)|[A-Z]\S+=\S+ )?"
    command = re.compile(rf"^ *{before}((?:atss |tools/\w+\.py\b).*)", re.MULTILINE)
    lines = [(page, line) for page in PAGES for line in command.findall(read_shell(page))]
    assert len(lines) > 40
    for page, line in lines:
        words = shlex.split(line.replace(" ...", ""), comments=True)
        try:
            load_config(opts=parse(words))
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{page}: {line}: {error}")


def parse(words):
    """Parse a command of atss or of a tool, and return its KEY VALUE pairs."""
    door, rest, pairs = words[0], words[1:], []
    if door == "atss":
        door, (pairs, rest) = words[1], cli.split_pairs(words[2:])
    name = cli.COMMANDS[door][0] if door in cli.COMMANDS else Path(door).stem
    own = {"train": cli.make_train_parser, "predict": cli.make_predict_parser}
    parser = own[door]() if door in own else importlib.import_module(name).make_parser()
    has_commands = parser._subparsers is not None  # which argparse does not intermix
    args = parser.parse_args(rest) if has_commands else parser.parse_intermixed_args(rest)
    return [*pairs, *getattr(args, "opts", [])]


def test_every_make_target_of_a_page_exists():
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for page in PAGES:
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)
        assert {*named} <= {*targets}, page
