"""Processes that a launcher starts."""

import signal
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from processes import FORKED

from atss.engine.launch import _SignalRelay, refuse_shared_gpus


def report_signals(output):
    """Send the number of each signal that this process receives."""
    numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    output.send("begun")
    while True:
        output.send(signal.sigwait(numbers))


def test_launcher_relays_signals(monkeypatch):
    """A terminal sends SIGINT to all processes; a second one kills them."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    reader, writer = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=report_signals, args=(writer,))
    process.start()
    assert reader.recv() == "begun"
    monkeypatch.setattr("multiprocessing.active_children", lambda: [process])
    for number, received in ((signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGTERM)):
        launcher = _SignalRelay()
        launcher._relay(number, None)
        assert reader.recv() == received
        assert launcher.number == number
    launcher._relay(signal.SIGINT, None)
    assert reader.recv() == signal.SIGTERM
    launcher.interrupted -= 2
    launcher._relay(signal.SIGINT, None)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr("multiprocessing.active_children", list)
    with pytest.raises(SystemExit, match="75"):
        launcher._relay(signal.SIGTERM, None)


def test_processes_that_share_a_gpu_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    others = [("node1", "b"), ("node2", "a")]
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, *others])
    refuse_shared_gpus()
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, *others, mine])
    with pytest.raises(SystemExit, match="error: processes 0 and 3 use the same GPU of node1"):
        refuse_shared_gpus()
