"""Starts the processes of a training or joins those that torchrun started; what goes wrong in them
is said in one sentence."""

import argparse
import ctypes
import errno
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.engine import launch as start_processes
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from ..data.loader import LOADER_DIED
from ..errors import UserError
from .estimate import LESS_MEMORY
from .hooks import AllLeave
from .watch import EXIT_INTERRUPTED, EXIT_PREEMPTED, STOPPING, Watch, current, end, exit_code

Main = Callable[[argparse.Namespace, CfgNode], object]

# What torchrun tells each process that it starts; a scheduler's script can tell the same.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# Folders of this project's code, and of what is installed: in an environment or as sources.
OURS = tuple(Path(__file__).parents[n] / x for n, x in ((1, ""), (2, "atss_runner"), (4, "tools")))
INSTALLED = (
    *(Path(sysconfig.get_path(x)) for x in ("stdlib", "platstdlib")),
    *(Path(str(x.__file__)).parents[1] for x in (comm, torch)),  # comm is Detectron2's
)
PACKAGES = {"site-packages", "dist-packages"}
# How torch and Python say that /dev/shm has no room.
SHARED_MEMORY = re.compile(r"</torch_\d.*No space left|(insufficient|out of) shared memory")
NO_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full, through which images pass from the processes that load "
    "them: give it more room (of a container, --shm-size), or lower DATALOADER.NUM_WORKERS"
)
DEAD_LOADER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
LOGS = ("detectron2", "fvcore", "atss")
# How gloo and NCCL say that another process is gone, and that it has not come.
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError")
PEER_LATE = re.compile(r"Timed out waiting \d+ms")
GONE = (
    "another process of the group has ended, killed perhaps: its own output, or its machine's log, "
    "tells why"
)
LATE = (
    "another process of the group has not come to a collective within SOLVER.COLLECTIVE_TIMEOUT "
    "minutes"
)
# Exit codes of processes that a signal ended before they could handle it.
KILLED = (*(-number for number in STOPPING), -9)  # SIGKILL, which Windows does not name
# Processes of a group start within this time of each other.
MEETING_TIMEOUT = timedelta(minutes=10)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def launch(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Runs ``main(args, cfg)`` in every process.

    Under torchrun this is one of them; otherwise Detectron2's launch starts ``--num-gpus`` per
    machine, on GPUs with NCCL, on CPUs with gloo. Leaves Python with ``error: ...`` and code 1, or
    with the code of the process that failed first; after a signal with ``exit_code`` of it.
    """
    if is_started():
        _join(main, args, cfg)
    elif world_size(args) == 1:
        _run_alone(main, args, cfg)
    else:
        stop = _PassedOn()
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
            # A failure stays one after a signal: a scheduler would begin it again for ever.
            if stop.number and error.exit_code in (EXIT_PREEMPTED, EXIT_INTERRUPTED, *KILLED):
                sys.exit(exit_code(stop.number))
            sys.exit(f"error: {error}" if error.exit_code < 0 else error.exit_code)


def keep_freed_memory() -> None:
    """Lets the C library keep the memory that is freed, for training on CPUs.

    It would give every large block back to the system, and the next feature map of that size would
    be made of fresh pages, one fault per 4 KiB. With glibc; elsewhere nothing happens. The process
    stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold, never = -4, -1, -1  # of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, never)


def explain(error: BaseException, output_dir: str) -> str | None:
    """One sentence for what goes wrong in ordinary use; None where only a traceback helps, as in
    what may be a bug."""
    link: BaseException | None = error
    while link is not None:  # torch.save hides the disk's error behind one of its own
        if SHARED_MEMORY.search(str(link)):
            return NO_SHARED_MEMORY
        if isinstance(link, OSError) and link.errno in CANNOT_WRITE:
            elsewhere = link.filename and not _is_within(str(link.filename), output_dir)
            what = link.filename if elsewhere else f"OUTPUT_DIR {output_dir}"
            reads = link.errno == errno.EIO and elsewhere
            return f"cannot {'read' if reads else 'write into'} {what}: {link.strerror}"
        if DEAD_LOADER.search(str(link)):  # torch says it wherever the training is
            return LOADER_DIED
        link = link.__cause__ or link.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is not enough: {LESS_MEMORY}"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error):
        return f"the machine's memory is not enough: {LESS_MEMORY}"
    if isinstance(error, RuntimeError) and PEER_GONE.search(str(error)):
        return GONE
    if isinstance(error, RuntimeError) and PEER_LATE.search(str(error)):
        return LATE
    if not isinstance(error, ValueError | OSError | FloatingPointError) or may_be_a_bug(error):
        return None
    # From a data loader's process comes a traceback as text, which ends in what was raised there.
    last = (str(error).strip().splitlines() or [repr(error)])[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def may_be_a_bug(error: BaseException) -> bool:
    """Of this project's errors those on whose way was somebody's own code, as a rule's or an
    augmentation's, which may have called it wrongly; of others' ValueErrors all."""
    files = _files_on_the_way(error)
    by_us, own = not files or _is_of(OURS, files[-1]), any(map(_is_own, files))
    if isinstance(error, ValueError):
        return own or not by_us
    return isinstance(error, OSError) and own and not by_us


def _files_on_the_way(error: BaseException) -> list[str]:
    """Files of the functions through which an error and its cause came; the last raised it."""
    if "in DataLoader worker process" in str(error):
        return re.findall(r'^ +File "(.+?)", line \d+, in ', str(error), re.MULTILINE)
    before = _files_on_the_way(error.__cause__) if error.__cause__ else []
    way = traceback.walk_tb(error.__traceback__)
    return before + [frame.f_code.co_filename for frame, _ in way]


def _is_of(folders: Sequence[Path], file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def _is_own(file: str) -> bool:
    """Whether it is neither of this project nor installed; Python's own are "<frozen ...>"."""
    installed = PACKAGES & set(Path(file).parts) or _is_of((*OURS, *INSTALLED), file)
    return not file.startswith("<") and not installed


@contextmanager
def one_sentence(output_dir: str) -> Iterator[None]:
    """Leaves Python with ``error: ...`` and code 1 where one sentence explains what goes wrong; its
    traceback goes to log.txt, where there is one."""
    try:
        yield
    except Exception as error:
        sentence = explain(error, output_dir)
        if sentence is None:
            raise
        on_the_way = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        logged = TrainerBase.train.__code__ in on_the_way  # by Detectron2, but for the last hooks
        logged = logged and TrainerBase.after_train.__code__ not in on_the_way
        log = logging.getLogger("atss")
        if log.hasHandlers() and not logged:
            log.error("Exception:", exc_info=error)
        sys.exit(f"error: {sentence}")


def keep_tracebacks_to_the_file(output_dir: str) -> None:
    """Has the logs, which print every failure, print none that ends in a sentence: its traceback is
    in log.txt alone. Call it once they are set up."""

    def is_printed(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or explain(error, output_dir) is None

    for name in LOGS:
        for handler in logging.getLogger(name).handlers:
            if _is_terminal(handler):
                handler.addFilter(is_printed)


class _Abridged(logging.Formatter):
    """Another formatter's text; of more than PAGE lines the first, or of warnings the first ten."""

    PAGE = 20

    def __init__(self, whole: logging.Formatter):
        super().__init__()
        self.whole = whole

    def format(self, record: logging.LogRecord) -> str:
        lines = self.whole.format(record).splitlines()
        is_result = record.name.startswith("detectron2.evaluation")
        if len(lines) <= self.PAGE or is_result or record.levelno >= logging.ERROR:
            return "\n".join(lines)
        shown = 10 if record.levelno >= logging.WARNING else 1
        return "\n".join([*lines[:shown], f"({len(lines) - shown} more lines: log.txt)"])


def abridge_terminal() -> None:
    """Has the logs write what is longer than a page (environment, config, model) in full to log.txt
    alone. Call it once they are set up."""
    for name in LOGS:
        for handler in logging.getLogger(name).handlers:
            formatter = handler.formatter
            if _is_terminal(handler) and formatter and not isinstance(formatter, _Abridged):
                handler.setFormatter(_Abridged(formatter))


def _is_terminal(handler: logging.Handler) -> bool:
    """Whether a handler of a log writes to the terminal."""
    return getattr(handler, "stream", None) is sys.stdout


def _is_within(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def is_started() -> bool:
    """Whether torchrun, or a script in its place, has started this process.

    Raises:
        ValueError: if only some of the variables are set, so that each process would train alone,
            or one has a value that cannot be.
    """
    missing = [name for name in (*ENVIRONMENT, *MEETING) if name not in os.environ]
    given = [name for name in ENVIRONMENT if name in os.environ]
    if given and missing:
        raise UserError(
            f"{' and '.join(given)} are set, but not {' and '.join(missing)}: processes that "
            "torchrun does not start need all of them, one that trains alone needs none "
            "(docs/clusters.md)"
        )
    if given:
        _check_variables()
    return bool(given)


def _check_variables() -> None:
    values = {}
    for name in (*ENVIRONMENT, "MASTER_PORT"):
        if not re.fullmatch(r"\d+", os.environ[name]):
            raise UserError(f"{name} must be a whole number, got {os.environ[name]!r}")
        values[name] = int(os.environ[name])
    rank, size, local_rank, local_size, port = values.values()
    allowed = {
        "WORLD_SIZE": (size, 1, math.inf),
        "LOCAL_WORLD_SIZE": (local_size, 1, size),
        "RANK": (rank, 0, size - 1),
        "LOCAL_RANK": (local_rank, 0, local_size - 1),
        "MASTER_PORT": (port, 1, 65535),
    }
    for name, (value, least, greatest) in allowed.items():
        if not least <= value <= greatest:
            raise UserError(
                f"{name} must be {least} to {greatest}, got {value} (WORLD_SIZE is {size}, "
                f"LOCAL_WORLD_SIZE {local_size})"
            )
    if size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"RANK {rank} has LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}: machines "
            "must start equally many processes, and the ranks of a machine must follow one another "
            "(SLURM: --distribution=block)"
        )
    check_host("MASTER_ADDR", os.environ["MASTER_ADDR"])


def check_host(name: str, host: str) -> None:
    """
    Raises:
        ValueError: naming the variable or option whose host has no address.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(f"{name} names {host!r}, which has no address: {error.strerror}") from error


def local_size(args: argparse.Namespace) -> int:
    """How many of the processes are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_started() else args.num_gpus


def shares_agent_store() -> bool:
    """Whether torchrun has the processes meet in its own store, which outlives a restart."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def world_size(args: argparse.Namespace) -> int:
    return int(os.environ["WORLD_SIZE"]) if is_started() else args.num_gpus * args.num_machines


def timeout(cfg: CfgNode) -> timedelta:
    """How long a process waits for the others in a collective."""
    return timedelta(minutes=cfg.SOLVER.COLLECTIVE_TIMEOUT)


def _join(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    """One of the processes that torchrun started."""
    rank, world_size, local_rank, local_world_size = (int(os.environ[x]) for x in ENVIRONMENT)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu:
        # Where a scheduler shows each process its own GPU alone, that has the number 0.
        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store: distributed.Store = distributed.TCPStore(
            *address,
            world_size=world_size,
            # torchrun's own store outlives a restart, with addresses of processes that are gone.
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
    # On several machines, torchrun may count a restart on one of them alone.
    args.resume = any(comm.all_gather(args.resume))
    _run_in_group(main, args, cfg)


def refuse_shared_gpus() -> None:
    """
    Raises:
        SystemExit: in all processes, where two use one GPU, which NCCL cannot.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    used = comm.all_gather((socket.gethostname(), str(properties.uuid)))
    for rank, gpu in enumerate(used):
        if (other := used.index(gpu)) < rank:
            sys.exit(f"error: processes {other} and {rank} use the same GPU of {gpu[0]}")


def _run_alone(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    watch = current()
    try:
        with watch, one_sentence(cfg.OUTPUT_DIR):
            main(args, cfg)
    except BaseException as error:
        # Of a signal, whatever became of its exception on the way, as in a write by torch.
        if not watch.left and not isinstance(error, KeyboardInterrupt):
            raise
        print(_stopped(cfg.OUTPUT_DIR, args.eval_only), file=sys.stderr)
        sys.exit(exit_code(watch.asked) if watch.left else EXIT_INTERRUPTED)


def _run_in_group(main: Main, args: argparse.Namespace, cfg: CfgNode) -> NoReturn:
    """One process of several; whatever one ends with ends the others."""
    watch = current()
    watch.farewell = lambda: _stopped(cfg.OUTPUT_DIR, args.eval_only)
    with watch:
        try:
            with one_sentence(cfg.OUTPUT_DIR):
                main(args, cfg)
            _end_together(watch)
        except AllLeave as left:
            watch.close()
            if comm.is_main_process():
                print(_stopped(cfg.OUTPUT_DIR, evaluating=False), file=sys.stderr)
            end(left.exit_code)
        except SystemExit as left:
            if not left.code:
                _end_together(watch)
            reason = left.code if isinstance(left.code, str) else f"error: exit code {left.code}"
        except BaseException as error:
            traceback.print_exc()
            reason = f"error: {type(error).__name__}: {error}"
        if GONE in reason:  # which may have announced why
            watch.wait_for_reason()
        print(reason, file=sys.stderr)
        host = f"process {comm.get_rank()} (on {socket.gethostname()})"
        watch.leave(1, reason.replace("error: ", f"error: {host}: ", 1))


def _end_together(watch: Watch) -> NoReturn:
    # A launcher may end those that still write when one has left.
    comm.synchronize()
    watch.close()
    end(0)


def _stopped(output_dir: str, evaluating: bool) -> str:
    if evaluating:
        return "stopped"
    tag = Path(output_dir, "last_checkpoint")
    if not tag.is_file():
        return f"stopped: {output_dir} holds no checkpoint yet"
    return f"stopped: --resume goes on from {tag.with_name(tag.read_text().strip())}"


class _PassedOn:
    """Hands the signals that stop a run on to the processes that this one has started.

    Attributes:
        number: of the first one; 0 before.
    """

    def __init__(self) -> None:
        self.number, self.at = 0, 0.0
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object) -> None:
        now = time.monotonic()
        processes = multiprocessing.active_children()
        if not processes:
            sys.exit(exit_code(number))
        # From a terminal they have SIGINT already, and a second one would end them at once.
        passed = signal.SIGTERM if number == signal.SIGINT else number
        if number == signal.SIGINT:
            if self.at and now - self.at > Watch.REPEATED:
                passed = signal.SIGKILL
            self.at = self.at or now
        self.number = self.number or number
        for process in processes:
            if process.pid is not None:
                os.kill(process.pid, passed)
