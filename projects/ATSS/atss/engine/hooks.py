"""Hooks that stop a training: losses or weights that are not finite, and signals.

All processes stop in the same iteration: one that left alone would block the others.
"""

import logging
import math
import signal
from typing import NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from torch import Tensor, nn

from ..checkpoints.checkpointer import TrainingCheckpointer
from ..deprecated import renamed_names
from .all_gather import ScalarAllGather
from .signals import exit_code, first_of
from .watch import current

__getattr__ = renamed_names(__name__)


class GroupExit(SystemExit):
    """Exit of all processes of a group."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class FiniteLosses(HookBase):
    """Hook that raises if a loss is NaN or infinite, before the optimizer steps. Infinite gradients
    of finite losses are left to the gradient scaler.

    Args:
        model: the model that the trainer calls.
        exchange: gathers the losses of all processes.
        checkpointer: has the checkpoints to name.
    """

    def __init__(
        self, model: nn.Module, exchange: ScalarAllGather, checkpointer: TrainingCheckpointer
    ):
        model.register_forward_hook(self._send)
        self.exchange = exchange
        self.checkpointer = checkpointer

    def _send(self, model: nn.Module, inputs: tuple[list[dict]], losses: dict) -> None:
        if model.training and torch.is_grad_enabled():  # not when PreciseBN measures statistics
            self.images = [str(x.get("file_name", x.get("image_id"))) for x in inputs[0]]
            self.exchange.send(losses)

    def after_backward(self) -> None:
        """Check the losses.

        Raises:
            FloatingPointError: in all processes, with losses, iteration, images and the last good
                checkpoint.
        """
        self.exchange.receive()
        broken = {}
        for rank in range(comm.get_world_size()):
            losses = self.exchange.losses(rank)
            if values := {k: v for k, v in losses.items() if not math.isfinite(v)}:
                broken[rank] = values
        if not broken:
            return
        images = comm.all_gather(self.images)
        first = broken[min(broken)].items()
        texts = [f"{name} is {'NaN' if math.isnan(x) else x}" for name, x in first]
        names = ", ".join(image for rank in broken for image in images[rank])
        raise FloatingPointError(
            f"{', '.join(texts)} at iteration {self.trainer.iter}, on the images {names}; "
            + _last_good(self.checkpointer, self.trainer.iter - 1)
        )


class FiniteWeights(HookBase):
    """Hook that raises before PeriodicCheckpointer saves weights that are not finite."""

    def after_step(self) -> None:
        if _saves_now(self.trainer):
            refuse_broken_weights(self.trainer)


class Preemption(HookBase):
    """Hook that saves a checkpoint after a signal to any process, then exits with code 75, or 130
    after ctrl-C. During an evaluation after a checkpoint, a signal ends the run at once."""

    def __init__(self) -> None:
        self.watch = current()
        self.exchange = ScalarAllGather(lambda: self.watch.stop_signal)

    @property
    def left(self) -> bool:
        return self.watch.left

    def before_step(self) -> None:
        self.watch.unsaved = True
        self.exchange.rows = []

    def after_step(self) -> None:
        saved = _saves_now(self.trainer)
        number = self.exchange.stop_signal
        # A long evaluation may follow, or the end; and a user's own run_step may gather nothing.
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        evaluates = period and (self.trainer.iter + 1) % period == 0
        if not number and (saved or evaluates or len(self.exchange.rows) < 2):
            number = first_of(comm.all_gather(self.watch.stop_signal))
        iteration = self.trainer.iter
        if number:
            if not saved:
                refuse_broken_weights(self.trainer)
                self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self.leave_together(number, iteration)
        if saved:
            self.watch.mark_saved()

    def after_last_checkpoint(self, iteration: int) -> None:
        """Exit if a process got a signal; another hook has written the checkpoint."""
        if number := first_of(comm.all_gather(self.watch.stop_signal)):
            self.leave_together(number, iteration)
        self.watch.mark_saved()

    def leave_together(self, number: int, iteration: int) -> NoReturn:
        """Exit once all processes are here: a launcher ends all if one has left.

        Raises:
            GroupExit: with the signal's exit code.
        """
        self.watch.left = True
        comm.synchronize()
        logging.getLogger(__name__).info(
            "%s: stopped after iteration %d; --resume continues from there",
            signal.Signals(number).name,
            iteration,
        )
        raise GroupExit(exit_code(number))


def build_profiler(cfg: CfgNode) -> HookBase | None:
    """Build the hook that records SOLVER.PROFILE for TensorBoard."""
    if not cfg.SOLVER.PROFILE or not comm.is_main_process():
        return None
    first, last = cfg.SOLVER.PROFILE
    return hooks.TorchProfiler(lambda trainer: first <= trainer.iter <= last, cfg.OUTPUT_DIR)


def refuse_broken_weights(trainer: TrainerBase) -> None:
    """Check the weights.

    Raises:
        FloatingPointError: if a weight is NaN or infinite.
    """
    finite: list[Tensor] = [torch.isfinite(x).all() for x in trainer.model.parameters()]
    if not torch.stack(finite).all():
        raise FloatingPointError(
            f"weights are NaN or infinite after iteration {trainer.iter} and were not saved; "
            + _last_good(trainer.checkpointer, trainer.iter)
        )


def _saves_now(trainer: TrainerBase) -> bool:
    done = trainer.iter + 1
    return done % trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done == trainer.max_iter


def _last_good(checkpointer: TrainingCheckpointer, iteration: int) -> str:
    """Name this run's newest checkpoint before an iteration: its weights have given finite losses
    since."""
    files = checkpointer.files_of_this_run()
    good = [number for number in files if number < iteration]
    if not good:
        return "this run has no earlier checkpoint"
    return f"the last good checkpoint is {files[max(good)]}"
