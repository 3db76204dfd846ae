"""Scalars that the processes exchange in each iteration."""

from collections.abc import Callable

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, distributed

from .signals import first_of


class ScalarAllGather:
    """All-gather of losses, waiting times and stop signals: one small collective between forward
    and backward pass. The host reads it after it has launched the backward pass, which keeps a GPU
    busy.

    Args:
        get_stop_signal: returns the signal that this process received, or 0.
    """

    def __init__(self, get_stop_signal: Callable[[], int]):
        self.get_stop_signal = get_stop_signal
        self.waited = 0.0
        self.names: list[str] = []
        self.rows: list[list[float]] = []

    def send(self, losses: dict[str, Tensor]) -> None:
        """Start the all-gather of scalars of the same names in all processes."""
        self.names = [*losses]
        values = torch.stack([x.detach().reshape(()) for x in losses.values()])
        more = [torch.full_like(values[:1], x) for x in (self.waited, self.get_stop_signal())]
        row = torch.cat([values, *more])
        rows = row.new_empty(comm.get_world_size(), len(row))
        if len(rows) > 1:
            distributed.all_gather([*rows.unbind()], row)
        else:
            rows = row[None]
        self.sent = rows.to("cpu", non_blocking=True)
        self.arrived = None
        if rows.is_cuda:
            self.arrived = torch.cuda.Event()
            # On the device that copies, which may differ from the current one.
            self.arrived.record(torch.cuda.current_stream(rows.device))

    def receive(self) -> None:
        """Wait for the result of :meth:`send`, but not for later work of the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        self.rows = self.sent.tolist()

    @property
    def stop_signal(self) -> int:
        """Deciding signal of all processes before the end of the forward pass, or 0."""
        return first_of(int(row[-1]) for row in self.rows)

    def losses(self, rank: int) -> dict[str, float]:
        return dict(zip(self.names, self.rows[rank], strict=False))

    def write(self, data_time: float) -> None:
        """Log mean losses and the longest wait for images, in the main process. Waits of other
        processes are those of the iteration before.

        Args:
            data_time: seconds that this process has waited.
        """
        self.waited = data_time
        if not comm.is_main_process():
            return
        columns = zip(*self.rows, strict=True)
        means = [sum(column) / len(self.rows) for column in columns]
        losses = dict(zip(self.names, means, strict=False))
        longest = max([data_time, *(row[-2] for row in self.rows[1:])])
        scalars = {"data_time": longest, **losses, "total_loss": sum(losses.values())}
        get_event_storage().put_scalars(**scalars)
