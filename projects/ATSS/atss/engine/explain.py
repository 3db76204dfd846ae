"""Messages for errors that users can fix: one line on stderr, without a traceback."""

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import TrainerBase

from ..data.loader import LOADER_DIED
from ..errors import UserError
from .estimate import LESS_MEMORY

# Messages of torch and Python if /dev/shm is full.
SHARED_MEMORY = re.compile(r"</torch_\d.*No space left|(insufficient|out of) shared memory")
SHARED_MEMORY_FULL = (
    "shared memory (/dev/shm), through which images pass from the processes that load them, is "
    "full: enlarge it (for a container, --shm-size), or lower DATALOADER.NUM_WORKERS"
)
DEAD_LOADER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
# Messages of gloo and NCCL if another process is gone, or is late.
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError")
PEER_LATE = re.compile(r"Timed out waiting \d+ms")
GONE = (
    "another process of the group has ended, perhaps killed: its output, or its machine's log, has "
    "the reason"
)
LATE = (
    "another process of the group has not entered a collective within SOLVER.COLLECTIVE_TIMEOUT "
    "minutes"
)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def explain(error: BaseException, output_dir: str) -> str | None:
    """Return the message for an error that the user can fix; None if its traceback is needed."""
    link: BaseException | None = error
    while link is not None:  # torch.save raises its own error after the disk's
        if SHARED_MEMORY.search(str(link)):
            return SHARED_MEMORY_FULL
        if isinstance(link, OSError) and link.errno in CANNOT_WRITE:
            outside = link.filename and not _is_within(str(link.filename), output_dir)
            place = link.filename if outside else f"OUTPUT_DIR {output_dir}"
            reads = link.errno == errno.EIO and outside
            return f"cannot {'read' if reads else 'write into'} {place}: {link.strerror}"
        if DEAD_LOADER.search(str(link)):  # torch raises it wherever the training is
            return LOADER_DIED
        link = link.__cause__ or link.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is not enough: {LESS_MEMORY}"
    if isinstance(error, RuntimeError):
        if "DefaultCPUAllocator: can't allocate" in str(error):
            return f"the machine's memory is not enough: {LESS_MEMORY}"
        if PEER_GONE.search(str(error)):
            return GONE
        if PEER_LATE.search(str(error)):
            return LATE
    if not isinstance(error, UserError | OSError | FloatingPointError):
        return None
    # The message of an error in a data loader's process is a traceback, which ends in the error.
    last = (str(error).strip().splitlines() or [repr(error)])[-1]
    kind = type(error)
    return last.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__qualname__}: ")


def _is_within(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


@contextmanager
def exit_with_message(output_dir: str) -> Iterator[None]:
    """Exit with ``error: ...`` and code 1 after an explained error, whose traceback goes to
    log.txt."""
    try:
        yield
    except Exception as error:
        message = explain(error, output_dir)
        if message is None:
            raise
        codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        logged = TrainerBase.train.__code__ in codes  # by Detectron2, except in the last hooks
        logged = logged and TrainerBase.after_train.__code__ not in codes
        log = logging.getLogger("atss")
        if log.hasHandlers() and not logged:
            log.error("Exception:", exc_info=error)
        sys.exit(f"error: {message}")
