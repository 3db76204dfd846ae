"""What stops a training: losses or weights that are not finite, and a scheduler's SIGTERM.

Whatever one process meets, all of them learn of it and stop in the same iteration: one that left
alone would leave the others waiting for it in the next collective.
"""

import logging
import math
import os
import signal
import threading

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

from ..checkpoints.checkpointer import TrainingCheckpointer
from .exchange import Exchange

# "Temporary failure, try again" (EX_TEMPFAIL in sysexits.h). Not 143, which also is what the shell
# says of a process that SIGTERM killed before it could save.
EXIT_PREEMPTED = 75


class AllLeave(SystemExit):
    """Of all processes, in the same place."""


class FiniteLosses(HookBase):
    """Stops at a loss that is NaN or infinite, before the optimizer can step on it.

    For the trainer that makes the steps (SimpleTrainer or AMPTrainer). Inf in the gradients alone
    is the gradient scaler's business.

    Args:
        model: what that trainer calls.
        exchange: by which the processes learn of each other's losses.
        checkpointer: knows the checkpoints that the message can name.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, checkpointer: TrainingCheckpointer):
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
    """After SIGTERM: a checkpoint of the iteration that is under way, then exit code 75.

    Goes between PeriodicCheckpointer and Evaluation. As a context manager, around the training, it
    holds the signal's handler. One process that gets the signal is enough; the others learn of it
    in the exchange of this iteration, or of the next. While an evaluation runs whose iteration has
    its checkpoint, the process exits at once.
    """

    asked = False
    saved = False
    left = False

    def __init__(self) -> None:
        self.exchange = Exchange(lambda: self.asked)

    def __enter__(self) -> None:
        # Python handles signals in the main thread alone.
        self.handles = threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._on_sigterm)

    def __exit__(self, *exception: object) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.previous)

    def _on_sigterm(self, *_: object) -> None:
        self.asked = True
        if self.saved:
            self.left = True
            raise SystemExit(EXIT_PREEMPTED)

    def before_train(self) -> None:
        self.saved = self.trainer.start_iter > 0  # resumed from a checkpoint

    def before_step(self) -> None:
        self.saved = False
        self.exchange.rows = []

    def after_step(self) -> None:
        saved = _saves_now(self.trainer)
        asked = self.exchange.anyone_asked
        # An evaluation may follow, which is long, or nothing; and a run_step of somebody's own may
        # exchange nothing.
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        evaluates = period and (self.trainer.iter + 1) % period == 0
        if not asked and (saved or evaluates or len(self.exchange.rows) < 2):
            asked = any(comm.all_gather(self.asked))
        if not asked:
            self.saved = saved
            return
        iteration = self.trainer.iter
        if not saved:
            refuse_broken_weights(self.trainer)
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        self._leave(iteration)

    def leave_if_asked(self, iteration: int) -> None:
        """For whoever has saved this iteration: exits where one process got the signal."""
        if any(comm.all_gather(self.asked)):
            self._leave(iteration)

    def _leave(self, iteration: int) -> None:
        self.left = True
        # Who starts processes ends all of them when one has left.
        comm.synchronize()
        logging.getLogger(__name__).info(
            "SIGTERM: stopped after iteration %d; --resume goes on from there", iteration
        )
        raise AllLeave(EXIT_PREEMPTED)


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


def _leave_sigterm_to_parent() -> None:
    """In a process that loads data: SIGTERM from the training process ends it; from elsewhere, as
    when a scheduler signals a whole process group, it does nothing, so that training can go on to
    the end of the iteration."""
    handler = signal.getsignal(signal.SIGTERM)
    if not isinstance(getattr(handler, "__self__", None), Preemption):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_sigterm_to_parent)
