"""Trainers that make the steps, in float32 or float16."""

from detectron2.engine import AMPTrainer, SimpleTrainer

from .all_gather import ScalarAllGather


class StepTrainer(SimpleTrainer):
    """SimpleTrainer that writes the losses already gathered; Detectron2's gathers them again."""

    exchange: ScalarAllGather

    def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
        self.exchange.write(data_time)


class Float16StepTrainer(StepTrainer, AMPTrainer):
    """StepTrainer with a gradient scaler."""

    def load_state_dict(self, state_dict):
        # The checkpoint of another precision has no scale: it starts anew.
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict()} | state_dict)
