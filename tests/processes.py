"""Processes of tests, without an import of torch in each, which takes four seconds: they are forked
from a process that has imported everything and done nothing."""

import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer

FORKED = multiprocessing.get_context("forkserver")
# By name: before another process has forked from it.
FORKED.set_forkserver_preload(["atss.engine.run", "pytest"])


def reset_signals() -> None:
    """Undo what this process inherits from one that runs in the background, or under nohup."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(argv: list[str], environment: dict[str, str], folder: str, output: Connection) -> None:
    os.setsid()
    reset_signals()
    # Which loaders of data use: that of a script that a person starts, on Linux.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # A line at a time, so that both are in order.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    warnings.simplefilter("ignore")
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Script:
    """A script of Python that runs in a session of its own.

    Attributes:
        lines: what it writes to stdout and stderr, as a text file.
    """

    def __init__(self, argv: Sequence[object], folder: Path | str = ".", **environment: object):
        reader, writer = FORKED.Pipe(duplex=False)
        variables = os.environ | {name: str(value) for name, value in environment.items()}
        arguments = ([str(x) for x in argv], dict(variables), str(folder), writer)
        self.process = FORKED.Process(target=_run, args=arguments)
        self.process.start()
        writer.close()
        self.pid = self.process.pid
        self.lines = open(os.dup(reader.fileno()))  # noqa: SIM115
        reader.close()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, int]:
        """What is left of ``lines``, and the exit code; after so many seconds it is killed."""
        timer = Timer(timeout, self.kill)
        timer.start()
        with self.lines:
            text = self.lines.read()
        self.process.join()
        timer.cancel()
        return text, self.process.exitcode

    def kill(self) -> None:
        """With its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
