import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from atss.engine.launch import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Not every call finds its block where the last one left it.
print(min(faults() for _ in range(6)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_faulted_in_again():
    def faults(how):
        command = [sys.executable, "-W", "ignore", "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("leave")
