"""Checkpointers that execute nothing in a file and survive a kill at any time."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, ClassVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UserError
from ..weights import (
    WeightsError,
    find_weights,
    fit_names,
    load_weights,
    verify_download,
    widen_first,
)
from .classes import KEY, names_in, take_rows, warn_of_others
from .inputs import ENTRY, refuse_others

# Names of Detectron2's PeriodicCheckpointer.
NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but it unpickles no code, checks downloads, and warns about
    weights of other classes.

    Args:
        class_names: of the model; empty if unknown.
        trained_with: of the config, from :func:`~atss.config.inputs.values_in`.
        whole: require all weights of the model, as detection does.
    """

    # Weights of other projects, whose names Detectron2 matches with the model's:
    # {end of the file's name: (key of the weights, end of names to leave out, author)}.
    FOREIGN: ClassVar = {
        ".pkl": ("blobs", "_momentum", "Caffe2"),
        ".pyth": ("model_state", "num_batches_tracked", "pycls"),
    }

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] = (),
        trained_with: Mapping[str, Any] | None = None,
        whole: bool = False,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.whole = whole
        self.class_names = list(class_names)
        self.trained_with = trained_with or {}

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        if self.whole and not path:
            raise WeightsError("MODEL.WEIGHTS is empty: detection needs weights")
        if not path:
            self.logger.info(
                "MODEL.WEIGHTS is empty: no checkpoint is loaded. FPN and head begin random, and "
                "so does a backbone without pretrained weights"
            )
            return {}
        address = path.partition("?")[0]
        try:
            local = self.path_manager.get_local_path(address)
        except OSError as error:
            raise WeightsError(f"cannot fetch the weights {path}: {error}") from error
        if not os.path.isfile(local):
            raise WeightsError(f"the weights {path} do not exist")
        if local != address:
            verify_download(address, local)
        self._loading = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        suffix = os.path.splitext(filename)[1]
        if suffix not in self.FOREIGN:
            loaded = super()._load_file(filename)
        else:
            loaded = load_weights(filename)
            if not isinstance(loaded, dict):
                raise WeightsError(f"{filename} contains no weights")
            if not {"model", "__author__"} <= loaded.keys():
                key, left_out, author = self.FOREIGN[suffix]
                content = find_weights(loaded.get(key, loaded), filename)
                model = {k: v for k, v in content.items() if not k.endswith(left_out)}
                loaded = {"model": model, "__author__": author, "matching_heuristics": True}
        weights = find_weights(loaded["model"], filename)
        loaded["model"] = fit_names(weights, self.model.state_dict().keys())
        return loaded

    def _torch_load(self, filename: str) -> dict:
        content = load_weights(filename)
        return content if isinstance(content, dict) else {"model": content}

    def _load_model(self, checkpoint: dict) -> Any:
        refuse_others(checkpoint.get(ENTRY), self.trained_with, self._loading)
        self._match_classes(names_in(checkpoint, self._loading), checkpoint["model"])
        first = next(iter(checkpoint["model"]), "none")
        result = super()._load_model(checkpoint)
        names = [name for name, _ in self.model.named_parameters()]
        if set(names) <= set(result.missing_keys):
            raise WeightsError(
                f"no weights in {self._loading} fit the model: it has names such as {first}, the "
                f"model {names[0]}; convert weights of the authors' code or of mmdet with "
                "tools/convert_checkpoint.py"
            )
        missing = {*result.missing_keys, *(x[0] for x in result.incorrect_shapes)}
        self._refuse_random_parts(missing)
        if self.whole and (names := sorted(self._needed() & missing)):
            raise WeightsError(
                f"{self._loading} has no weights for {len(names)} parts of the model, such as "
                f"{names[0]}: they are of another model, or of a backbone only"
            )
        return result

    def _needed(self) -> set[str]:
        """Return the names of parameters and norm statistics; other buffers are optional."""
        needed = {name for name, _ in self.model.named_parameters()}
        for path, module in self.model.named_modules():
            if isinstance(module, _NormBase | FrozenBatchNorm2d):
                needed |= {f"{path}.{name}" for name, _ in module.named_buffers()}
        return {name for name in needed if not name.endswith("num_batches_tracked")}

    def _refuse_random_parts(self, missing: set[str]) -> None:
        """Require all weights of frozen modules with ``relies_on_weights``."""
        for path, module in self.model.named_modules():
            if not getattr(module, "relies_on_weights", False):
                continue
            names = [name for name in missing if name.startswith(f"{path}.")]
            if names := sorted(x for x in names if not x.endswith("num_batches_tracked")):
                raise WeightsError(
                    f"{self._loading} has no weights for {len(names)} parts of the backbone, such "
                    f"as {names[0]}, which would stay random: set MODEL.WEIGHTS to a detector with "
                    "the same MODEL.TIMM.NAME and MODEL.FPN.IN_FEATURES, or leave it empty"
                )

    def _match_classes(self, names: list[str], weights: dict[str, Any]) -> None:
        warn_of_others(names, self.class_names, self._loading)


class TrainingCheckpointer(SafeCheckpointer):
    """A SafeCheckpointer that replaces files atomically, removes old ones, and resumes from the
    newest complete one if ``last_checkpoint`` is unusable. If a training begins from weights of
    other classes, the class layer takes the rows of common classes.

    Args:
        save_dir: a local or mounted folder.
        keep: number of checkpoints numbered by iteration that stay; 0 for all. Later ones, from
            another run, also stay.

    Attributes:
        resumed: time in ns at which the resumed checkpoint was written, or None.
    """

    # The process id follows: two processes may write into one folder.
    UNFINISHED = "unfinished_checkpoint"

    def __init__(self, model: nn.Module, save_dir: str, *, keep: int = 0, **others: Any):
        super().__init__(model, save_dir, **others)
        if keep < 0:
            raise UserError(f"SOLVER.CHECKPOINTS_TO_KEEP must be >= 0 (0 keeps all), got {keep}")
        self.keep = keep
        self.resumed: int | None = None
        self._older = {file: _stamp(file) for file in self._numbered().values()}

    def save(self, name: str, **kwargs: Any) -> None:
        if not (self.save_dir and self.save_to_disk):
            return
        parts = {"model": self.model, **self.checkpointables}
        data = {key: part.state_dict() for key, part in parts.items()}
        data |= {KEY: self.class_names, ENTRY: self.trained_with, **kwargs}
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, f"{name}.pth"))
        self._write(f"{name}.pth", lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")
        if self.keep and (match := NUMBERED.fullmatch(f"{name}.pth")):
            self._remove_old(int(match[1]))

    def save_weights(self, name: str, model: nn.Module, **kwargs: Any) -> None:
        """Write ``<name>.pth``, not for resumption."""
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": model.state_dict(), KEY: self.class_names, ENTRY: self.trained_with}
        data |= kwargs
        self._write(f"{name}.pth", lambda file: torch.save(data, file))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load a checkpoint: a training begins with ``checkpointables`` and resumes without.

        Raises:
            WeightsError: as above, or if a resumed checkpoint is of another model.
        """
        self._begins = checkpointables is not None
        loaded = super().load(path, checkpointables)
        if not self._begins:
            self.resumed = _stamp(path)
            last = loaded.get("iteration", -1)
            for number, file in self._numbered().items():
                if number <= last:
                    self._older.pop(file, None)
        return loaded

    def files_of_this_run(self) -> dict[int, str]:
        """Return {iteration: path} of the numbered checkpoints that this run wrote or resumes."""
        files = self._numbered()
        return {n: x for n, x in files.items() if self._older.get(x) != _stamp(x)}

    def _numbered(self) -> dict[int, str]:
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        matches = filter(None, map(NUMBERED.fullmatch, names))
        return {int(x[1]): os.path.join(self.save_dir, x[0]) for x in matches}

    def _match_classes(self, names: list[str], weights: dict[str, Any]) -> None:
        if self._begins:
            take_rows(weights, names, self.model, self.class_names)
        else:
            super()._match_classes(names, weights)

    def _load_model(self, checkpoint: dict) -> Any:
        if self._begins:
            self._forget_counts(checkpoint["model"])
            channels = len(getattr(self.model, "pixel_mean", "RGB"))
            checkpoint["model"] = widen_first(checkpoint["model"], self.model, channels)
        result = super()._load_model(checkpoint)
        if self._begins:
            return result
        shapes = {name: (tuple(old), tuple(new)) for name, old, new in result.incorrect_shapes}
        names = sorted(self._needed() & {*result.missing_keys, *shapes})
        if names:
            old, new = shapes.get(names[0], ("missing", "a weight"))
            raise WeightsError(
                f"{self._loading} is of another model than the config's: {len(names)} weights "
                f"differ, such as {names[0]}, which is {old} in the checkpoint and {new} in the "
                "model; --resume needs the config of the run that it continues"
            )
        return result

    def _forget_counts(self, weights: dict[str, Any]) -> None:
        """Reset the buffers in modules' ``of_a_training`` to the new model's."""
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name in getattr(module, "of_a_training", ()):
                weights[f"{path}.{name}"] = module.get_buffer(name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        self._write("last_checkpoint", lambda file: file.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the readable ``last_checkpoint``, else the checkpoint that has seen most images,
        or "".

        Raises:
            OSError: if ``last_checkpoint`` exists but no checkpoint is readable.
        """
        last = super().get_checkpoint_file()
        if last and progress(last):
            return last
        files = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        complete = {file: done for file in files if (done := progress(file))}
        if complete:
            newest = max(complete, key=complete.__getitem__)
            unusable = last or os.path.join(self.save_dir, "last_checkpoint")
            self.logger.warning(f"{unusable} is missing or cannot be read: resuming from {newest}")
            return newest
        if last:
            raise OSError(
                f"{last} is missing or cannot be read, and no other checkpoint is complete: "
                f"restore it, or remove last_checkpoint from {self.save_dir} to start again"
            )
        return ""

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        unfinished = os.path.join(self.save_dir, f"{self.UNFINISHED}_{os.getpid()}")
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # free the space on a full disk
            with suppress(OSError):
                os.remove(unfinished)
            raise
        os.replace(unfinished, os.path.join(self.save_dir, name))
        # Without it a power cut may lose this file but keep the later last_checkpoint. Not every
        # system can sync a folder.
        with suppress(OSError):
            folder = os.open(self.save_dir, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _remove_old(self, last: int) -> None:
        files = {number: file for number, file in self._numbered().items() if number <= last}
        for number in sorted(files)[: -self.keep]:
            os.remove(files[number])


def _stamp(file: str) -> int | None:
    """Return when a file was written, in ns; None if it was removed."""
    try:
        return os.stat(file).st_mtime_ns
    except FileNotFoundError:
        return None


def progress(file: str) -> tuple[int, int] | None:
    """Return (images seen, last iteration) of a complete checkpoint, or None. Old checkpoints count
    0 images."""
    try:
        # mmap: weights are not read. A truncated file has lost its table of contents.
        trainer = load_weights(file, mmap=True)["trainer"]
        return trainer.get("images_seen", 0), trainer["iteration"]
    except (WeightsError, LookupError, TypeError, AttributeError):
        return None
