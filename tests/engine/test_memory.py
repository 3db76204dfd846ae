"""Memory of control groups, in made-up folders proc and sys."""

from mmap import mmap

import pytest

from atss.engine.memory import memory_left, resident, total_memory

GIB = 1 << 30
MACHINE = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {20 * GIB // 1024} kB\nHugePages: 0\n"}


def group(folder, version, limit, usage, cache=0):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    limit_file, usage_file, entry = names[version]
    return {
        f"{folder}/{limit_file}": f"{limit}\n",
        f"{folder}/{usage_file}": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 5\n{entry} {cache}\n",
    }


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
CASES = {
    "no group": ({}, 20),
    "version 2": (
        {"proc/self/cgroup": "0::/user/job\n"} | group(f"{V2}/user/job", 2, 8 * GIB, 3 * GIB, GIB),
        6,
    ),
    "limit of a parent": (
        {"proc/self/cgroup": "0::/user/job\n"}
        | group(f"{V2}/user/job", 2, "max", GIB)
        | group(f"{V2}/user", 2, 4 * GIB, 2 * GIB),
        2,
    ),
    "version 1": (
        {"proc/self/cgroup": "9:name=systemd:/\n5:cpu,memory:/job\n0::/\n"}
        | group(f"{V1}/job", 1, 5 * GIB, 3 * GIB, GIB),
        3,
    ),
    "version 1 without limit": (
        {"proc/self/cgroup": "4:memory:/job\n"} | group(f"{V1}/job", 1, 2**63 - 4096, GIB),
        20,
    ),
    "path of the host in a container": (
        {"proc/self/cgroup": "4:memory:/docker/abc\n"} | group(V1, 1, 2 * GIB, GIB),
        1,
    ),
    "used up": ({"proc/self/cgroup": "0::/\n"} | group(V2, 2, GIB, 2 * GIB), 0),
}


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize("name", CASES)
def test_memory_left_is_the_least_of_machine_and_groups(tmp_path, name):
    files, left = CASES[name]
    write(tmp_path, MACHINE | files)
    assert memory_left(tmp_path) == left * GIB


def test_total_memory_is_the_least_limit(tmp_path):
    whole = total_memory(tmp_path)
    write(tmp_path, CASES["limit of a parent"][0])
    assert total_memory(tmp_path) == 4 * GIB < whole
    write(tmp_path, {f"{V2}/user/memory.max": "max"})
    assert total_memory(tmp_path) == whole


def test_other_systems_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs /proc/meminfo of Linux"):
        memory_left(tmp_path)


def test_memory_of_this_process():
    assert memory_left() > 0
    before = resident()
    with mmap(-1, 50_000_000) as block:  # the allocator may have as many bytes that are free
        block.write(bytes(50_000_000))
        assert resident() - before > 40_000_000
