"""Start of a training's processes, or entry into torchrun's, and their end."""

import argparse
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch as start_processes
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from ..deprecated import renamed_names
from .environment import ENVIRONMENT, is_started, shares_agent_store, world_size
from .explain import GONE, exit_with_message
from .hooks import GroupExit
from .signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, STOPPING, end, exit_code
from .watch import Watch, current

__getattr__ = renamed_names(__name__)

Main = Callable[[argparse.Namespace, CfgNode], object]

# Exit codes of processes that a signal ended before they could handle it.
KILLED = (*(-number for number in STOPPING), -9)  # SIGKILL, which Windows does not name
# Processes of a group start within this time of each other.
MEETING_TIMEOUT = timedelta(minutes=10)


def launch(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run ``main(args, cfg)`` in this process under torchrun, or in those that Detectron2's launch
    starts (NCCL on GPUs, gloo on CPUs).

    Exit after a failure with ``error: ...`` and code 1, or the code of the process that failed
    first; after a signal with its :func:`exit_code`.
    """
    if is_started():
        _join(main, args, cfg)
    elif world_size(args) == 1:
        _run_alone(main, args, cfg)
    else:
        relay = _SignalRelay()
        try:
            start_processes(
                _run_in_group,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, cfg),
                timeout=timeout(cfg),
            )
        except ProcessExitedException as error:
            # A failure keeps its code after a signal: a scheduler would restart it forever.
            if relay.number and error.exit_code in (EXIT_PREEMPTED, EXIT_INTERRUPTED, *KILLED):
                sys.exit(exit_code(relay.number))
            sys.exit(f"error: {error}" if error.exit_code < 0 else error.exit_code)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory on CPUs, where new feature maps would cause a page fault per 4
    KiB. The process never shrinks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold, never = -4, -1, -1  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, never)


def timeout(cfg: CfgNode) -> timedelta:
    return timedelta(minutes=cfg.SOLVER.COLLECTIVE_TIMEOUT)


def _join(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    rank, world_size, local_rank, local_world_size = (int(os.environ[x]) for x in ENVIRONMENT)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu:
        # If a scheduler shows each process only its own GPU, that GPU has number 0.
        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store: distributed.Store = distributed.TCPStore(
            *address,
            world_size=world_size,
            # torchrun's own store outlives a restart, with the addresses of dead processes.
            is_master=rank == 0 and not shares_agent_store(),
            timeout=MEETING_TIMEOUT,
            wait_for_workers=not shares_agent_store(),
            multi_tenant=True,
        )
    except distributed.DistError as error:
        sys.exit(
            f"error: the {world_size} processes did not meet at MASTER_ADDR {address[0]}, "
            f"MASTER_PORT {address[1]}: {str(error).splitlines()[0]}"
        )
    store.set_timeout(timeout(cfg))
    store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout(cfg),
    )
    comm.create_local_process_group(local_world_size)
    if on_gpu:
        refuse_shared_gpus()
    # On several machines, torchrun may count a restart on only one of them.
    args.resume = any(comm.all_gather(args.resume))
    _run_in_group(main, args, cfg)


def refuse_shared_gpus() -> None:
    """Exit, in all processes, if two use one GPU, which NCCL refuses."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    used = comm.all_gather((socket.gethostname(), str(properties.uuid)))
    for rank, gpu in enumerate(used):
        if (other := used.index(gpu)) < rank:
            sys.exit(f"error: processes {other} and {rank} use the same GPU of {gpu[0]}")


def _run_alone(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    watch = current()
    try:
        with watch, exit_with_message(cfg.OUTPUT_DIR):
            main(args, cfg)
    except BaseException as error:
        # After a signal the exception may be another one: torch replaces it in a write.
        if not watch.left and not isinstance(error, KeyboardInterrupt):
            raise
        print(_stopped(cfg.OUTPUT_DIR, args.eval_only), file=sys.stderr)
        sys.exit(exit_code(watch.stop_signal) if watch.left else EXIT_INTERRUPTED)


def _run_in_group(main: Main, args: argparse.Namespace, cfg: CfgNode) -> NoReturn:
    """Run one process of several, whose end, also a failure, ends the others."""
    watch = current()
    watch.farewell = lambda: _stopped(cfg.OUTPUT_DIR, args.eval_only)
    with watch:
        try:
            with exit_with_message(cfg.OUTPUT_DIR):
                main(args, cfg)
            _end_together(watch)
        except GroupExit as exited:
            watch.close()
            if comm.is_main_process():
                print(_stopped(cfg.OUTPUT_DIR, evaluating=False), file=sys.stderr)
            end(exited.exit_code)
        except SystemExit as exited:
            if not exited.code:
                _end_together(watch)
            code = exited.code
            reason = code if isinstance(code, str) else f"error: exit code {code}"
        except BaseException as error:
            traceback.print_exc()
            reason = f"error: {type(error).__name__}: {error}"
        if GONE in reason:  # the process may have announced why
            watch.wait_for_reason()
        print(reason, file=sys.stderr)
        host = f"process {comm.get_rank()} (on {socket.gethostname()})"
        watch.leave(1, reason.replace("error: ", f"error: {host}: ", 1))


def _end_together(watch: Watch) -> NoReturn:
    # A launcher may end processes that still write once another one has left.
    comm.synchronize()
    watch.close()
    end(0)


def _stopped(output_dir: str, evaluating: bool) -> str:
    if evaluating:
        return "stopped"
    tag = Path(output_dir, "last_checkpoint")
    if not tag.is_file():
        return f"stopped: {output_dir} contains no checkpoint yet"
    return f"stopped: --resume continues from {tag.with_name(tag.read_text().strip())}"


class _SignalRelay:
    """Relay of stop signals to the processes that this one has started.

    Attributes:
        number: the first signal, or 0.
    """

    def __init__(self) -> None:
        self.number, self.interrupted = 0, 0.0
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._relay)

    def _relay(self, number: int, _: object) -> None:
        now = time.monotonic()
        processes = multiprocessing.active_children()
        if not processes:
            sys.exit(exit_code(number))
        # A terminal sends SIGINT to all processes, and a second one would end them at once.
        relayed = signal.SIGTERM if number == signal.SIGINT else number
        if number == signal.SIGINT:
            if self.interrupted and now - self.interrupted > Watch.REPEATED:
                relayed = signal.SIGKILL
            self.interrupted = self.interrupted or now
        self.number = self.number or number
        for process in processes:
            if process.pid is not None:
                os.kill(process.pid, relayed)
