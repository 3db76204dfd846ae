"""At any moment of writing a checkpoint, a complete one exists to resume from."""

import os
import stat
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from atss.checkpoints.checkpointer import TrainingCheckpointer
from atss.modeling.terms import Balance


class Progress:
    """Stands for the trainer."""

    iteration = 0

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


@pytest.fixture
def checkpointer(tmp_path):
    return TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path), keep=2, trainer=Progress())


def save(checkpointer, *iterations):
    for iteration in iterations:
        checkpointer.checkpointables["trainer"].iteration = iteration
        nn.init.constant_(checkpointer.model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def resume(checkpointer):
    """Return (iteration, weight) that a new process resumes from."""
    new = TrainingCheckpointer(nn.Linear(1, 1), checkpointer.save_dir, trainer=Progress())
    new.resume_or_load("", resume=True)
    return new.checkpointables["trainer"].iteration, new.model.weight.item()


def stop_within(monkeypatch, name, error):
    """Stop torch.save after half a file, or os.replace before it starts, with the error."""
    whole = torch.save

    def half(data, file):
        whole(data, file)
        file.truncate(file.tell() // 2)
        raise error

    def none(source, target):
        raise error

    owner, stopped = {"save": (torch, half), "replace": (os, none)}[name]
    monkeypatch.setattr(owner, name, stopped)


@pytest.mark.parametrize("where", ["save", "replace"])
def test_stop_during_write_keeps_last_checkpoint(checkpointer, monkeypatch, where):
    save(checkpointer, 2)
    with monkeypatch.context() as patch:
        stop_within(patch, where, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            save(checkpointer, 5)
    assert resume(checkpointer) == (2, 2.0)
    save(checkpointer, 5)
    assert resume(checkpointer) == (5, 5.0)
    files = {"model_0000002.pth", "model_0000005.pth", "last_checkpoint"}
    assert set(os.listdir(checkpointer.save_dir)) == files


@pytest.mark.parametrize("resume", [False, True])
def test_only_resuming_keeps_counts(tmp_path, resume):
    """Counts of a training are not weights."""

    def model():
        shared = Balance(3)
        return nn.ModuleDict({"layer": nn.Linear(1, 1), "first": shared, "second": shared})

    trained = model()
    trained["first"].counts += 7
    TrainingCheckpointer(trained, str(tmp_path), trainer=Progress()).save("model_final")
    new = TrainingCheckpointer(model(), str(tmp_path), trainer=Progress())
    new.resume_or_load(str(tmp_path / "model_final.pth"), resume=resume)
    assert torch.equal(new.model["layer"].weight, trained["layer"].weight)
    assert new.model["second"].counts.tolist() == [7 * resume] * 3


def test_unfinished_file_is_overwritten(checkpointer, tmp_path):
    (tmp_path / f"{checkpointer.UNFINISHED}_{os.getpid()}").write_bytes(b"x" * 100_000)
    save(checkpointer, 2)
    assert resume(checkpointer) == (2, 2.0)
    assert set(os.listdir(tmp_path)) == {"model_0000002.pth", "last_checkpoint"}


def test_failed_write_frees_the_disk(checkpointer, monkeypatch, tmp_path):
    stop_within(monkeypatch, "save", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        save(checkpointer, 2)
    assert not os.listdir(tmp_path)


def test_last_checkpoint_is_written_after_the_file(checkpointer, monkeypatch, tmp_path):
    """A kill between the two writes leaves the older name."""
    save(checkpointer, 2)
    monkeypatch.setattr(checkpointer, "tag_last_checkpoint", lambda name: None)
    save(checkpointer, 5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert resume(checkpointer) == (2, 2.0)


def test_files_are_synced_before_names(checkpointer, tmp_path, monkeypatch):
    """The file before its name, and its name before last_checkpoint."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(number):
        of_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        steps.append("folder" if of_folder else os.fstat(number).st_size)
        fsync(number)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(
        os, "replace", lambda source, to: (steps.append(os.path.basename(to)), replace(source, to))
    )
    save(checkpointer, 2)
    names = ("model_0000002.pth", "last_checkpoint")
    sizes = [(tmp_path / name).stat().st_size for name in names]
    assert steps == [x for pair in zip(sizes, names, strict=True) for x in (*pair, "folder")]


def test_last_checkpoints_are_kept_over_restarts(checkpointer, tmp_path):
    (tmp_path / "model_best.pth").touch()
    (tmp_path / "model_0090000.pth").touch()  # of a longer run
    save(checkpointer, 2, 5)
    checkpointer.save("model_final", iteration=5)
    again = TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path), keep=2, trainer=Progress())
    save(again, 8, 11)
    numbers = {"model_0000008.pth", "model_0000011.pth", "model_0090000.pth"}
    assert set(os.listdir(tmp_path)) == {
        *numbers,
        "model_best.pth",
        "model_final.pth",
        "last_checkpoint",
    }
    assert resume(checkpointer) == (11, 11.0)


def test_all_are_kept_by_default_and_negative_is_refused(tmp_path):
    checkpointer = TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path), trainer=Progress())
    save(checkpointer, 2, 5, 8)
    assert len(os.listdir(tmp_path)) == 4
    with pytest.raises(ValueError, match=r"TO_KEEP must be >= 0 \(0 keeps all\), got -1"):
        TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path), keep=-1)


def test_numpy_numbers_beside_the_states_are_read(checkpointer, caplog):
    """Such as a metric that a user's hook saves."""
    save(checkpointer, 2)
    checkpointer.save("model_best", metric=np.float64(0.5))
    assert resume(checkpointer) == (2, 2.0)
    assert "cannot be read" not in caplog.text


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def spoil(file):
    """Replace the weight, 5, by 0."""
    content = file.read_bytes()
    assert content.count(np.float32(5).tobytes()) == 1
    file.write_bytes(content.replace(np.float32(5).tobytes(), bytes(4)))


@pytest.mark.parametrize("damage", [cut, os.remove, lambda file: file.write_bytes(b""), spoil])
def test_resumes_from_newest_readable_checkpoint(checkpointer, tmp_path, caplog, damage):
    save(checkpointer, 2, 5)
    damage(tmp_path / "model_0000005.pth")
    assert resume(checkpointer) == (2, 2.0)
    assert "model_0000005.pth is missing or cannot be read: resuming from" in caplog.text


@pytest.mark.parametrize("content", [None, "", "gone.pth"])
def test_resumes_with_a_wrong_last_checkpoint(checkpointer, tmp_path, content):
    save(checkpointer, 2, 5)
    (tmp_path / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "last_checkpoint").write_text(content)
    assert resume(checkpointer) == (5, 5.0)


def test_without_last_checkpoint_progress_decides(checkpointer, tmp_path):
    """As after a longer run."""
    save(checkpointer, 2)
    checkpointer.save("model_final", iteration=2)
    save(checkpointer, 5)
    (tmp_path / "last_checkpoint").unlink()
    assert resume(checkpointer) == (5, 5.0)


def test_images_count_more_than_iterations(checkpointer, tmp_path, monkeypatch):
    """With a larger batch, iterations are fewer."""
    for seen, iteration in ((12, 5), (20, 3)):
        state = {"iteration": iteration, "images_seen": seen}
        monkeypatch.setattr(Progress, "state_dict", lambda self, state=state: state)
        save(checkpointer, iteration)
    (tmp_path / "last_checkpoint").unlink()
    assert resume(checkpointer) == (3, 3.0)


def test_file_is_verified_once(checkpointer, monkeypatch):
    """A resumption loads it several times, and it may have gigabytes."""
    save(checkpointer, 2)
    names = []
    verify = zipfile.ZipFile.testzip
    monkeypatch.setattr(
        zipfile.ZipFile, "testzip", lambda self: (names.append(self.filename), verify(self))[1]
    )
    assert resume(checkpointer) == (2, 2.0)
    assert len(names) == 1


def test_nothing_to_resume_from(checkpointer, tmp_path):
    assert not checkpointer.has_checkpoint()
    nowhere = TrainingCheckpointer(nn.Linear(1, 1), str(tmp_path / "nowhere"), trainer=Progress())
    assert not nowhere.has_checkpoint()
    save(checkpointer, 5)
    cut(tmp_path / "model_0000005.pth")
    torch.save({"model": {}, "iteration": 5}, tmp_path / "weights.pth")  # alone no checkpoint
    with pytest.raises(OSError, match=r"model_0000005.pth is missing or cannot be read, and no"):
        resume(checkpointer)


def test_training_without_weights_is_described(checkpointer, caplog):
    """Detectron2's sentence, "from scratch", is false of a pretrained backbone."""
    with caplog.at_level("INFO"):
        assert checkpointer.resume_or_load("", resume=True) == {}
    assert "MODEL.WEIGHTS is empty: no checkpoint is loaded" in caplog.text
    assert "scratch" not in caplog.text
