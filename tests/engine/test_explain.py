"""Messages for errors that users can fix."""

import errno

import pytest
import torch

from atss.engine.explain import exit_with_message, explain
from atss.errors import UserError


def test_message_without_a_log_has_no_traceback(capsys):
    with pytest.raises(SystemExit, match="error: a loss is nan"), exit_with_message("out"):
        raise FloatingPointError("a loss is nan")
    assert "Traceback" not in "".join(capsys.readouterr())


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
