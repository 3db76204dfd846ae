"""Checkpoints that execute nothing when they are loaded, and survive a kill at any moment."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, ClassVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UserError
from ..weights import WeightsError, find_weights, fit_names, load_weights, verify_download
from .classes import KEY, names_in, take_rows, warn_of_others

# By Detectron2's PeriodicCheckpointer.
NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but nothing that a file asks for is executed (its own opens every
    .pkl with a bare pickle), downloads are checked, and what is wrong is said in a sentence. That
    weights are of other classes is logged.

    Args:
        model, save_dir, checkpointables: as there.
        class_names: of the model; empty where they are not known.
        whole: all weights of the model have to be there, as what it detects with.
    """

    # Weights of other projects, whose names have to be matched with ours, by the end of the file's
    # name: the key that they stand under, the end of the names that are left out, whose they are.
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
        whole: bool = False,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.whole = whole
        self.class_names = list(class_names)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """As there.

        Raises:
            WeightsError: where there is no such file, it holds no weights, or none that fit.
        """
        if self.whole and not path:
            raise WeightsError("MODEL.WEIGHTS names no weights to detect with")
        if path:
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
                raise WeightsError(f"{filename} holds no weights")
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
        self._match_classes(names_in(checkpoint, self._loading), checkpoint["model"])
        first = next(iter(checkpoint["model"]), "none")
        left = super()._load_model(checkpoint)
        names = [name for name, _ in self.model.named_parameters()]
        if set(names) <= set(left.missing_keys):
            raise WeightsError(
                f"nothing in {self._loading} fits the model: it has names such as {first}, the "
                f"model {names[0]}; weights of the authors' code or of mmdet have to be converted "
                "by tools/convert_checkpoint.py"
            )
        lacking = {*left.missing_keys, *(x[0] for x in left.incorrect_shapes)}
        self._refuse_random_parts(lacking)
        if self.whole and (names := sorted(self._needed() & lacking)):
            raise WeightsError(
                f"{self._loading} has no weights for {len(names)} parts of the model, such as "
                f"{names[0]}: they are of another model, or of a backbone alone"
            )
        return left

    def _needed(self) -> set[str]:
        """Names of weights, and of what norms have measured. Other buffers may come and go."""
        needed = {name for name, _ in self.model.named_parameters()}
        for path, module in self.model.named_modules():
            if isinstance(module, _NormBase | FrozenBatchNorm2d):
                needed |= {f"{path}.{name}" for name, _ in module.named_buffers()}
        return {name for name in needed if not name.endswith("num_batches_tracked")}

    def _refuse_random_parts(self, missing: set[str]) -> None:
        """Of what stays as it is loaded, as modules say in their attribute ``relies_on_weights``,
        all has to be there."""
        for path, module in self.model.named_modules():
            if not getattr(module, "relies_on_weights", False):
                continue
            lacking = [name for name in missing if name.startswith(f"{path}.")]
            if lacking := sorted(x for x in lacking if not x.endswith("num_batches_tracked")):
                raise WeightsError(
                    f"{self._loading} has no weights for {len(lacking)} parts of the backbone, "
                    f"such as {lacking[0]}, which would stay random: give MODEL.WEIGHTS of a "
                    "detector with the same MODEL.TIMM.NAME and MODEL.FPN.IN_FEATURES, or none"
                )

    def _match_classes(self, names: list[str], weights: dict[str, Any]) -> None:
        """What the names of classes that the weights know mean for them."""
        warn_of_others(names, self.class_names, self._loading)


class TrainingCheckpointer(SafeCheckpointer):
    """A safe one, which writes every file under another name first, removes old ones, and resumes
    from the newest complete one where ``last_checkpoint`` leads nowhere. Where a training begins
    from weights of other classes, the class layer takes over the rows of those that both have.

    Args:
        model, save_dir, class_names, checkpointables: as there. The folder is a local or mounted
            one.
        keep: how many of the files that are numbered by iteration stay; 0 for all. Those of later
            iterations, which another run left there, are not touched.

    Attributes:
        resumed: when the checkpoint was written that this run goes on from, in ns; None without.
    """

    # Of each process its own, should two write into one folder.
    UNFINISHED = "unfinished_checkpoint"

    def __init__(self, model: nn.Module, save_dir: str, *, keep: int = 0, **others: Any):
        super().__init__(model, save_dir, **others)
        if keep < 0:
            raise UserError(f"SOLVER.CHECKPOINTS_TO_KEEP must be 0 (all) or more, not {keep}")
        self.keep = keep
        self.resumed: int | None = None
        self._found = {file: _stamp(file) for file in self._numbered().values()}

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<name>.pth`` with the names of the classes and ``kwargs`` beside the states, and
        then that it is the last."""
        if not (self.save_dir and self.save_to_disk):
            return
        parts = {"model": self.model, **self.checkpointables}
        data = {key: part.state_dict() for key, part in parts.items()}
        data |= {KEY: self.class_names, **kwargs}
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, f"{name}.pth"))
        self._write(f"{name}.pth", lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")
        if self.keep and (match := NUMBERED.fullmatch(f"{name}.pth")):
            self._remove_old(int(match[1]))

    def save_weights(self, name: str, model: nn.Module, **kwargs: Any) -> None:
        """Writes ``<name>.pth`` with the weights of a model and ``kwargs``; nothing that a run
        could resume from."""
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": model.state_dict(), KEY: self.class_names} | kwargs
        self._write(f"{name}.pth", lambda file: torch.save(data, file))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """As there. Where not all states are asked for, this is no resumption: a training begins.

        Raises:
            WeightsError: as there; where a resumption would be of another model.
        """
        self._begins = checkpointables is not None
        loaded = super().load(path, checkpointables)
        if not self._begins:
            self.resumed = _stamp(path)
            done = loaded.get("iteration", -1)
            for number, file in self._numbered().items():
                if number <= done:
                    self._found.pop(file, None)
        return loaded

    def files_of_this_run(self) -> dict[int, str]:
        """Those that are numbered by iteration, {iteration: path}: what this run has written, or
        what it goes on from; not what another run left in the folder."""
        files = self._numbered()
        return {n: x for n, x in files.items() if self._found.get(x) != _stamp(x)}

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
        left = super()._load_model(checkpoint)
        if self._begins:
            return left
        other = sorted(
            self._needed() & {*left.missing_keys, *(x[0] for x in left.incorrect_shapes)}
        )
        if other:
            shapes = {name: (tuple(was), tuple(now)) for name, was, now in left.incorrect_shapes}
            was, now = shapes.get(other[0], ("missing", "a weight"))
            raise WeightsError(
                f"{self._loading} is of another model than the config's: {len(other)} weights "
                f"differ, such as {other[0]}, which is {was} there and {now} here; --resume needs "
                "the config of the run that it goes on with"
            )
        return left

    def _forget_counts(self, weights: dict[str, Any]) -> None:
        """Replace the buffers that modules list in ``of_a_training``, counts of the training that
        made the weights, by those of the new model."""
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name in getattr(module, "of_a_training", ()):
                weights[f"{path}.{name}"] = module.get_buffer(name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Detectron2's, all or nothing."""
        self._write("last_checkpoint", lambda file: file.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The one to resume from: what ``last_checkpoint`` names where that can be read, else the
        one that has seen most images; "" where there is none.

        Raises:
            OSError: where ``last_checkpoint`` names one, but none can be read.
        """
        named = super().get_checkpoint_file()
        if named and progress(named):
            return named
        files = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        complete = {file: done for file in files if (done := progress(file))}
        if complete:
            newest = max(complete, key=complete.__getitem__)
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
        unfinished = os.path.join(self.save_dir, f"{self.UNFINISHED}_{os.getpid()}")
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
        # Names are the folder's content: without this a power cut may lose the one, but keep the
        # name of last_checkpoint. Not every system has it.
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
    """When a file was written, in ns; None where the first process has just removed it."""
    try:
        return os.stat(file).st_mtime_ns
    except FileNotFoundError:
        return None


def progress(file: str) -> tuple[int, int] | None:
    """Images seen, which older checkpoints do not have, and the last iteration before a complete
    checkpoint was written; None for any other file."""
    try:
        # Mapped, so that weights are not read; a file that was cut has lost its table of contents.
        trainer = load_weights(file, mmap=True)["trainer"]
        return trainer.get("images_seen", 0), trainer["iteration"]
    except (WeightsError, LookupError, TypeError, AttributeError):
        return None
