"""The pages' code runs as it stands there."""

import os
import re

import pytest
import torch
from conftest import ROOT, make_cfg, make_input
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from atss import add_atss_config
from atss.assigners import ASSIGNER_REGISTRY


@pytest.fixture(scope="module")
def page():
    """Runs docs/own_assigner.md; gives its names and its yaml."""
    text = (ROOT / "docs" / "own_assigner.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    names = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "own_assigner.md", "exec"), names)
    yield names, next(code for language, code in blocks if language == "yaml")
    ASSIGNER_REGISTRY.entries.pop("NearestInside")


def test_own_assigner_is_twenty_lines_and_works(page):
    names, _ = page
    counts = names["assignment"].positives_per_object(2)
    assert counts.shape == (2,)
    assert counts.min() > 0


def test_own_assigner_trains_by_its_yaml(page, tmp_path):
    _, code = page
    config = tmp_path / "my_config.yaml"
    config.write_text(code.replace("configs/", f"{ROOT}/configs/"))
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.merge_from_file(str(config))
    assert cfg.MODEL.ATSS.ASSIGNERS.NearestInside.MIN_IOU == 0.3
    opts = ("MODEL.ATSS.ASSIGNER", "NearestInside", "MODEL.FPN.OUT_CHANNELS", 64)
    model = build_model(make_cfg(*opts)).train()
    losses = model([make_input([[20, 20, 90, 80]], [0])])
    assert torch.isfinite(sum(losses.values()))


def test_every_file_that_a_page_names_exists():
    own = (
        "README.md",
        "MODEL_ZOO.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "projects/ATSS/README.md",
    )
    named = re.compile(r"(?<![\w/])(?:tools|configs|docs|tests|projects)/[\w/.-]+\.\w+")
    for file in (*(ROOT / page for page in own), *ROOT.glob("docs/*.md")):
        for name in named.findall(file.read_text()):
            assert (ROOT / name).is_file(), f"{file.name} names {name}"
            if name.startswith("tools/"):
                assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
