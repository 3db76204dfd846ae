"""What the processes of a training tell each other in each iteration."""

from collections.abc import Callable

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, distributed

from .watch import first_of


class ScalarAllGather:
    """Losses, and which signal asks to stop: one small collective on the device, between
    forward and backward pass. The host reads it once it has launched the backward pass, so that a
    GPU is at work while the host looks, decides and writes.

    Args:
        get_asked: returns the signal that asked this process to stop, 0 for none.
    """

    def __init__(self, get_asked: Callable[[], int]):
        self.get_asked = get_asked
        self.waited = 0.0
        self.names: list[str] = []
        self.rows: list[list[float]] = []

    def send(self, losses: dict[str, Tensor]) -> None:
        """Scalars of this process, of the same names in all."""
        self.names = [*losses]
        values = torch.stack([x.detach().reshape(()) for x in losses.values()])
        more = [torch.full_like(values[:1], x) for x in (self.waited, self.get_asked())]
        own = torch.cat([values, *more])
        rows = own.new_empty(comm.get_world_size(), len(own))
        if len(rows) > 1:
            distributed.all_gather([*rows.unbind()], own)
        else:
            rows = own[None]
        self.sent = rows.to("cpu", non_blocking=True)
        self.arrived = None
        if rows.is_cuda:
            self.arrived = torch.cuda.Event()
            # Of the device that copies, which need not be the current one.
            self.arrived.record(torch.cuda.current_stream(rows.device))

    def receive(self) -> None:
        """Waits for what was sent, and for no more."""
        if self.arrived is not None:
            self.arrived.synchronize()
        self.rows = self.sent.tolist()

    @property
    def asked(self) -> int:
        """The signal that decides, of all processes, when this iteration's forward pass had
        ended."""
        return first_of(int(row[-1]) for row in self.rows)

    def losses(self, rank: int) -> dict[str, float]:
        """Of one process."""
        return dict(zip(self.names, self.rows[rank], strict=False))

    def write(self, data_time: float) -> None:
        """Into the log, as Detectron2 does: losses in the mean over the processes, and the longest
        wait for images, which of the others is that of the iteration before. Only the main process
        writes.

        Args:
            data_time: seconds for which this process has waited for images.
        """
        self.waited = data_time
        if not comm.is_main_process():
            return
        columns = zip(*self.rows, strict=True)
        means = [sum(column) / len(self.rows) for column in columns]
        losses = dict(zip(self.names, means, strict=False))
        longest = max([data_time, *(row[-2] for row in self.rows[1:])])
        told = {"data_time": longest, **losses, "total_loss": sum(losses.values())}
        get_event_storage().put_scalars(**told)
