"""Processes of a group: one signal, one failure or one lost process ends all of them."""

import os
import re
import signal
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from processes import FORKED, reset_signals

from atss.engine import launch, watch
from atss.engine.agreement import facts_of_data, refuse_differences, share_weights
from atss.engine.hooks import Preemption


def member(rank, folder, port, pipes, collective, silence, act):
    """Run one of two processes, which prints into the file of its rank.

    Args:
        collective: time limit of collectives, in seconds.
        silence: seconds of silence after which the other process counts as lost.
    """
    reset_signals()
    for number in (1, 2):
        os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    watch.Watch.BEAT, watch.Watch.REPEATED = 0.1, 0.3
    watch.Watch.SILENCE, watch.Watch.FAREWELL = silence, 10.0
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0, multi_tenant=True)
    limit = timedelta(seconds=collective)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=limit
    )
    cfg = SimpleNamespace(OUTPUT_DIR=str(folder))
    args = SimpleNamespace(eval_only=False)
    launch._run_in_group(lambda *_: act(rank, pipes), args, cfg)


@pytest.fixture
def run_two(tmp_path, free_port):
    """run_two(act, then): two processes call act(rank, pipes), then this one calls then(processes,
    pipes). Return their exit codes and outputs."""
    started = []

    def run(act, then=lambda *_: None, collective=60, silence=60):
        pipes, begun = FORKED.Pipe(), FORKED.Barrier(3)
        for rank in range(2):
            arguments = (rank, tmp_path, free_port, pipes, collective, silence, Begun(act, begun))
            started.append(FORKED.Process(target=member, args=arguments))
            started[-1].start()
        begun.wait(30)
        then(started, pipes)
        codes = []
        for process in started:
            process.join(20)
            codes.append(process.exitcode)
        return codes, [(tmp_path / str(rank)).read_text() for rank in range(2)]

    yield run
    for process in started:
        process.kill()


class Begun:
    """Function that is called after all three processes have started."""

    def __init__(self, act, barrier):
        self.act, self.barrier = act, barrier

    def __call__(self, rank, pipes):
        self.barrier.wait()
        self.act(rank, pipes)


def wait_in_collective(rank, pipes):
    """Wait for a process that never comes, in the first process."""
    if rank == 0:
        comm.all_gather(0)
    else:
        signal.sigwait([signal.SIGRTMIN])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"])
def test_signal_to_one_process_ends_both(run_two, rank, name, tmp_path):
    number = getattr(signal, name)
    codes, printed = run_two(wait_in_collective, lambda x, _: os.kill(x[rank].pid, number))
    assert codes == [130 if name == "SIGINT" else 75] * 2, printed
    assert printed == [f"{name}: stopped: {tmp_path} contains no checkpoint yet\n", ""]


def train(rank, pipes):
    watch.current().unsaved = True
    signal.sigwait([signal.SIGRTMIN])


def test_second_ctrl_c_ends_at_once(run_two):
    def interrupt_twice(processes, _):
        for process in reversed(processes):  # the first process last: its end ends the other
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGINT)  # a launcher relays the first one
            process.join(0.5)
            assert process.exitcode is None
            os.kill(process.pid, signal.SIGINT)
            process.join(20)

    codes, printed = run_two(train, interrupt_twice)
    assert codes == [130, 130]
    assert printed[0] == (
        "Stopping after this iteration; a second ctrl-C ends at once, without a checkpoint.\n"
        "stopped: training since the last checkpoint is lost\n"
    )


def fail(rank, pipes):
    if rank == 1:
        raise FloatingPointError("a loss is nan")
    comm.all_gather(0)


def meet_a_bug(rank, pipes):
    if rank == 1:
        raise KeyError("a bug")
    comm.all_gather(0)


@pytest.mark.parametrize(
    ("act", "reason"), [(fail, "a loss is nan"), (meet_a_bug, "KeyError: 'a bug'")]
)
def test_first_process_prints_the_failure_of_another(run_two, act, reason):
    codes, printed = run_two(act)
    assert codes == [1, 1]
    assert re.search(rf"^error: process 1 \(on .+\): {reason}$", printed[0])
    assert printed[1].splitlines()[-1] == f"error: {reason}"
    assert ("Traceback (most recent call last)" in printed[1]) == (act is meet_a_bug)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_process_is_named(run_two, rank):
    def stop(processes, _):
        os.kill(processes[rank].pid, signal.SIGSTOP)
        processes[1 - rank].join()
        processes[rank].kill()

    codes, printed = run_two(train, stop, silence=2)
    assert codes[1 - rank] == 1
    named = {
        0: "error: the first process of the group, or its machine, does not answer",
        1: "error: process 1 of 2 .* has given no sign of life for 2 s: it was killed or stopped",
    }
    assert re.search(named[rank], printed[1 - rank])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("act", [train, wait_in_collective])
def test_killed_process_ends_the_other(run_two, rank, act):
    codes, printed = run_two(act, lambda x, _: x[rank].kill(), silence=2)
    assert sorted(codes) == [-9, 1]
    assert re.search("error: .*(no sign of life|does not answer|has ended)", printed[1 - rank])


def evaluate_for_long(rank, pipes):
    if rank == 0:
        signal.sigtimedwait([signal.SIGRTMIN], 1.5)
    watch.wait_for_all()


def test_evaluation_may_exceed_the_collective_timeout(run_two):
    codes, printed = run_two(evaluate_for_long, collective=1)
    assert codes == [0, 0], printed


def leave(rank, pipes):
    """Leave, in the second process after a message."""
    if rank == 1:
        pipes[1].recv()
    Preemption().leave_together(signal.SIGTERM, 7)


def test_processes_leave_together(run_two):
    """A launcher ends all processes once one has left."""

    def first_waits(processes, pipes):
        processes[0].join(0.5)
        assert processes[0].exitcode is None
        pipes[0].send("go on")

    codes, _ = run_two(leave, first_waits)
    assert codes == [75, 75]


def differ(rank, pipes):
    model = torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(rank + 1)
    model.running_mean.fill_(rank + 1)
    share_weights(model)
    assert model.weight.tolist() == model.running_mean.tolist() == [1, 1]
    records = [{"image_id": 5}, {"image_id": 6, "annotations": [{}] * (rank + 1)}]
    refuse_differences(facts_of_data(("data",), records[:1]))
    refuse_differences(facts_of_data(("data",), records))


def test_different_data_are_refused_and_weights_shared(run_two):
    codes, printed = run_two(differ)
    assert codes == [1, 1]
    sentence = (
        "the last image of data is 6 with 1 objects in process 0, but 6 with 2 objects in "
        "process 1: do all machines have the same files?"
    )
    assert all(sentence in text for text in printed)


def enter_late(rank, pipes):
    """Enter a watch late in the second process, as a user's script may."""
    watch.current().close()
    if rank == 1:
        with watch.Watch() as other:
            assert other.heard == {}
            signal.sigtimedwait([signal.SIGRTMIN], 2.5)
    torch.distributed.barrier()


@pytest.mark.slow
def test_process_may_join_late(run_two):
    codes, printed = run_two(enter_late, silence=2)
    assert codes == [0, 0], printed


def test_signal_after_a_caught_exception_stops_again():
    """For example in __del__, whose exceptions Python ignores."""
    with watch.Watch() as alone:
        for _ in range(2):
            with pytest.raises(SystemExit, match="75"):
                alone.receive(signal.SIGTERM)
        with pytest.raises(SystemExit, match="75"):
            alone.receive(signal.SIGINT)  # the first ctrl-C, and no second one


@pytest.mark.parametrize(
    ("number", "code", "left"), [(15, 75, True), (2, 130, True), (0, None, False)]
)
def test_replaced_exception_of_a_signal_keeps_the_exit_code(tmp_path, number, code, left):
    """torch's writer raises another exception."""

    def write(*_):
        alone = watch.current()
        alone.stop_signal, alone.left = number, left
        raise RuntimeError("unexpected pos 192 vs 64")

    args, cfg = SimpleNamespace(eval_only=False), SimpleNamespace(OUTPUT_DIR=str(tmp_path))
    with pytest.raises(SystemExit if left else RuntimeError) as stop:
        launch._run_alone(write, args, cfg)
    assert getattr(stop.value, "code", None) == code
