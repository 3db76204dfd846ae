"""What stops a training: losses or weights that are not finite, and a signal.

Whatever one process meets, all of them learn of it and stop in the same iteration: one that left
alone would leave the others waiting for it in the next collective.
"""

import logging
import math
import signal

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

from ..checkpoints.checkpointer import TrainingCheckpointer
from .all_gather import ScalarAllGather
from .watch import current, exit_code, first_of


class AllLeave(SystemExit):
    """Leaves Python in all processes, in the same place."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class FiniteLosses(HookBase):
    """Stops at a loss that is NaN or infinite, before the optimizer can step on it.

    For the trainer that makes the steps (SimpleTrainer or AMPTrainer). Inf in the gradients alone
    is the gradient scaler's business.

    Args:
        model: what that trainer calls.
        exchange: by which the processes learn of each other's losses.
        checkpointer: knows the checkpoints that the message can name.
    """

    def __init__(
        self, model: nn.Module, exchange: ScalarAllGather, checkpointer: TrainingCheckpointer
    ):
        model.register_forward_hook(self._send)
        self.exchange = exchange
        self.checkpointer = checkpointer

    def _send(self, model: nn.Module, inputs: tuple[list[dict]], losses: dict) -> None:
        if model.training and torch.is_grad_enabled():  # not to measure statistics, say
            self.images = [str(x.get("file_name", x.get("image_id"))) for x in inputs[0]]
            self.exchange.send(losses)

    def after_backward(self) -> None:
        """
        Raises:
            FloatingPointError: in all processes, with the iteration, the losses, the images of the
                processes in which they are not finite, and the last good checkpoint.
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
        said = ", ".join(f"{name} is {value}" for name, value in broken[min(broken)].items())
        named = ", ".join(image for rank in broken for image in images[rank])
        raise FloatingPointError(
            f"at iteration {self.trainer.iter} {said}, on the images {named}; "
            + _last_good(self.checkpointer, self.trainer.iter - 1)
        )


class FiniteWeights(HookBase):
    """Stops before weights that are not finite are saved; goes before PeriodicCheckpointer."""

    def after_step(self) -> None:
        """
        Raises:
            FloatingPointError: in all processes, with the iteration and the last good checkpoint.
        """
        if _saves_now(self.trainer):
            refuse_broken_weights(self.trainer)


class Preemption(HookBase):
    """After a signal (:mod:`.watch`): a checkpoint of the iteration that is under way, then exit
    code 75, or 130 after ctrl-C.

    Goes between PeriodicCheckpointer and Evaluation. One process that gets the signal is enough;
    the others learn of it in the exchange of this iteration, or of the next. While an evaluation
    runs whose iteration has its checkpoint, the processes exit at once.
    """

    def __init__(self) -> None:
        self.watch = current()
        self.exchange = ScalarAllGather(lambda: self.watch.asked)

    @property
    def left(self) -> bool:
        return self.watch.left

    def before_step(self) -> None:
        self.watch.unsaved = True
        self.exchange.rows = []

    def after_step(self) -> None:
        saved = _saves_now(self.trainer)
        asked = self.exchange.asked
        # An evaluation may follow, which is long, or nothing; and a user's own run_step may
        # exchange nothing.
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        evaluates = period and (self.trainer.iter + 1) % period == 0
        if not asked and (saved or evaluates or len(self.exchange.rows) < 2):
            asked = first_of(comm.all_gather(self.watch.asked))
        iteration = self.trainer.iter
        if asked:
            if not saved:
                refuse_broken_weights(self.trainer)
                self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self._leave(asked, iteration)
        if saved:
            self.watch.mark_saved()

    def after_last_checkpoint(self, iteration: int) -> None:
        """Leave after a checkpoint that a hook has written, if one process got a signal."""
        if asked := first_of(comm.all_gather(self.watch.asked)):
            self._leave(asked, iteration)
        self.watch.mark_saved()

    def _leave(self, asked: int, iteration: int) -> None:
        self.watch.left = True
        # A launcher ends all processes when one has left.
        comm.synchronize()
        logging.getLogger(__name__).info(
            "%s: stopped after iteration %d; --resume goes on from there",
            signal.Signals(asked).name,
            iteration,
        )
        raise AllLeave(exit_code(asked))


def refuse_broken_weights(trainer: TrainerBase) -> None:
    """
    Raises:
        FloatingPointError: where a weight is NaN or infinite.
    """
    finite: list[Tensor] = [torch.isfinite(x).all() for x in trainer.model.parameters()]
    if not torch.stack(finite).all():
        raise FloatingPointError(
            f"iteration {trainer.iter} made weights that are not finite, which are not saved; "
            + _last_good(trainer.checkpointer, trainer.iter)
        )


def _saves_now(trainer: TrainerBase) -> bool:
    """Whether PeriodicCheckpointer saves in this iteration."""
    done = trainer.iter + 1
    return done % trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done == trainer.max_iter


def _last_good(checkpointer: TrainingCheckpointer, iteration: int) -> str:
    """Names this run's newest checkpoint of an iteration before this one. Its weights have given
    finite losses since, which those of the iteration just before a failure have not."""
    files = checkpointer.files_of_this_run()
    good = [number for number in files if number < iteration]
    if not good:
        return "there is no checkpoint of this run from before it"
    return f"the last good checkpoint is {files[max(good)]}"
