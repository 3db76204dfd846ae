"""Allowed imports: the table in projects/ATSS/README.md, for every module and tool."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import detectron2
import pytest
from conftest import ROOT

PROJECT = ROOT / "projects" / "ATSS"
FILES = sorted([*PROJECT.rglob("*.py"), *ROOT.glob("tools/**/*.py")])
TOOLS = ("benchmarks",)  # packages of tools/
# Modules of Detectron2 that change more often between its versions, and the files that may import
# them.
UNSTABLE = ("detectron2.engine.", "detectron2.checkpoint.", "detectron2.modeling.backbone.")
UNSTABLE_IMPORTS = (
    "engine/solver.py",
    "engine/steps.py",
    "engine/trainer.py",
    "modeling/backbone.py",
    "checkpoints/checkpointer.py",
)
# Files that may use or override private members of Detectron2 (``_name``).
PRIVATE_USES = (
    "analysis/demo.py",
    "checkpoints/checkpointer.py",
    "data/images.py",
    "data/mapper.py",
    "engine/best.py",
    "engine/coco.py",
    "engine/evaluation.py",
    "engine/steps.py",
    "engine/terminal.py",
    "engine/trainer.py",
    "engine/writers.py",
    "modeling/timm_backbone.py",
    "predictor.py",
)


def table() -> dict[str, tuple[set[str], set[str], set[str]]]:
    """{place: (places that it may import, third parties that it may import when it is loaded,
    places that only its functions may import)}."""
    sections = (PROJECT / "README.md").read_text().split("\n## ")
    (section,) = (x for x in sections if "tests/test_imports.py" in x)
    rows = re.findall(r"^\| `(\S+?)` \|(.*)\|(.*)\|$", section, re.MULTILINE)
    return {
        place: (
            set(re.findall(r"`(\S+?)`", ours)),
            set(re.findall(r"`(\S+?)`", others)),
            set(re.findall(r"`(\S+?)` in functions", ours)),
        )
        for place, ours, others in rows
    }


TABLE = table()


def place_of(module: list[str]) -> str:
    """Return the row of an absolute module name: a file or folder of atss, or another top level."""
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
    """Yield each module that a file imports, absolute, and whether at the import of the file."""
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
            # Names imported from the package itself may be modules.
            found = [[*base, alias.name] for alias in node.names] if base == ["atss"] else [base]
        else:
            continue
        for module in found:
            yield module, node not in inside


def row_of(module: list[str]) -> str:
    """Return the row of an imported module; names that the package exports are of row "atss"."""
    place = place_of(module)
    return place if place in TABLE else "atss"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_are_in_the_table(file):
    own = place_of(module_of(file))
    assert own in TABLE, f"no row for {own}"
    ours, others, later = TABLE[own]
    for module, at_import in imports(file):
        name = ".".join(module)
        if module[0] in ("atss", "atss_runner", *TOOLS):
            assert row_of(module) == own or row_of(module) in ours, f"{own} imports {name}"
            assert not (at_import and row_of(module) in later), f"{own} imports {name} when loaded"
        elif module[0] in sys.stdlib_module_names or not (at_import or own == "atss_runner"):
            continue
        elif name.startswith("matplotlib") and own == "analysis":
            assert file.name in ("charts.py", "plots.py")
        else:
            allowed = any(name == x or name.startswith(f"{x}.") for x in others)
            assert allowed, f"{own} imports {name}"


def test_every_allowed_import_is_used():
    used = {place: (set(), set()) for place in TABLE}
    for file in FILES:
        own = place_of(module_of(file))
        for module, _ in imports(file):
            if module[0] in ("atss", "atss_runner", *TOOLS):
                used[own][0].add(row_of(module))
            used[own][1].add(".".join(module))
    for place, (ours, others, _) in TABLE.items():
        assert ours <= used[place][0], f"{place} need not import {ours - used[place][0]}"
        for other in others:
            assert any(f"{x}.".startswith(f"{other}.") for x in used[place][1]), (place, other)


def test_tools_import_no_tool():
    scripts = {path.stem for path in ROOT.glob("tools/*.py")}
    for path in ROOT.glob("tools/*.py"):
        for module, _ in imports(path):
            assert module[0] not in scripts, path
            assert module[:2] != ["atss", "tools"], path


def test_unstable_modules_are_imported_in_few_files():
    for file in PROJECT.rglob("*.py"):
        if not str(file).endswith(UNSTABLE_IMPORTS):
            for module, _ in imports(file):
                assert not ".".join(module).startswith(UNSTABLE), file


def members(file: Path) -> tuple[set[str], set[str]]:
    """Return the private names that a file defines, and those that it overrides or uses."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
            used.add(node.name)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
    return tuple({x for x in xs if re.match("_[a-z]", x)} for xs in (defined, used))


def test_private_members_are_used_in_few_files():
    folder = Path(detectron2.__file__).parent
    rooms = ("checkpoint", "data", "engine", "evaluation", "modeling", "solver", "utils")
    theirs = {x for room in rooms for f in (folder / room).rglob("*.py") for x in members(f)[0]}
    for file in PROJECT.rglob("*.py"):
        if not str(file).endswith(PRIVATE_USES):
            tree = ast.parse(file.read_text())
            functions = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
            uses = (members(file)[1] & theirs) - functions
            assert not uses, f"{file} uses {uses} of Detectron2: add it to PRIVATE_USES"


def test_only_config_reads_the_config():
    # These files make configs for other projects, or of them.
    writers = ("convert.py", "detectors.py", "mmdet.py", "settings.py")
    for file in (PROJECT / "atss").rglob("*.py"):
        if file.parent.name != "config" and file.name not in writers:
            nodes = ast.walk(ast.parse(file.read_text()))
            values = [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)]
            assert not any(value.endswith("MODEL.ATSS") for value in values), file
