"""Memory that this process may use."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

# Controller in /proc/self/cgroup ("" for version 2) -> folder, and files with limit and usage, and
# the entry of memory.stat with cached pages that the kernel takes back.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def memory_left(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still allocate: of the machine, and of each control
    group (cgroup, version 1 or 2) that contains the process.

    Args:
        root: folder that contains proc and sys.

    Raises:
        UserError: if the system has no /proc/meminfo.
    """
    try:
        machine = _entries(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError) as error:
        raise UserError(
            "SOLVER.IMS_PER_BATCH -1 on a CPU needs /proc/meminfo of Linux: set a number"
        ) from error
    return max(min([machine, *_left_in_groups(root)]), 0)


def resident(root: Path = Path("/")) -> int:
    """Return the bytes that this process has in memory."""
    pages = int((root / "proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & set(CGROUPS):
            mount, limit_file, usage_file, cache = CGROUPS[controller]
            # In a container the path may be that of the host, and the mount its own group.
            group = root / mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(root / mount):
                    break
                try:
                    limit = (folder / limit_file).read_text().strip()
                    usage = int((folder / usage_file).read_text())
                    stat = _entries(folder / "memory.stat")
                except OSError:
                    continue
                if limit != "max":
                    yield int(limit) - usage + stat.get(cache, 0)


def _entries(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}
