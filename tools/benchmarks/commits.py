"""Other commits beside the working tree, for what compares two."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """The folder of a commit's files, for a while; of the working tree if it is None.

    Raises:
        ValueError: git cannot check it out.
    """
    if commit is None:
        yield ROOT
        return
    worktree = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "commit"
        added = subprocess.run([*worktree, "add", "-q", "--detach", str(folder), commit])
        if added.returncode:
            raise ValueError(f"git cannot check out {commit!r}")
        try:
            yield folder
        finally:
            subprocess.run([*worktree, "remove", "--force", str(folder)], check=True)


def environment(folder: Path, threads: int | None = None) -> dict[str, str]:
    """Of a process that imports the package of a folder."""
    path = {"PYTHONPATH": str(folder / "projects/ATSS")}
    return os.environ | path | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
