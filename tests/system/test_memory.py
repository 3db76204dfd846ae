import resource
import sys

import pytest
import torch
from processes import FORKED

from atss.engine.launch import keep_freed_memory


def faults(keep, connection):
    """Send the number of page faults of a large tensor after another one was freed."""
    if keep:
        keep_freed_memory()

    def once():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Some calls get another block.
    connection.send(min(once() for _ in range(6)))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_causes_no_page_faults():
    def measured(keep):
        here, there = FORKED.Pipe()
        process = FORKED.Process(target=faults, args=(keep, there))
        process.start()
        process.join()
        return here.recv()

    assert measured(keep=True) < 100 < measured(keep=False)
