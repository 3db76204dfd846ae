"""Tests mirror the code: tests/labels/test_yolo.py tests atss/labels/yolo.py.

Whole runs, and whatever no single module is responsible for, are in tests/system.
"""

from pathlib import Path

import pytest
from conftest import ROOT

TESTS = ROOT / "tests"
PACKAGE = ROOT / "projects" / "ATSS" / "atss"
# The folder that each folder of tests mirrors, if not the one of its name in the package.
ROOMS = {"runner": ROOT / "projects" / "ATSS" / "atss_runner", "tools": ROOT / "tools"}
# Tests of tests/ itself, of its helpers, of pages and of the Makefile.
REPOSITORY = ("docs", "equality", "imports", "makefile", "mirror", "mutations")
FILES = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]


def mirrored(file: Path) -> Path:
    """Return the module that a file of tests is named after."""
    room = ROOMS.get(file.parent.name, PACKAGE / file.parent)
    return room / f"{file.stem.removeprefix('test_')}.py"


@pytest.mark.parametrize("file", [x for x in FILES if x.parent.name != "system"], ids=str)
def test_file_has_the_name_of_a_module(file):
    if file.parent == Path() and file.stem.removeprefix("test_") in REPOSITORY:
        return
    assert mirrored(file).is_file(), f"no {mirrored(file).relative_to(ROOT)}: tests/system?"


if __name__ == "__main__":
    # The modules without a file of tests.
    tested = {mirrored(file) for file in FILES}
    for folder in (PACKAGE, *ROOMS.values()):
        for path in sorted({*folder.rglob("*.py")} - tested):
            if path.name != "__init__.py":
                print(path.relative_to(ROOT))
