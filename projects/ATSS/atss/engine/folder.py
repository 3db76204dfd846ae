"""OUTPUT_DIR: its checks and its lock."""

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from typing import IO

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..checkpoints import TrainingCheckpointer
from ..checkpoints.checkpointer import NUMBERED
from ..errors import UserError
from .averaging import Averaging
from .best import Best, best_metric
from .solver import MOMENTS


def check_output_dir(path: str, test_sets: Sequence[str] = ()) -> None:
    """Make a folder, and try to write into it and its folders of results.

    Raises:
        UserError: naming the folder.
    """
    inference = [os.path.join(path, x, "inference") for x in ("", "ema", "tta")]
    results = [*inference, *(os.path.join(x, name) for x in inference for name in test_sets)]
    folder = path
    try:
        if not os.path.exists(path):  # a file: "Not a directory", below
            os.makedirs(path, exist_ok=True)
        for folder in (path, *filter(os.path.exists, results)):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
    except OSError as error:
        raise UserError(f"cannot write into OUTPUT_DIR {folder}: {error.strerror}") from error


def refuse_used_folder(path: str, resume: bool) -> None:
    """Check that a new training does not replace another.

    Raises:
        UserError: naming the folder.
    """
    if not resume and os.path.exists(os.path.join(path, "last_checkpoint")):
        raise UserError(
            f"OUTPUT_DIR {path} already contains a run: pass --resume (in Python resume=True) or "
            "choose another folder"
        )


def lock_folder(path: str) -> IO | None:
    """Lock a folder against other runs, and remove unfinished checkpoints of a killed run.

    Returns:
        a file that has the lock until it is closed; None if the system has no locks.

    Raises:
        UserError: if another run has the lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(os.path.join(path, "lock"), "a+")  # noqa: SIM115
    try:
        # Not flock: processes that load data would keep it for a while after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another run"
        file.close()
        raise UserError(
            f"OUTPUT_DIR {path} is in use by {owner}: wait for it, or choose another folder; if "
            f"that machine is gone, remove {file.name}"
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    for name in os.listdir(path):
        if name.startswith(TrainingCheckpointer.UNFINISHED):
            os.remove(os.path.join(path, name))
    return file


def check_free_space(cfg: CfgNode, model: nn.Module) -> None:
    """Check that OUTPUT_DIR has room for checkpoints, best weights and averages: one checkpoint
    more than CHECKPOINTS_TO_KEEP, written before another is deleted, less the replaced and deleted
    files.

    Raises:
        UserError: naming the folder and the sizes.
    """
    path, keep = cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINTS_TO_KEEP
    averaged, best = cfg.SOLVER.EMA_DECAY > 0, bool(best_metric(cfg))
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    momenta = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    checkpoint = weights * (2 if averaged else 1) + momenta * MOMENTS[cfg.SOLVER.OPTIMIZER]
    copies = max(keep + 1, 2)
    replaced = [f"{x}.pth" for x in ("model_final", Averaging.FILE, Best.FILE)]
    if keep:
        numbers = {x: NUMBERED.fullmatch(x) for x in os.listdir(path)}
        replaced += [x for x, n in numbers.items() if n and int(n[1]) < cfg.SOLVER.MAX_ITER]
    files = [os.path.join(path, x) for x in replaced]
    present = sum(os.path.getsize(x) for x in files if os.path.isfile(x))
    needed = max(copies * checkpoint + weights * (averaged + best) - present, checkpoint)
    free = shutil.disk_usage(path).free
    if free < needed:
        content = f"{copies} checkpoints" + (" and the best weights" if best else "")
        also = "besides present files " if present else ""
        raise UserError(
            f"OUTPUT_DIR {path} has {free / 1e6:.0f} MB free, but {content} {also}take "
            f"{needed / 1e6:.0f} MB"
        )


def check_shared(checkpoint: str) -> None:
    """Check that all processes would resume from the same checkpoint.

    Raises:
        UserError: naming the checkpoints.
    """
    about = f"{checkpoint} ({os.path.getsize(checkpoint)} bytes)" if checkpoint else ""
    checkpoints = set(comm.all_gather(about))
    if len(checkpoints) > 1:
        raise UserError(
            "OUTPUT_DIR must be a folder that all machines share; as the last checkpoint they have "
            + " and ".join(sorted(path or "none" for path in checkpoints))
        )


def read_if_exists(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def replace_file(path: str, content: bytes) -> None:
    """Write a file in one step."""
    with open(f"{path}.unfinished", "wb") as file:
        file.write(content)
    os.replace(f"{path}.unfinished", path)
