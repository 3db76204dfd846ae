"""Starts the processes of a training or joins those that torchrun started, after the checks that
need no model; what goes wrong in them is said in one sentence."""

import argparse
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import launch as start_processes
from detectron2.utils import comm
from torch import distributed, nn
from torch.multiprocessing import ProcessExitedException

Main = Callable[[argparse.Namespace, CfgNode], object]

# What torchrun tells each process that it starts; a scheduler's script can tell the same.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def launch(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Runs ``main(args, cfg)`` in every process.

    Under torchrun this is one of them; otherwise Detectron2's launch starts ``--num-gpus`` per
    machine, on GPUs with NCCL, on CPUs with gloo. Leaves Python with ``error: ...`` and code 1, or
    with the code of the process that failed first.
    """
    if _is_started():
        _join(main, args, cfg)
    elif _world_size(args) == 1:
        _in_one_sentence(main, args, cfg)
    else:
        signal.signal(signal.SIGTERM, _pass_on)
        try:
            start_processes(
                _in_one_sentence,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, cfg),
            )
        except ProcessExitedException as error:
            sys.exit(f"error: {error}" if error.exit_code < 0 else error.exit_code)


def check_processes(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Whether so many processes can do what the config asks for. Where torchrun has restarted this
    one, it resumes.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    world_size, images = _world_size(args), cfg.SOLVER.IMS_PER_BATCH
    if _is_started() and args.num_gpus * args.num_machines > 1:
        raise ValueError("torchrun has started the processes: leave out --num-gpus, --num-machines")
    if not args.eval_only and not cfg.SOLVER.REFERENCE_WORLD_SIZE and images % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {world_size} processes cannot share evenly"
        )
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if _is_started() else args.num_gpus
    if on_gpu and local > torch.cuda.device_count():
        raise ValueError(f"{local} processes on a machine of {torch.cuda.device_count()} GPUs")
    if not (on_gpu or _is_started()) and world_size > 1 and torch.cuda.is_available():
        raise ValueError("--num-gpus uses GPUs: for processes with MODEL.DEVICE cpu use torchrun")

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        args.resume = True
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not args.eval_only
    if may_restart and not args.resume and os.path.exists(f"{cfg.OUTPUT_DIR}/last_checkpoint"):
        raise ValueError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} has a checkpoint, from which a restart would go on: "
            "give --resume, or another OUTPUT_DIR"
        )


def check_output_dir(path: str) -> None:
    """Makes the folder and writes a byte into it.

    Raises:
        ValueError: where that fails.
    """
    try:
        if not os.path.exists(path):
            os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(f"cannot write into OUTPUT_DIR {path}: {error.strerror}") from error


def check_free_space(path: str, model: nn.Module, copies: int = 2) -> None:
    """Whether the folder has room for checkpoints: weights, and a momentum for each that is
    trained. By default for two, because one is written before the other is deleted.

    Raises:
        ValueError: naming the folder and the sizes.
    """
    tensors = [*model.state_dict().values(), *(x for x in model.parameters() if x.requires_grad)]
    need = copies * sum(x.numel() * x.element_size() for x in tensors)
    free = shutil.disk_usage(path).free
    if free < need:
        raise ValueError(
            f"OUTPUT_DIR {path} has {free / 1e6:.0f} MB free, but {copies} checkpoints take "
            f"{need / 1e6:.0f} MB"
        )


def check_shared(checkpoint: str) -> None:
    """Whether all processes would resume from the same checkpoint.

    Raises:
        ValueError: naming those that they see.
    """
    seen = set(comm.all_gather(checkpoint))
    if len(seen) > 1:
        raise ValueError(
            "OUTPUT_DIR must be a folder that all machines share; as the last checkpoint they see "
            + " and ".join(sorted(path or "none" for path in seen))
        )


def explain(error: BaseException, output_dir: str) -> str | None:
    """One sentence for what goes wrong in ordinary use; None where only a traceback helps."""
    link: BaseException | None = error
    while link is not None:  # torch.save hides the disk's error behind one of its own
        if isinstance(link, OSError) and link.errno in CANNOT_WRITE:
            return f"cannot write into OUTPUT_DIR {output_dir}: {link.strerror}"
        link = link.__cause__ or link.__context__
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return None
    # From a data loader's process comes a traceback as text, which ends in what was raised there.
    last = (str(error).strip().splitlines() or [repr(error)])[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def _is_started() -> bool:
    return all(name in os.environ for name in ENVIRONMENT)


def _world_size(args: argparse.Namespace) -> int:
    return int(os.environ["WORLD_SIZE"]) if _is_started() else args.num_gpus * args.num_machines


def _join(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    """One of the processes that torchrun started."""
    rank, world_size, local_rank, local_world_size = (int(os.environ[x]) for x in ENVIRONMENT)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, with the addresses of the processes that are gone.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=False, timeout=DEFAULT_TIMEOUT)
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(local_world_size)
    # On several machines, torchrun may count a restart on one of them alone.
    args.resume = any(comm.all_gather(args.resume))
    _in_one_sentence(main, args, cfg)


def _in_one_sentence(main: Main, args: argparse.Namespace, cfg: CfgNode) -> None:
    try:
        main(args, cfg)
    except Exception as error:
        sentence = explain(error, cfg.OUTPUT_DIR)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")
    if distributed.is_initialized():
        # Left to the end of Python, gloo's threads now and then abort the process.
        distributed.destroy_process_group()


def _pass_on(signum: int, _: object) -> None:
    processes = multiprocessing.active_children()
    if not processes:
        sys.exit(128 + signum)
    for process in processes:
        if process.pid is not None:
            os.kill(process.pid, signum)
