"""The Makefile, with stand-ins for commands that take minutes."""

import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_env_in_a_folder_with_a_space_in_its_name(tmp_path):
    folder = tmp_path / "my projects"
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("requirements.txt", "requirements-detectron2.txt", "setup.py", "pyproject.toml"):
        (folder / name).touch()
    shutil.copy(ROOT / "Makefile", folder)
    for name, command in (
        ("python", 'echo "$PWD/.venv/lib"'),
        ("pip", "printf '%s\\n' \"$@\" >> arguments"),
    ):
        (binaries / name).write_text(f"#!/bin/sh\n{command}\n")
        (binaries / name).chmod(0o755)
    subprocess.run(["make", "-C", folder, "env", "PYTHON=true", "DETECTRON2="], check=True)
    arguments = (folder / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--target") + 1] == f"{folder}/.venv/lib"
    assert (folder / ".venv" / "installed").is_file()
