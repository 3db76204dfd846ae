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
    left = [limit - usage for limit, usage in _groups(root) if limit is not None]
    return max(min([machine, *left]), 0)


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of the machine, or the least limit of the control groups."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _groups(root) if limit is not None)])


def resident(root: Path = Path("/")) -> int:
    """Return the bytes that this process has in memory."""
    pages = int((root / "proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[tuple[int | None, int]]:
    """Yield limit, or None, and usage in bytes of each control group of this process."""
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
                yield None if limit == "max" else int(limit), usage - stat.get(cache, 0)


def _entries(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}
