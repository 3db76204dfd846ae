"""docs/generate.py, and that every key, command, tool and public name stands on its page."""

import importlib.util
import inspect
import re
from pkgutil import walk_packages

import pytest
from conftest import ROOT
from detectron2.config import get_cfg

import atss
import atss_runner
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


def test_tools_page_has_a_row_and_an_example_of_each():
    page = (DOCS / "tools.md").read_text()
    expected = {tool: f"atss {command}" for command, (tool, _) in cli.COMMANDS.items()}
    tools = {file.stem for file in ROOT.glob("tools/[!_]*.py")}
    rows = re.findall(r"^\| (?:`(.+?)`)? *\| .+ \| `tools/(\w+)\.py` \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted((expected.get(tool, ""), tool) for tool in tools)
    sections = dict(x.partition("\n")[::2] for x in page.split("\n## ")[1:])
    for command, tool in rows:
        title = command or f"tools/{tool}.py"
        assert f"\n\n    {title} " in sections[title], f"no example of {title}"


def test_tools_page_has_every_option_of_train():
    section = (
        (DOCS / "tools.md").read_text().partition("\n## atss train\n")[2].partition("\n## ")[0]
    )
    for action in cli.make_train_parser()._actions:
        option = action.option_strings[-1]
        assert option == "--help" or f"`{option}" in section, option


def test_python_page_has_every_public_name():
    page = (DOCS / "python_api.md").read_text()
    packages = (atss, atss_runner)
    names = [x.name for p in packages for x in walk_packages(p.__path__, f"{p.__name__}.")]
    for name in ("atss", "atss_runner", *names):
        if name.startswith(("atss.tools", "atss.configs")) or name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            is_module = inspect.ismodule(getattr(module, public, module))
            assert is_module or f"\n### {public}\n" in page, f"{name}.{public}"
