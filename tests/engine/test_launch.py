"""Checks of processes before they start, and messages for errors in them."""

import errno
import io
import logging
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_cfg
from detectron2.utils import comm
from processes import FORKED

import atss.engine.run as way_in
from atss.engine.checks import check_processes
from atss.engine.environment import is_started
from atss.engine.explain import exit_with_message, explain
from atss.engine.launch import _SignalRelay, refuse_shared_gpus
from atss.engine.terminal import abridge_terminal, hide_explained_tracebacks
from atss.errors import UserError


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(KEY=value): the environment of one of its two processes."""

    def set_environment(**more):
        environment = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1} | more
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def arguments(*argv):
    return way_in.make_parser().parse_args(argv)


def test_batch_must_be_divisible_by_processes(torchrun):
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", 3)
    check_processes(arguments(), cfg)
    with pytest.raises(ValueError, match="must be divisible by 2, the number of processes, got 3"):
        check_processes(arguments("--num-gpus", "2"), cfg)
    torchrun()
    with pytest.raises(ValueError, match="must be divisible by 2, the number of processes, got 3"):
        check_processes(arguments(), cfg)
    check_processes(arguments("--eval-only"), cfg)


def test_torchrun_and_launch_do_not_mix(torchrun):
    torchrun()
    with pytest.raises(ValueError, match="leave out --num-gpus"):
        check_processes(arguments("--num-gpus", "2"), make_cfg())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"):
        check_processes(arguments("--num-gpus", "2"), make_cfg("MODEL.DEVICE", "cuda"))


def test_num_gpus_needs_torchrun_on_the_cpu_of_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"MODEL.DEVICE cpu use torchrun"):
        check_processes(arguments("--num-gpus", "2"), make_cfg())


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_missing_variable_of_a_group_is_refused(torchrun, monkeypatch, name):
    torchrun()
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"RANK.* are set, but not {name}: ") as error:
        check_processes(arguments(), make_cfg())
    assert "\n" not in str(error.value)


def test_master_addr_alone_starts_no_group(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert not is_started()


def test_several_machines_need_dist_url():
    """On one machine a free port is found."""
    with pytest.raises(ValueError, match="--num-machines 2 needs --dist-url, such as tcp://"):
        check_processes(arguments("--num-machines", "2"), make_cfg())
    check_processes(arguments("--num-machines", "2", "--dist-url", "tcp://127.0.0.1:1"), make_cfg())


@pytest.mark.parametrize("option", ["--num-gpus", "--num-machines"])
def test_number_of_processes_must_be_positive(option):
    with pytest.raises(ValueError, match=f"^{option} must be >= 1, got 0$"):
        check_processes(arguments(option, "0"), make_cfg())


EXPORTED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def test_restarts_on_several_machines_need_their_own_store(torchrun, monkeypatch):
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_USE_AGENT_STORE="True", WORLD_SIZE=4)
    with pytest.raises(ValueError, match="need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, exported"):
        check_processes(arguments(), make_cfg())
    for more in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {EXPORTED: 1}):  # static rendezvous
        torchrun(TORCHELASTIC_MAX_RESTARTS=3, WORLD_SIZE=4, **more)
        check_processes(arguments(), make_cfg())
    monkeypatch.delenv(EXPORTED)
    torchrun(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS=3)  # one machine
    check_processes(arguments(), make_cfg())


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


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": 2}, "RANK must be between 0 and 1, got 2 (WORLD_SIZE is 2, LOCAL_WORLD_SIZE 2)"),
        ({"RANK": "abc"}, "RANK must be a whole number, got 'abc'"),
        ({"RANK": -1}, "RANK must be a whole number, got '-1'"),
        (
            {"LOCAL_WORLD_SIZE": 0},
            "LOCAL_WORLD_SIZE must be between 1 and 2, got 0 (WORLD_SIZE is 2, LOCAL",
        ),
        (
            {"LOCAL_WORLD_SIZE": 3},
            "LOCAL_WORLD_SIZE must be between 1 and 2, got 3 (WORLD_SIZE is 2, LOCAL",
        ),
        (
            {"LOCAL_RANK": 2},
            "LOCAL_RANK must be between 0 and 1, got 2 (WORLD_SIZE is 2, LOCAL_WORLD",
        ),
        (
            {"WORLD_SIZE": 0},
            "WORLD_SIZE must be between 1 and inf, got 0 (WORLD_SIZE is 0, LOCAL_WORLD",
        ),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number, got 'abc'"),
        (
            {"MASTER_PORT": 70000},
            "MASTER_PORT must be between 1 and 65535, got 70000 (WORLD_SIZE is 2",
        ),
        (
            {"MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR 'no.such.host.invalid' has no address: ",
        ),
        ({"LOCAL_RANK": 1}, "RANK 0 has LOCAL_RANK 1 of LOCAL_WORLD_SIZE 2: machines must start "),
        ({"WORLD_SIZE": 3}, "RANK 0 has LOCAL_RANK 0 of LOCAL_WORLD_SIZE 2: machines must start "),
    ],
)
def test_impossible_variables_are_named(torchrun, variables, sentence):
    torchrun(**variables)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        check_processes(arguments(), make_cfg())


def test_unknown_host_of_dist_url_is_named():
    address = ("--num-gpus", "2", "--dist-url", "tcp://no.such.host.invalid:1")
    with pytest.raises(ValueError, match=r"^--dist-url 'no.such.host.invalid' has no address"):
        check_processes(arguments(*address), make_cfg())


def test_scheduler_may_show_each_process_one_gpu(torchrun, monkeypatch):
    """For example SLURM with --gpus-per-task=1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun()
    check_processes(arguments(), make_cfg("MODEL.DEVICE", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun(WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs"):
        check_processes(arguments(), make_cfg("MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 3))


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


def test_default_workers_are_limited_by_cores(monkeypatch):
    """A number other than Detectron2's default stays."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    cases = ((4, 1, 4), (4, 2, 3), (4, 8, 1), (2, 8, 2), (0, 1, 0), (16, 1, 16))
    for workers, processes, expected in cases:
        cfg = make_cfg("DATALOADER.NUM_WORKERS", workers)
        way_in.fit_workers(cfg, processes)
        assert expected == cfg.DATALOADER.NUM_WORKERS


def test_missing_import_of_a_module_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacks_one.py").write_text("import no_such_module")
    with pytest.raises(SystemExit, match="error: --import lacks_one: No module named 'no_such"):
        way_in.start(arguments("--import", "lacks_one", "--config-file", "x.yaml"))


@pytest.mark.parametrize("place", ["./{}.py", "{}.py", "rules/{}.py", "~/{}.py", "../here/{}.py"])
def test_file_is_imported_under_its_name(monkeypatch, tmp_path, place):
    """It can import the modules beside it, and runs once per process."""
    here = tmp_path / "here"
    folder = here / "rules" if place.startswith("rules") else here
    folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr(sys, "path", [*sys.path])
    name, beside = f"own_{abs(hash(place))}", f"beside_{abs(hash(place))}"
    (folder / f"{beside}.py").write_text("loads = []")
    (folder / f"{name}.py").write_text(f"from {beside} import loads\nloads.append(1)\n")
    for _ in range(2):
        way_in.import_modules([place.format(name)])
    assert sys.modules[name].loads == [1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./gone.py", "--import ./gone.py: no such file"),
        ("rules/gone", "--import rules/gone: no such file"),
        (".gone", "--import .gone: no such file"),
        ("", "--import : no such file"),
        ("gone.module", "--import gone.module: No module named 'gone'"),
        ("json.py", "--import json.py: <module 'json' from .*> has the same name: rename the file"),
    ],
)
def test_unknown_module_is_named(monkeypatch, tmp_path, name, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").touch()
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        way_in.start(arguments("--import", name, "--config-file", "x.yaml"))


@pytest.mark.parametrize(
    ("code", "error"), [("1 / 0", ZeroDivisionError), ("open('gone.json')", RuntimeError)]
)
def test_bug_in_a_module_keeps_its_traceback(monkeypatch, tmp_path, code, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"buggy_{error.__name__}"
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(error):
        way_in.start(arguments("--import", name, "--config-file", "x.yaml"))


def test_message_without_a_log_has_no_traceback(capsys):
    with pytest.raises(SystemExit, match="error: a loss is nan"), exit_with_message("out"):
        raise FloatingPointError("a loss is nan")
    assert "Traceback" not in "".join(capsys.readouterr())


def test_restart_resumes(torchrun, tmp_path):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    args = arguments()
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=0)
    check_processes(args, cfg)
    assert not args.resume
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=1)
    check_processes(args, cfg)
    assert args.resume
    evaluation = arguments("--eval-only")  # evaluates MODEL.WEIGHTS, not the last checkpoint
    check_processes(evaluation, cfg)
    assert not evaluation.resume


def test_restarts_need_a_new_folder_or_resume(torchrun, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    torchrun(TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=0)
    with pytest.raises(ValueError, match=f"{tmp_path} already contains a run, .*: pass --resume"):
        check_processes(arguments(), cfg)
    check_processes(arguments("--resume"), cfg)
    torchrun(TORCHELASTIC_MAX_RESTARTS=0)
    check_processes(arguments(), cfg)


def test_user_error_is_explained_by_its_message():
    assert explain(UserError("a is b"), "out") == "a is b"
    assert explain(ValueError("a is b"), "out") is None
    assert explain(RuntimeError("a is b"), "out") is None


@pytest.mark.parametrize(
    ("kind", "last"),
    [(OSError, "OSError: no a.png"), (UserError, "atss.errors.UserError: no a.png")],
)
def test_error_from_a_loader_process_is_explained(kind, last):
    text = f"Caught {kind.__name__} in DataLoader worker process 0.\nTraceback:\n  x\n{last}\n"
    assert explain(kind(text), "out") == "no a.png"


def test_full_disk_behind_another_error_is_explained():
    hidden = RuntimeError("unexpected pos 768")
    hidden.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(hidden, "out") == "cannot write into OUTPUT_DIR out: No space left on device"


def test_terminal_has_tracebacks_of_bugs_only(tmp_path, capsys):
    log, handler = logging.getLogger("detectron2"), logging.StreamHandler(sys.stdout)
    log.addHandler(handler)
    hide_explained_tracebacks(str(tmp_path))

    def logged(error) -> str:
        log.error("Exception during training:", exc_info=error)
        return capsys.readouterr().out

    try:
        assert "too many values" in logged(ValueError("too many values to unpack"))
        assert logged(UserError("SOLVER.MAX_ITER must be >= 1, got 0")) == ""
    finally:
        log.removeHandler(handler)


def test_terminal_shortens_long_records(monkeypatch):
    log, out = logging.getLogger("atss"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    terminal, file = logging.StreamHandler(out), logging.StreamHandler(io.StringIO())
    for handler in (terminal, file):
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    whole = "\n".join(map(str, range(30)))
    try:
        for _ in range(2):
            abridge_terminal()
        log.setLevel(logging.INFO)
        log.info(whole)
        log.warning(whole)
        log.error(whole)
        log.info("short\nenough")
    finally:
        for handler in (terminal, file):
            log.removeHandler(handler)
    first = "\n".join(map(str, range(10)))
    of_info, of_warning = "0\n(29 more lines: log.txt)", f"{first}\n(20 more lines: log.txt)"
    assert out.getvalue() == f"{of_info}\n{of_warning}\n{whole}\nshort\nenough\n"
    assert file.stream.getvalue() == f"{whole}\n" * 3 + "short\nenough\n"


def test_full_shared_memory_is_not_a_full_disk():
    """Messages of torch about images from loader processes."""
    text = "unable to write to file </torch_1234_56>: No space left on device (28)"
    assert explain(RuntimeError(text), "out").startswith("shared memory (/dev/shm), through")
    lost = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
    lost += "dataloader's workers are out of shared memory. Please try to raise your shared memory"
    assert explain(RuntimeError(lost), "out").startswith("shared memory (/dev/shm), through")


def test_lost_and_late_processes_are_explained():
    """Messages of gloo."""
    closed = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"
    assert explain(RuntimeError(closed), "out").startswith("another process of the group has ended")
    late = "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"
    assert "within SOLVER.COLLECTIVE_TIMEOUT minutes" in explain(RuntimeError(late), "out")


def test_out_of_memory_message_names_keys_to_lower():
    with pytest.raises(RuntimeError) as of_machine:
        torch.empty(2**60, dtype=torch.uint8)
    message = explain(of_machine.value, "out")
    assert message.startswith(
        "the machine's memory is not enough: lower SOLVER.IMS_PER_BATCH, and "
    )
    for key in ("INPUT.MIN_SIZE_TRAIN", "SCALE_JITTER_SIZE", "MODEL.ATSS.PRECISION"):
        assert key in message
    of_gpu = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out")
    assert of_gpu == message.replace("the machine's", "the GPU's")


def test_file_that_cannot_be_written_is_named(tmp_path):
    """The message distinguishes OUTPUT_DIR, other files, and images that cannot be read."""
    inside = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out" / "model.pth"))
    elsewhere = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache" / "x.pkl"))
    image = OSError(errno.EIO, "Input/output error", str(tmp_path / "images" / "a.png"))
    out = str(tmp_path / "out")
    assert explain(inside, out) == f"cannot write into OUTPUT_DIR {out}: No space left on device"
    assert explain(elsewhere, out).startswith(f"cannot write into {tmp_path}/cache/x.pkl: No space")
    assert explain(image, out) == f"cannot read {tmp_path}/images/a.png: Input/output error"
