"""Checkpoints that survive a kill at any moment."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

# By Detectron2's PeriodicCheckpointer.
NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class TrainingCheckpointer(DetectionCheckpointer):
    """Detectron2's, which writes every file under another name first, removes old ones, and resumes
    from the newest complete one where ``last_checkpoint`` leads nowhere.

    Args:
        model, save_dir, checkpointables: as in DetectionCheckpointer. The folder is a local or
            mounted one.
        keep: how many of the files that are numbered by iteration stay; 0 for all. Those of later
            iterations, which another run left there, are not touched.
    """

    # At most one is left by kills: the next write begins it anew.
    UNFINISHED = "unfinished_checkpoint"

    def __init__(self, model: nn.Module, save_dir: str, *, keep: int = 0, **checkpointables: Any):
        super().__init__(model, save_dir, **checkpointables)
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINTS_TO_KEEP must be 0 (all) or more, not {keep}")
        self.keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<name>.pth`` with ``kwargs`` beside the states, and then that it is the last."""
        if not (self.save_dir and self.save_to_disk):
            return
        parts = {"model": self.model, **self.checkpointables}
        data = {key: part.state_dict() for key, part in parts.items()} | kwargs
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, f"{name}.pth"))
        self._write(f"{name}.pth", lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")
        if self.keep and (match := NUMBERED.fullmatch(f"{name}.pth")):
            self._remove_old(int(match[1]))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Detectron2's, all or nothing."""
        self._write("last_checkpoint", lambda file: file.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The one to resume from: what ``last_checkpoint`` names where that can be read, else the
        one with most iterations; "" where there is none.

        Raises:
            OSError: where ``last_checkpoint`` names one, but none can be read.
        """
        named = super().get_checkpoint_file()
        if named and iterations(named) is not None:
            return named
        files = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        complete = {file: done for file in files if (done := iterations(file)) is not None}
        if complete:
            newest = max(complete, key=complete.get)
            self.logger.warning(
                "%s is missing or cannot be read: going on from %s",
                named or os.path.join(self.save_dir, "last_checkpoint"),
                newest,
            )
            return newest
        if named:
            raise OSError(
                f"{named} is missing or cannot be read, and no other checkpoint is complete: put "
                f"it back, or remove last_checkpoint from {self.save_dir} to begin anew"
            )
        return ""

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        unfinished = os.path.join(self.save_dir, self.UNFINISHED)
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # a full disk needs the room
            with suppress(OSError):
                os.remove(unfinished)
            raise
        os.replace(unfinished, os.path.join(self.save_dir, name))

    def _remove_old(self, last: int) -> None:
        files = {
            int(match[1]): name
            for name in os.listdir(self.save_dir)
            if (match := NUMBERED.fullmatch(name)) and int(match[1]) <= last
        }
        for number in sorted(files)[: -self.keep]:
            os.remove(os.path.join(self.save_dir, files[number]))


def iterations(file: str) -> int | None:
    """The last iteration before a complete checkpoint was written; None for any other file."""
    try:
        # Mapped, so that weights are not read; a file that was cut has lost its table of contents.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return content["trainer"]["iteration"]
    except Exception:  # what torch raises differs with what is wrong with a file
        return None
