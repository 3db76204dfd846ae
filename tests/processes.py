"""Processes for tests, forked from one that has imported torch, which takes four seconds."""

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
FORKED.set_forkserver_preload(["atss.engine.run", "pytest"])


def reset_signals() -> None:
    """Restore the default handlers of signals, which nohup and background jobs ignore."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(argv: list[str], environment: dict[str, str], folder: str, output: Connection) -> None:
    os.setsid()
    reset_signals()
    # The start method of DataLoader in a script on Linux.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # Line by line, so that both are in order.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    warnings.simplefilter("ignore")
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Script:
    """A Python script in a process and session of its own.

    Attributes:
        lines: its stdout and stderr, as a text file.
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
        """None while it runs; the negative number of a signal that ended it."""
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, int]:
        """Return the rest of ``lines`` and the exit code; kill it after ``timeout`` seconds."""
        timer = Timer(timeout, self.kill)
        timer.start()
        with self.lines:
            text = self.lines.read()
        self.process.join()
        timer.cancel()
        return text, self.process.exitcode

    def kill(self) -> None:
        """Kill the processes of its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
