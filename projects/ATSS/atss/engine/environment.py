"""Number and ranks of the processes, from torchrun's variables or the command line."""

import argparse
import math
import os
import re
import socket

from ..errors import UserError

# Variables that torchrun sets in each process that it starts; a scheduler's script can set them.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def is_started() -> bool:
    """Return whether torchrun, or a script in its place, started this process.

    Raises:
        UserError: naming a variable that is missing or impossible.
    """
    missing = [name for name in (*ENVIRONMENT, *MEETING) if name not in os.environ]
    present = [name for name in ENVIRONMENT if name in os.environ]
    if present and missing:
        raise UserError(
            f"{' and '.join(present)} are set, but not {' and '.join(missing)}: processes that "
            "torchrun does not start need all of them, a single process needs none "
            "(docs/clusters.md)"
        )
    if present:
        _check_variables()
    return bool(present)


def _check_variables() -> None:
    values = {}
    for name in (*ENVIRONMENT, "MASTER_PORT"):
        if not re.fullmatch(r"\d+", os.environ[name]):
            raise UserError(f"{name} must be a whole number, got {os.environ[name]!r}")
        values[name] = int(os.environ[name])
    rank, size, local_rank, local_size, port = values.values()
    limits = {
        "WORLD_SIZE": (size, 1, math.inf),
        "LOCAL_WORLD_SIZE": (local_size, 1, size),
        "RANK": (rank, 0, size - 1),
        "LOCAL_RANK": (local_rank, 0, local_size - 1),
        "MASTER_PORT": (port, 1, 65535),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise UserError(
                f"{name} must be between {low} and {high}, got {value} (WORLD_SIZE is {size}, "
                f"LOCAL_WORLD_SIZE {local_size})"
            )
    if size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"RANK {rank} has LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}: machines "
            "must start equally many processes, and the ranks of a machine must be consecutive "
            "(SLURM: --distribution=block)"
        )
    check_host("MASTER_ADDR", os.environ["MASTER_ADDR"])


def check_host(name: str, host: str) -> None:
    """Check that a host has an address.

    Raises:
        UserError: naming the variable or option.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(f"{name} {host!r} has no address: {error.strerror}") from error


def world_size(args: argparse.Namespace) -> int:
    return int(os.environ["WORLD_SIZE"]) if is_started() else args.num_gpus * args.num_machines


def local_size(args: argparse.Namespace) -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_started() else args.num_gpus


def shares_agent_store() -> bool:
    """Return whether the processes meet in torchrun's store, which outlives a restart."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
