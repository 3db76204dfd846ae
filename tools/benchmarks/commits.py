"""Check out other commits beside the working tree, to compare two."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """Yield a temporary folder with the files of a commit; None: the working tree.

    Raises:
        ValueError: if git cannot check it out.
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
    """Return the environment of a process that imports the package of a folder."""
    path = {"PYTHONPATH": str(folder / "projects/ATSS")}
    return os.environ | path | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
