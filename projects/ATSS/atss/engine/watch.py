"""Signals that stop a run, and whether the other processes of its group are alive.

A process that waits in a collective runs no Python, so it can neither handle a signal nor notice
that another process is gone. In a group two threads do that: one receives signals, the other
exchanges signs of life through the group's key-value store.
"""

import itertools
import json
import logging
import math
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

# "Temporary failure, try again" (EX_TEMPFAIL in sysexits.h). Not 143, which also is the shell's
# code for a process that SIGTERM killed before it could save.
EXIT_PREEMPTED = 75
# The shell's code for a command that ctrl-C ended: 128 + SIGINT.
EXIT_INTERRUPTED = 130

# SIGTERM, ctrl-C, SLURM's and submitit's examples, and a terminal that is closed; where they exist.
STOPPING = {
    number
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
}


def first_of(numbers: Iterable[int]) -> int:
    """Return the signal that decides if several processes received several: SIGINT before others,
    because a person sent it; 0 for none."""
    received = {*numbers} - {0}
    return signal.SIGINT if signal.SIGINT in received else max(received, default=0)


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


class Watch:
    """Context manager; entered again within itself, it does nothing.

    A signal of STOPPING ends the process at once, and with it its group, but for an iteration whose
    result is not saved: then ``asked`` is set, and the training saves and leaves. A second ctrl-C
    ends the process in any case.

    Attributes:
        asked: the signal that asked this process to stop first; 0 for none.
        unsaved: whether a signal has to wait for the next checkpoint.
        left: whether the process leaves, after a signal.
        farewell: returns what a process prints that a signal stops at once.
    """

    # Seconds: between signs of life; without one, after which a process counts as lost, or one that
    # computes in C, whose threads may have to wait; after which a ctrl-C is a second one; for which
    # a process that ends waits until the others know why.
    BEAT = 1.0
    SILENCE = 90.0
    BUSY_SILENCE = 1800.0
    REPEATED = 1.0
    FAREWELL = 10.0
    # To connect to the store: attempts, of so many seconds.
    ATTEMPTS, CONNECT = 20, 3.0

    def __init__(self) -> None:
        self.asked = 0
        self.interrupted = 0.0
        self.unsaved = False
        self.left = False
        self.farewell: Callable[[], str] = lambda: "stopped"
        self.depth = 0
        self.size = 1
        self.meetings = 0
        self.pipe = (-1, -1)
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
                self.close()
                self.listening.join()
                for end_of_pipe in self.pipe:
                    os.close(end_of_pipe)

    def mark_saved(self) -> None:
        """Note that the last iteration has its checkpoint: a signal that has come since the
        processes asked each other, or comes from now on, ends them at once."""
        self.unsaved = False
        if self.asked and not self.left:
            self._leave_at_once()

    def wait_for_all(self) -> None:
        """Wait until all processes of the group have called this, however long that takes: a
        collective would fail after SOLVER.COLLECTIVE_TIMEOUT."""
        if self.size == 1:
            return
        self.meetings += 1
        key, pause = f"meeting{self.meetings}", 0.01
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def leave(self, code: int, reason: str = "") -> NoReturn:
        """End all processes of the group, wherever they are, with one exit code.

        Args:
            reason: a sentence, which the first process prints if another one leaves.
        """
        if not self.leaving.acquire(blocking=False):
            threading.Event().wait()  # for another thread, which ends the process
        message = json.dumps([code, reason])
        announcement = threading.Thread(target=self._announce, args=(message,), daemon=True)
        announcement.start()
        announcement.join(self.FAREWELL)  # the store may not answer
        end(code)

    def wait_for_reason(self) -> None:
        """Wait for what another process announces, which ends this one; a few signs of life
        long."""
        time.sleep(3 * self.BEAT)

    def close(self) -> None:
        """ScalarAllGather no more signs of life: the group ends in order."""
        if self.size > 1:
            self.closed.set()
            self.talking.join(self.BEAT)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While this process may compute in C for long, which can keep its threads waiting, so that
        it gives no sign of life."""
        if self.size > 1:
            self.store.add(f"busy{self.rank}", 1)
            time.sleep(2 * self.BEAT)  # until the others know
        yield
        if self.size > 1:
            self.store.add(f"busy{self.rank}", -1)

    def _join_group(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.prefix = f"watch{next(_numbers)}"
        # A connection for each thread, because each answers one question at a time, and for the
        # end, at which a new one might not come about.
        self.store, self.store_of_talk, self.store_of_end = (self._client() for _ in range(3))
        self.store.set(f"host{self.rank}", socket.gethostname())
        self.peers = range(1, self.size) if self.rank == 0 else range(1)
        self.answered = time.monotonic()
        # By peer that has entered: when its last sign of life came, and the limit of its silence.
        self.heard: dict[int, float] = {}
        self.limits = dict.fromkeys(self.peers, self.SILENCE)
        self.hosts: dict[int, str] = {}
        self.lost: set[int] = set()
        self.closed, self.leaving = threading.Event(), threading.Lock()
        self.pipe = os.pipe()
        for end_of_pipe in self.pipe:
            os.set_blocking(end_of_pipe, False)
        self.talking = threading.Thread(target=self._talk, daemon=True)
        self.talking.start()
        self.listening = threading.Thread(target=self._listen, daemon=True)
        self.listening.start()

    def _client(self) -> distributed.Store:
        """Return another connection to the group's store."""
        connected: queue.SimpleQueue[distributed.Store] = queue.SimpleQueue()

        def connect() -> None:
            with suppress(distributed.DistError):
                connected.put(_get_default_store().clone())

        # torch's server now and then leaves a client's first question without an answer (seen with
        # 2.14), and nothing can interrupt the client.
        for _ in range(self.ATTEMPTS):
            threading.Thread(target=connect, daemon=True).start()
            with suppress(queue.Empty):
                return distributed.PrefixStore(self.prefix, connected.get(timeout=self.CONNECT))
        raise distributed.DistStoreError("the store of the processes does not answer")

    def _handle(self, number: int, _: object) -> None:
        if self.size == 1:
            self._receive(number)  # in a group the thread does, which does not wait for Python

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        self.asked = self.asked or number
        if number == signal.SIGINT:
            # Launchers pass on what the terminal has sent to all processes already.
            if self.interrupted and now - self.interrupted > self.REPEATED:
                if self.unsaved and not self.left:
                    _write("stopped: what was trained since the last checkpoint is lost")
                end(EXIT_INTERRUPTED)
            if not self.interrupted and self.unsaved and self._is_first():
                _write("Stopping after this iteration; a second ctrl-C ends at once.")
            self.interrupted = self.interrupted or now
        # Alone, again at each signal: code that was interrupted may have caught the exception.
        if not self.unsaved and not (self.left and self.size > 1):
            self._leave_at_once()

    def _leave_at_once(self) -> None:
        self.left = True
        if self.size > 1:
            reason = f"{signal.Signals(self.asked).name}: {self.farewell()}"
            if self.rank == 0:
                _write(reason)
            self.leave(exit_code(self.asked), reason)
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_PREEMPTED)

    def _is_first(self) -> bool:
        return self.size == 1 or self.rank == 0

    def _announce(self, message: str) -> None:
        store = self.store_of_end
        store.compare_set("left", "", message)
        present = self.size - len(self.lost)

        def wait_for(key: str, count: int) -> None:
            while store.add(key, 0) < count:
                time.sleep(self.BEAT / 10)

        # All have read it before one goes, after which launchers, and NCCL, end the others; and the
        # first goes last, because it may host the store.
        store.add("read", 1)
        wait_for("read", present)
        if self.rank == 0:
            wait_for("gone", present - 1)
        else:
            store.add("gone", 1)

    def _talk(self) -> None:
        """ScalarAllGather signs of life. The first process looks at all others, the others at the
        first."""
        try:
            store, beats, beat = self.store_of_talk, dict.fromkeys(self.peers, b""), 0
            while not self.closed.is_set():
                beat += 1
                store.set(f"beat{self.rank}", str(beat))
                for peer in self.peers:
                    if peer not in self.hosts and store.check([f"host{peer}"]):
                        self.hosts[peer] = store.get(f"host{peer}").decode()
                        self.heard[peer] = time.monotonic()
                    key = f"beat{peer}"
                    if store.check([key]) and (seen := store.get(key)) != beats[peer]:
                        beats[peer], self.heard[peer] = seen, time.monotonic()
                    busy = store.add(f"busy{peer}", 0)
                    self.limits[peer] = self.BUSY_SILENCE if busy else self.SILENCE
                self.answered = time.monotonic()
                if store.check(["left"]):
                    self._follow(*json.loads(store.get("left")))
                self.closed.wait(self.BEAT)
        except distributed.DistError:
            self.answered = -math.inf

    def _follow(self, code: int, reason: str) -> None:
        if self.rank == 0 and not self.leaving.locked():
            _write(reason)
        self.left = True
        self.leave(code)

    def _listen(self) -> None:
        before = time.monotonic()
        while not self.closed.is_set():
            ready, _, _ = select.select([self.pipe[0]], [], [], self.BEAT)
            for number in os.read(self.pipe[0], 64) if ready else b"":
                if number in STOPPING:
                    self._receive(number)
            now = time.monotonic()
            if now - before > self.SILENCE / 2:  # this process was stopped: others may live
                self.heard = dict.fromkeys(self.heard, now)
                self.answered = max(self.answered, now)
            before = now
            if self.left or self.closed.is_set():  # the others end as well, in any order
                continue
            # The store has to wait as well if the first process, which hosts it, is busy.
            if now - self.answered > max(self.limits.values()):
                _write("error: the first process of the group, or its machine, does not answer")
                end(1)
            for peer, when in list(self.heard.items()):
                if now - when > self.limits[peer]:
                    self._lose(peer)

    def _lose(self, peer: int) -> NoReturn:
        self.lost.add(peer)
        reason = (
            f"error: process {peer} of {self.size} (on {self.hosts[peer]}) has "
            f"given no sign of life for {self.limits[peer]:.0f} s: it was killed or stopped, or "
            "its machine hangs"
        )
        _write(reason)
        self.leave(1, reason if self.rank else "")


_entered: list[Watch] = []
# The processes of a group enter equally many watches.
_numbers = itertools.count()


def current() -> Watch:
    """Return the watch that has been entered, or a new one."""
    return _entered[-1] if _entered else Watch()


def wait_for_all() -> None:
    """:meth:`Watch.wait_for_all` of the watch that has been entered, if there is one."""
    current().wait_for_all()


def end(code: int) -> NoReturn:
    """End this process without Python's own end, in which threads of gloo that drop a tensor can
    abort the process (pytorch 190489)."""

    def flush() -> None:
        with suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()

    # The main thread may hold a lock of theirs, and wait for a full pipe.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(2)
    os._exit(code)


def _write(line: str) -> None:
    """Print to stderr, from a signal handler too, which may interrupt another print."""
    if line:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _ignore_signals_in_loaders() -> None:
    """In a process that loads data: SIGTERM from the training process ends it; from elsewhere it
    does nothing, as the other signals, because schedulers and terminals signal whole process groups
    and training goes on to the end of the iteration."""
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
