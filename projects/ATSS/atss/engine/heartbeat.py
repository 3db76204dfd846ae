"""Signs of life that the processes of a group exchange through its key-value store.

A process in a collective runs no Python: it can neither handle a signal nor notice that another is
gone. Two threads can: one talks to the store, which may block, the other receives signals and
measures silence.
"""

import itertools
import json
import math
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from .signals import STOPPING, end, write_line

# The processes of a group join equally many times.
_numbers = itertools.count()


class Heartbeat:
    """Watch over the processes of a group. A single process has no threads.

    Attributes:
        left: whether this process leaves, after a signal or with another.
        heard: time of the last sign of life, by peer that has joined.
    """

    # Seconds between signs of life.
    BEAT = 1.0
    # Seconds of silence after which a process counts as lost; the longer limit is for one that
    # computes in C, whose threads may have to wait.
    SILENCE = 90.0
    BUSY_SILENCE = 1800.0
    # Seconds for which a process that ends waits until the others have the reason.
    FAREWELL = 10.0
    # Attempts to connect to the store, and seconds for each.
    ATTEMPTS, CONNECT = 20, 3.0

    def __init__(self) -> None:
        self.left = False
        self.size = 1
        self.meetings = 0
        self.pipe = (-1, -1)

    def receive(self, number: int) -> None:
        raise NotImplementedError

    def wait_for_all(self) -> None:
        """Wait until all processes call this, without a collective's time limit."""
        if self.size == 1:
            return
        self.meetings += 1
        key, pause = f"meeting{self.meetings}", 0.01
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Raise the limit of silence for C code that blocks the threads."""
        if self.size > 1:
            self.store.add(f"busy{self.rank}", 1)
            time.sleep(2 * self.BEAT)  # until the others have read it
        yield
        if self.size > 1:
            self.store.add(f"busy{self.rank}", -1)

    def leave(self, code: int, reason: str = "") -> NoReturn:
        """End all processes of the group. The first process prints ``reason`` if another one
        leaves."""
        if not self.leaving.acquire(blocking=False):
            threading.Event().wait()  # for another thread, which ends the process
        message = json.dumps([code, reason])
        announcement = threading.Thread(target=self._announce, args=(message,), daemon=True)
        announcement.start()
        announcement.join(self.FAREWELL)  # the store may not answer
        end(code)

    def wait_for_reason(self) -> None:
        """Wait until another process announces why it leaves, which ends this one."""
        time.sleep(3 * self.BEAT)

    def close(self) -> None:
        """Stop the signs of life: the group ends in order."""
        if self.size > 1:
            self.closed.set()
            self.talking.join(self.BEAT)

    def _join_group(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.prefix = f"watch{next(_numbers)}"
        # One connection for each thread, because a connection answers one question at a time, and
        # one for the end, when a new connection might fail.
        self.store, self.store_of_talk, self.store_of_end = (self._client() for _ in range(3))
        self.store.set(f"host{self.rank}", socket.gethostname())
        self.peers = range(1, self.size) if self.rank == 0 else range(1)
        self.answered = time.monotonic()
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

    def _leave_group(self) -> None:
        self.close()
        self.listening.join()
        for end_of_pipe in self.pipe:
            os.close(end_of_pipe)

    def _client(self) -> distributed.Store:
        connected: queue.SimpleQueue[distributed.Store] = queue.SimpleQueue()

        def connect() -> None:
            with suppress(distributed.DistError):
                connected.put(_get_default_store().clone())

        # torch's server sometimes leaves a client's first question without an answer (seen with
        # 2.14), and nothing can interrupt the client.
        for _ in range(self.ATTEMPTS):
            threading.Thread(target=connect, daemon=True).start()
            with suppress(queue.Empty):
                return distributed.PrefixStore(self.prefix, connected.get(timeout=self.CONNECT))
        raise distributed.DistStoreError("the store of the processes does not answer")

    def _announce(self, message: str) -> None:
        store = self.store_of_end
        store.compare_set("left", "", message)
        present = self.size - len(self.lost)

        def wait_for(key: str, count: int) -> None:
            while store.add(key, 0) < count:
                time.sleep(self.BEAT / 10)

        # All have read the message before one goes, after which launchers and NCCL end the others;
        # the first process goes last, because it may host the store.
        store.add("read", 1)
        wait_for("read", present)
        if self.rank == 0:
            wait_for("gone", present - 1)
        else:
            store.add("gone", 1)

    def _talk(self) -> None:
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
                    if store.check([key]) and (latest := store.get(key)) != beats[peer]:
                        beats[peer], self.heard[peer] = latest, time.monotonic()
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
            write_line(reason)
        self.left = True
        self.leave(code)

    def _listen(self) -> None:
        before = time.monotonic()
        while not self.closed.is_set():
            ready, _, _ = select.select([self.pipe[0]], [], [], self.BEAT)
            for number in os.read(self.pipe[0], 64) if ready else b"":
                if number in STOPPING:
                    self.receive(number)
            now = time.monotonic()
            if now - before > self.SILENCE / 2:  # this process was stopped: others may be alive
                self.heard = dict.fromkeys(self.heard, now)
                self.answered = max(self.answered, now)
            before = now
            if self.left or self.closed.is_set():  # the others end as well, in any order
                continue
            # The store has to wait as well if the first process, which hosts it, is busy.
            if now - self.answered > max(self.limits.values()):
                write_line("error: the first process of the group, or its machine, does not answer")
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
        write_line(reason)
        self.leave(1, reason if self.rank else "")
