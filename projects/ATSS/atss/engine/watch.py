"""Signals that stop a run: at once, or after the checkpoint of the iteration under way."""

import os
import signal
import threading
import time
from collections.abc import Callable

from torch import distributed

from ..deprecated import renamed_names
from .heartbeat import Heartbeat
from .signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, STOPPING, end, exit_code, write_line

__getattr__ = renamed_names(__name__)


class Watch(Heartbeat):
    """Context manager for signals, and in a group for signs of life. Reentry does nothing.

    A signal of STOPPING ends the process and its group at once; during an iteration that is not
    saved it only sets ``stop_signal``, and the training saves and leaves.

    Attributes:
        stop_signal: the first signal received, or 0.
        unsaved: whether a signal has to wait for the next checkpoint.
        farewell: returns the line to print if a signal stops the process at once.
    """

    REPEATED = 1.0  # seconds after which a ctrl-C is a second one

    def __init__(self) -> None:
        super().__init__()
        self.stop_signal = 0
        self.interrupted = 0.0
        self.unsaved = False
        self.farewell: Callable[[], str] = lambda: "stopped"
        self.depth = 0
        self.wakeup: int | None = None

    def __enter__(self) -> "Watch":
        self.depth += 1
        if self.depth == 1:
            _entered.append(self)
            if distributed.is_initialized() and distributed.get_world_size() > 1:
                self._join_group()
            self.previous = {}
            # Python handles signals in the main thread alone.
            if threading.current_thread() is threading.main_thread():
                if self.size > 1:
                    self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
                for number in STOPPING:
                    # Ignored under nohup; None if another program's library handles it.
                    if signal.getsignal(number) not in (signal.SIG_IGN, None):
                        self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            _entered.remove(self)
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            if self.size > 1:
                if self.wakeup is not None:
                    signal.set_wakeup_fd(self.wakeup)
                self._leave_group()

    def mark_saved(self) -> None:
        """Note a checkpoint of the last iteration: earlier and later signals end the processes."""
        self.unsaved = False
        if self.stop_signal and not self.left:
            self._leave_at_once()

    def _handle(self, number: int, _: object) -> None:
        if self.size == 1:
            self.receive(number)  # in a group the thread does, which does not wait for Python

    def receive(self, number: int) -> None:
        now = time.monotonic()
        self.stop_signal = self.stop_signal or number
        if number == signal.SIGINT:
            # Launchers pass on a signal that the terminal has sent to all processes already.
            if self.interrupted and now - self.interrupted > self.REPEATED:
                if self.unsaved and not self.left:
                    write_line("stopped: training since the last checkpoint is lost")
                end(EXIT_INTERRUPTED)
            if not self.interrupted and self.unsaved and (self.size == 1 or self.rank == 0):
                write_line(
                    "Stopping after this iteration; a second ctrl-C ends at once, without a "
                    "checkpoint."
                )
            self.interrupted = self.interrupted or now
        # Alone, again at each signal: code that was interrupted may have caught the exception.
        if not self.unsaved and not (self.left and self.size > 1):
            self._leave_at_once()

    def _leave_at_once(self) -> None:
        self.left = True
        if self.size > 1:
            reason = f"{signal.Signals(self.stop_signal).name}: {self.farewell()}"
            if self.rank == 0:
                write_line(reason)
            self.leave(exit_code(self.stop_signal), reason)
        if self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_PREEMPTED)


_entered: list[Watch] = []


def current() -> Watch:
    """Return the watch that has been entered, or a new one."""
    return _entered[-1] if _entered else Watch()


def wait_for_all() -> None:
    """See :meth:`Heartbeat.wait_for_all`."""
    current().wait_for_all()


def _ignore_signals_in_loaders() -> None:
    """Ignore signals to whole process groups, because training continues until the iteration ends.
    Only SIGTERM from the training process ends a loader process."""
    if not _entered:
        return
    signal.set_wakeup_fd(-1)
    for number in STOPPING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_ignore_signals_in_loaders)
