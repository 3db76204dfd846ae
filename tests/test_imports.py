"""Who may import what: the table in projects/ATSS/README.md, held for every module and tool."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PROJECT = ROOT / "projects" / "ATSS"
FILES = sorted([*PROJECT.rglob("*.py"), *ROOT.glob("tools/**/*.py")])
TOOLS = ("benchmarks", "gpu")  # packages of tools/
# The less public parts of Detectron2 are touched in these files alone.
LESS_PUBLIC = ("detectron2.engine.", "detectron2.checkpoint.", "detectron2.modeling.backbone.")
TOUCHING = (
    "engine/solver.py",
    "engine/trainer.py",
    "modeling/backbone.py",
    "checkpoints/checkpointer.py",
)


def table() -> dict[str, tuple[set[str], set[str]]]:
    """{place: (places that it may import, third parties that it may import when it is loaded)}."""
    page = (PROJECT / "README.md").read_text()
    page = page[page.index("## Who may import what") :]
    rows = re.findall(r"^\| `(\S+?)` \|(.*)\|(.*)\|$", page, re.MULTILINE)
    return {
        place: (set(re.findall(r"`(\S+?)`", ours)), set(re.findall(r"`(\S+?)`", others)))
        for place, ours, others in rows
    }


TABLE = table()


def place_of(module: list[str]) -> str:
    """The row of a module, named from the top: a file or a folder of atss, or another top."""
    if module[0] != "atss":
        return module[0]
    return module[1] if len(module) > 1 else "atss"


def module_of(file: Path) -> list[str]:
    if file.is_relative_to(PROJECT):
        parts = file.relative_to(PROJECT).with_suffix("").parts
    else:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[1] in TOOLS else parts
    return [part for part in parts if part != "__init__"]


def imports(file: Path) -> Iterator[tuple[list[str], bool]]:
    """Every module that a file imports, absolute, and whether it is when the file is loaded."""
    tree = ast.parse(file.read_text())
    later = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    inside = {node for outer in later for node in ast.walk(outer)}
    package = module_of(file) if file.name == "__init__.py" else module_of(file)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # What comes from the package itself may be a module.
            found = [[*base, alias.name] for alias in node.names] if base == ["atss"] else [base]
        else:
            continue
        for module in found:
            yield module, node not in inside


def what(module: list[str]) -> str:
    """The row of what is imported; names that the package itself exports are of row "atss"."""
    place = place_of(module)
    return place if place in TABLE else "atss"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_are_those_of_the_table(file):
    own = place_of(module_of(file))
    assert own in TABLE, f"no row for {own}"
    ours, others = TABLE[own]
    for module, at_import in imports(file):
        name = ".".join(module)
        if module[0] in ("atss", "atss_runner", *TOOLS):
            assert what(module) == own or what(module) in ours, f"{own} imports {name}"
        elif module[0] in sys.stdlib_module_names or not (at_import or own == "atss_runner"):
            continue
        elif name.startswith("matplotlib") and own == "analysis":
            assert file.name == "plots.py"
        else:
            allowed = any(name == x or name.startswith(f"{x}.") for x in others)
            assert allowed, f"{own} imports {name}"


def test_every_permission_is_used():
    """What nobody imports any longer is not allowed any longer."""
    used = {place: (set(), set()) for place in TABLE}
    for file in FILES:
        own = place_of(module_of(file))
        for module, _ in imports(file):
            if module[0] in ("atss", "atss_runner", *TOOLS):
                used[own][0].add(what(module))
            used[own][1].add(".".join(module))
    for place, (ours, others) in TABLE.items():
        assert ours <= used[place][0], f"{place} need not import {ours - used[place][0]}"
        for other in others:
            assert any(f"{x}.".startswith(f"{other}.") for x in used[place][1]), (place, other)


def test_tools_import_no_tool():
    scripts = {path.stem for path in ROOT.glob("tools/*.py")}
    for path in ROOT.glob("tools/*.py"):
        for module, _ in imports(path):
            assert module[0] not in scripts, path
            assert module[:2] != ["atss", "tools"], path


def test_three_files_touch_the_less_public_parts():
    for file in PROJECT.rglob("*.py"):
        if not str(file).endswith(TOUCHING):
            for module, _ in imports(file):
                assert not ".".join(module).startswith(LESS_PUBLIC), file


def test_the_config_is_read_in_its_room_alone():
    # Of configs for, and from, other projects.
    writers = ("convert.py", "detectors.py", "mmdet.py")
    for file in (PROJECT / "atss").rglob("*.py"):
        if file.parent.name != "config" and file.name not in writers:
            nodes = ast.walk(ast.parse(file.read_text()))
            values = [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)]
            assert not any(value.endswith("MODEL.ATSS") for value in values), file
