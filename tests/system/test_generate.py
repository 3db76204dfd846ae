"""docs/generate.py, and that every key, command and tool stands on its page."""

import importlib.util

import pytest
from conftest import ROOT
from detectron2.config import get_cfg

from atss import add_atss_config, cli
from atss.config.checks import flatten

DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("page", generate.PAGES)
def test_page_is_what_the_code_makes(page):
    text = (DOCS / page).read_text()
    assert text == generate.PAGES[page](), "run python docs/generate.py"


def test_config_page_has_every_key():
    page = (DOCS / "config.md").read_text()
    cfg = get_cfg()
    before = dict(flatten(cfg))
    add_atss_config(cfg)
    added = [key for key, value in flatten(cfg) if key not in before and not hasattr(value, "keys")]
    assert len(added) > 100
    missing = [x for x in added if f"`{x}`" not in page]
    missing = [x for x in missing if f"`{x.removeprefix('MODEL.ATSS.')}`" not in page]
    assert not missing, "run python docs/generate.py"


def test_every_meaning_is_stated():
    for key, meaning in generate.explained_keys():
        assert meaning, key


def test_tools_page_has_every_command_and_tool():
    page = (DOCS / "tools.md").read_text()
    for command, (tool, _) in cli.COMMANDS.items():
        assert f"`atss {command}`" in page
        assert f"`tools/{tool}.py`" in page
    for file in ROOT.glob("tools/[!_]*.py"):
        assert f"`tools/{file.name}`" in page, file.name
