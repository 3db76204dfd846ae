"""Two machines on one computer: network namespaces with addresses, processes on CPUs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from conftest import WIDE_FOR_GN
from trainings import command_line

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# No statistics over a batch: those of BatchNorm are each process's own.
OPTS = WIDE_FOR_GN | {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.NORM": "GN",
    "SOLVER.CHECKPOINT_PERIOD": 5,
}
OPTS |= {"SOLVER.MAX_ITER": 20, "SOLVER.CHECKPOINTS_TO_KEEP": 0}
OPTS |= {"DATALOADER.ASPECT_RATIO_GROUPING": False, "MODEL.ATSS.PRECISION": "fp32"}
# --import double: in float32, rounding grows to 1 % of the change of weights in eight steps.
DOUBLE = """
from atss.engine import Trainer
build = Trainer.build_model.__func__
Trainer.build_model = classmethod(lambda cls, cfg: build(cls, cfg).double())
"""


@pytest.fixture
def argv(squares, tmp_path, monkeypatch):
    """argv(folder): arguments of tools/train_net.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "double.py").write_text(DOUBLE)
    return lambda folder: command_line(
        squares, tmp_path / folder, "--import", "double", "--resume", **OPTS
    )


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """Return the prefixes of command lines that run in the two namespaces."""
    names = [f"atss{os.getpid()}{x}" for x in "ab"]
    try:
        try:
            for name in names:
                ip(f"netns add {name}")
            first, second = names
            ip(f"link add {first} netns {first} type veth peer name {second} netns {second}")
            for name, address in zip(names, ADDRESSES, strict=True):
                ip(f"-n {name} addr add {address}/24 dev {name}")
                ip(f"-n {name} link set {name} up")
                ip(f"-n {name} link set lo up")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no network namespaces without privileges")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}", "OMP_NUM_THREADS=1"]
            for name in names
        ]
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                lose(["ip", "netns", "exec", name])
                ip(f"netns del {name}")


def begin(words: list[str], **environment: object) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        env=os.environ | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def agent(machine: list[str], number: int, argv: list[str]) -> subprocess.Popen:
    """Start torchrun as in docs/clusters.md. It looks up addresses by the computer's name, which
    has no namespace."""
    options = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id atss --max-restarts 3"
    options += f" --rdzv-endpoint {ADDRESSES[0]}:29400 --local-addr {ADDRESSES[number]}"
    options += f" --rdzv-conf is_host={int(number == 0)}"
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options.split(), *argv]
    return begin([*machine, *words], TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)


def process(machine: list[str], rank: int, argv: list[str]) -> subprocess.Popen:
    """Start a process as SLURM's script does."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500}
    return begin([*machine, sys.executable, "-W", "ignore", *argv], **variables)


def lose(machine: list[str]) -> None:
    """Kill all processes of a machine."""
    words = ["ip", "netns", "pids", machine[3]]
    for pid in subprocess.run(words, check=True, capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def ended(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
    return text


def weights(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights after five iterations and at the end."""

    def read(name: str) -> torch.Tensor:
        model = torch.load(folder / name, weights_only=True)["model"]
        return torch.cat([x.flatten().double() for x in model.values()])

    return read("model_0000004.pth"), read("model_final.pth")


@pytest.fixture
def same_as_alone(argv, tmp_path):
    """Compare the final weights with those of one process (docs/reproducibility.md)."""
    ended(begin([sys.executable, "-W", "ignore", *argv("alone")], OMP_NUM_THREADS=1))
    early, exact = weights(tmp_path / "alone")

    def compare() -> None:
        final = weights(tmp_path / "out")[1]
        assert (final - exact).norm() <= 1e-5 * (exact - early).norm()

    return compare


def test_two_agents_train_as_one_process(machines, argv, same_as_alone):
    for running in [agent(x, i, argv("out")) for i, x in enumerate(machines)]:
        ended(running)
    same_as_alone()


def test_lost_agent_returns(machines, argv, same_as_alone):
    """Only the iterations since the last checkpoint are lost."""
    first, second = (agent(x, i, argv("out")) for i, x in enumerate(machines))
    lines = []
    for line in first.stdout:
        lines.append(line)
        if "model_0000009.pth" in line:
            lose(machines[1])
            second = agent(machines[1], 1, argv("out"))
            break
    lines.append(ended(first))
    ended(second)
    starts = [int(x) for x in re.findall(r"Starting training from iteration (\d+)", "".join(lines))]
    assert starts[0] == 0
    assert starts[-1] in (10, 15)
    same_as_alone()


def test_processes_with_variables_of_a_scheduler(machines, argv, same_as_alone):
    """SIGTERM to one process: both exit with code 75, and resume."""
    running = [process(x, i, argv("out")) for i, x in enumerate(machines)]
    for line in running[0].stdout:
        if "model_0000004.pth" in line:
            os.killpg(running[1].pid, signal.SIGTERM)
            break
    for one in running:
        text, _ = one.communicate(timeout=300)
        assert one.returncode == 75, text[-3000:]
    for one in [process(x, i, argv("out")) for i, x in enumerate(machines)]:
        ended(one)
    same_as_alone()
