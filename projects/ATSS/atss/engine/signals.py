"""Stop signals, exit codes, and the end of a process."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

# "Temporary failure, try again" (EX_TEMPFAIL in sysexits.h). Not 143, which is also the shell's
# code for a process that SIGTERM killed before it could save.
EXIT_PREEMPTED = 75
# The shell's code for a command that ctrl-C ended: 128 + SIGINT.
EXIT_INTERRUPTED = 130

# SIGTERM, ctrl-C, SLURM's and submitit's examples, and a closed terminal, if the system has them.
STOPPING = {
    number
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
}


def first_of(numbers: Iterable[int]) -> int:
    """Return the deciding signal of several: SIGINT first, because a person sent it; else 0."""
    received = {*numbers} - {0}
    return signal.SIGINT if signal.SIGINT in received else max(received, default=0)


def exit_code(number: int) -> int:
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def end(code: int) -> NoReturn:
    """End this process without Python's finalization, in which threads of gloo can abort it
    (pytorch 190489)."""

    def flush() -> None:
        with suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()

    # The main thread may hold a lock of these files, and wait for a full pipe.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(2)
    os._exit(code)


def write_line(line: str) -> None:
    """Print to stderr, also from a signal handler that interrupts another print."""
    if line:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
