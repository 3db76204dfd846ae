"""Exponential moving average (EMA) of the weights."""

import copy
import itertools
import logging
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from .agreement import share


class Averaging(HookBase):
    """EMA of weights and BatchNorm's statistics, saved as model_final_EMA.pth. Update 0 copies;
    update n keeps min(decay, (1 + n) / (10 + n)) of the average, so that the first weights do not
    dominate in a short run. It goes before PeriodicCheckpointer, which saves the average.

    Args:
        model: without DistributedDataParallel and hooks of training.
        decay: in [0, 1).

    Attributes:
        model: the averages, in evaluation mode.
        updates: their number.
    """

    FILE = "model_final_EMA"

    # torch's AveragedModel reads its counter in every step, for which the host must wait for the
    # device.
    def __init__(self, model: nn.Module, decay: float):
        self.source = model
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    def before_train(self) -> None:
        if self.updates:
            return
        self.model.load_state_dict(self.source.state_dict())
        if self.trainer.start_iter > 0:
            logging.getLogger(__name__).info(
                "The checkpoint has no averaged weights: the average starts with its weights, at "
                "iteration %d",
                self.trainer.start_iter,
            )

    @torch.no_grad()
    def after_step(self) -> None:
        n = self.updates
        kept = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        # Listed in every step, because PreciseBN replaces the tensors of its statistics.
        pairs = [*zip(_tensors(self.model), _tensors(self.source), strict=True)]
        averaged, latest = zip(*(x for x in pairs if x[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, latest, 1 - kept)
        for counter, latest_counter in pairs:
            if not counter.is_floating_point():
                counter.copy_(latest_counter)
        self.updates += 1

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self.trainer.checkpointer.save_weights(self.FILE, self.model)

    def state_dict(self) -> dict:
        model = {name: x.cpu() for name, x in self.model.state_dict().items()}
        return {"model": model, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def share_statistics(model: nn.Module) -> None:
    """Broadcast running statistics from the first process, because they differ."""
    share(x for x in model.buffers() if x.is_floating_point())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
